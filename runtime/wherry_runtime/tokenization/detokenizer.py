"""Tokens to text while they arrive: whole characters only, cut at the first stop string."""

import codecs
from collections.abc import Sequence

from wherry_runtime.tokenization.tokenizer import Tokenizer


class Detokenizer:
    """One answer's text.

    Text that may still become a stop string, and bytes that are not a whole character yet, are held back. The parts
    that `push` and `finish` return, joined, are the decoded answer up to (and without) the first stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, strip_leading_space: bool = False) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(s for s in stop if s)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self._strip = strip_leading_space and tokenizer.strips_leading_space
        self.matched: str | None = None

    def push(self, token: int, *, may_stop: bool = True) -> str:
        """The text that became final with `token`.

        Once a stop string has matched (`matched` names it) everything later is ignored. With `may_stop` off, stop
        strings are not looked for, and what was held back for them is let go.
        """
        if self.matched is not None or self._tokenizer.is_special(token):
            return ""
        return self._advance(self._utf8.decode(self._tokenizer.token_bytes(token)), may_stop)

    def finish(self) -> str:
        """The rest: the answer has ended. Bytes that never became a character come out as U+FFFD."""
        if self.matched is not None:
            return ""
        text = self._advance(self._utf8.decode(b"", final=True), True)
        if self.matched is None:
            text, self._held = text + self._held, ""
        return text

    def _advance(self, new: str, may_stop: bool) -> str:
        if self._strip and new:
            new, self._strip = new.removeprefix(" "), False
        text = self._held + new
        if not self._stop or not may_stop:
            self._held = ""
            return text
        end, matched = _first_stop(text, self._stop)
        if matched is not None:
            self.matched, self._held = matched, ""
            return text[:end]
        keep = _possible_stop(text, self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _first_stop(text: str, stops: Sequence[str]) -> tuple[int, str | None]:
    """Where the first stop string starts, and which one; of two at the same place the longer."""
    found = [(at, -len(s), s) for s in stops if (at := text.find(s)) >= 0]
    if not found:
        return -1, None
    at, _, stop = min(found)
    return at, stop


def _possible_stop(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that is the beginning of a stop string."""
    for length in range(min(len(text), max(map(len, stops)) - 1), 0, -1):
        tail = text[-length:]
        if any(s.startswith(tail) for s in stops):
            return length
    return 0
