"""Windows of tokens from a text, for measuring and for calibration."""

from collections.abc import Iterator
from pathlib import Path

from wherry_runtime.loading.errors import ModelError
from wherry_runtime.tokenization.tokenizer import Tokenizer

PIECE = 4 << 20  # characters that are tokenized at once, and then on to the end of the line


def windows(text: Path, tokenizer: Tokenizer, count: int, length: int) -> list[list[int]]:
    """The first `count` windows of `length` tokens, one after another.

    Raises:
        ModelError: unreadable_file, or too_little_text with how much there is.
    """
    found: list[list[int]] = []
    left: list[int] = []
    for piece in _pieces(text):
        left += tokenizer.encode(piece, special_tokens=False)
        whole = len(left) // length * length
        found += [left[i : i + length] for i in range(0, whole, length)]
        left = left[whole:]
        if len(found) >= count:
            return found[:count]
    tokens = len(found) * length + len(left)
    raise ModelError(
        "too_little_text",
        f"{text}: {tokens} tokens are {len(found)} windows of {length}, and {count} are asked for; "
        "give it more text, or ask for fewer or shorter windows",
    )


def _pieces(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            while piece := file.read(PIECE):
                yield piece + file.readline(PIECE)
    except OSError as e:
        raise ModelError("unreadable_file", f"{path}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise ModelError("unreadable_file", f"{path}: not a text in UTF-8: {e}") from e
