"""A checkpoint's tokenizer, whatever file it comes in."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from wherry_runtime.loading.errors import ModelError
from wherry_runtime.tokenization.sources import find_tokenizer


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's alphabet of byte-level BPE: printable characters stand for themselves, the rest moves above 255."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(moved)}


_BYTE_OF = _byte_level_alphabet()


class Tokenizer:
    """Encodes text, and knows the bytes of each token.

    Bytes per token make detokenization a matter of concatenation: exact for byte-level BPE and for SentencePiece with
    byte fallback, the two kinds that the known families use. Other kinds fall back to decoding each token alone.
    """

    def __init__(self, directory: Path) -> None:
        """Reads the tokenizer of a model, a directory or a GGUF file; see `sources`.

        Raises:
            ModelError: missing_tokenizer, unsupported_tokenizer, unknown_pre_tokenizer, bad_tokenizer or bad_json.
        """
        source = find_tokenizer(directory)
        self.settings: dict[str, Any] = source.settings
        try:
            self._fast = FastTokenizer.from_str(source.text())
        except ModelError:
            raise
        except BaseException as e:  # tokenizers raises plain Exception, and its panics are of no kind of that
            if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
                raise
            raise ModelError("bad_tokenizer", f"{source.path}: not a tokenizer: {e}") from e
        self._fast.no_truncation()
        self._fast.no_padding()
        self._added = self._fast.get_added_tokens_decoder()
        self._bytes: dict[int, bytes] = {}
        # As JSON. That of the whole tokenizer would take as long as reading it did.
        decoder = self._fast.decoder.__getstate__().decode() if self._fast.decoder is not None else ""
        self._byte_level = '"ByteLevel"' in decoder
        self._byte_fallback = '"ByteFallback"' in decoder
        self.strips_leading_space = '"Strip"' in decoder or '"Metaspace"' in decoder
        self.vocab_size = self._fast.get_vocab_size(with_added_tokens=True)

    def differs_from(self, other: "Tokenizer") -> int | None:
        """The first token id that means something else in `other`; None if there is none."""
        own, theirs = self._fast.get_vocab(), other._fast.get_vocab()
        return min((i for _, i in own.items() ^ theirs.items()), default=None)

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; `special_tokens` adds what the tokenizer's post-processor adds (such as BOS)."""
        return list(self._fast.encode(text, add_special_tokens=special_tokens).ids)

    def encode_cut(self, text: str, length: int) -> list[int]:
        """Token ids of the beginning of `text`, `length` of them at most; special ones are there and count."""
        added = self._fast.num_special_tokens_to_add(False)
        found = self._fast.encode(text, add_special_tokens=False)
        found.truncate(max(length - added, 0))
        return list(self._fast.post_process(found).ids)[: max(length, 0)]

    def decode(self, ids: list[int]) -> str:
        """The whole text of `ids`, special tokens left out, by the library's own decoder."""
        return str(self._fast.decode(ids, skip_special_tokens=True))

    def is_special(self, token: int) -> bool:
        """Whether a token is markup rather than text."""
        added = self._added.get(token)
        return added is not None and bool(added.special)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for, special ones by their name. Ids beyond the vocabulary are empty."""
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self._compute_bytes(token)
        return known

    def _compute_bytes(self, token: int) -> bytes:
        if (added := self._added.get(token)) is not None:
            return str(added.content).encode()
        piece = self._fast.id_to_token(token)
        if piece is None:
            return b""
        if self._byte_level and all(c in _BYTE_OF for c in piece):
            return bytes(_BYTE_OF[c] for c in piece)
        if self._byte_fallback:
            if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                return bytes([int(piece[3:5], 16)])
            return str(piece).replace("▁", " ").encode()
        return str(self._fast.decode([token])).encode()
