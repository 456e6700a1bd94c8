"""SentencePiece's `tokenizer.model`, a small protobuf message (sentencepiece_model.proto), read without its library."""

import struct
from collections.abc import Iterator
from pathlib import Path

from wherry_runtime.loading.errors import ModelError
from wherry_runtime.tokenization.pieces import NORMAL, Piece, Vocabulary

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_UNIGRAM, _BPE = 1, 2
Field = int | bytes


def read_model(path: Path) -> Vocabulary:
    """The vocabulary in a `tokenizer.model`; tokens before and after a text are not in there.

    Raises:
        ModelError: bad_tokenizer.
    """
    try:
        return _vocabulary(path.read_bytes())
    except OSError as e:
        raise ModelError("bad_tokenizer", f"{path}: {e.strerror}") from e
    except ValueError as e:
        raise ModelError("bad_tokenizer", f"{path}: not a SentencePiece model: {e}") from None


def _vocabulary(data: bytes) -> Vocabulary:
    pieces, trainer, normalizer = [], {}, {}
    for number, value in _fields(data):
        if number == 1:
            pieces.append(_piece(_message(value)))
        elif number == 2:
            trainer = dict(_fields(_message(value)))
        elif number == 3:
            normalizer = dict(_fields(_message(value)))
    kind = trainer.get(3, _UNIGRAM)
    if not pieces or kind not in (_UNIGRAM, _BPE):
        raise ValueError("it has no pieces" if not pieces else f"model type {kind!r}; unigram and BPE are read")
    if trainer.get(24):
        raise ValueError("spaces as suffixes are not supported")
    charsmap = normalizer.get(2, b"")
    return Vocabulary(
        pieces,
        unigram=kind == _UNIGRAM,
        charsmap=_message(charsmap),
        add_prefix=bool(normalizer.get(3, 1)),
        squeeze_spaces=bool(normalizer.get(4, 1)),
    )


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    text, score, kind = fields.get(1, b""), fields.get(2, 0), fields.get(3, NORMAL)
    if not isinstance(kind, int) or not isinstance(score, int):
        raise ValueError("a piece's fields are of the wrong type")  # noqa: TRY004 - of the file, not of an argument
    return Piece(_message(text).decode(), struct.unpack("<f", struct.pack("<I", score))[0], kind)


def _message(value: Field) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where a message is expected")  # noqa: TRY004
    return value


def _fields(data: bytes) -> Iterator[tuple[int, Field]]:
    """Each field's number and value: whole numbers, or bytes (https://protobuf.dev/programming-guides/encoding/)."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if kind == _BYTES:
            size, at = _varint(data, at)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {kind}")
        if size > len(data) - at:
            raise ValueError("it ends early")
        chunk, at = data[at : at + size], at + size
        yield tag >> 3, chunk if kind == _BYTES else int.from_bytes(chunk, "little")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("it ends early")
        byte, at = data[at], at + 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number takes more than ten bytes")
