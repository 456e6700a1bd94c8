"""Writes GGUF v3 files, tensor by tensor.

The header comes last: until then its place is zeros, so that what is interrupted cannot be taken for a model.
"""

import struct
from collections.abc import Iterable, Sequence
from typing import Any, BinaryIO

import numpy as np

from wherry_runtime.formats.gguf.cursor import ARRAY, BOOL, NUMBERS, STRING, Value
from wherry_runtime.formats.gguf.reader import ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAGIC, TensorInfo
from wherry_runtime.loading.errors import ModelError

VERSION = 3
_KIND_OF = {np.dtype(dtype): kind for kind, (_, dtype) in NUMBERS.items() if kind != BOOL} | {np.dtype(np.bool_): BOOL}
_U32, _I32, _F32, _U64, _I64 = 4, 5, 6, 10, 11


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(key: str, value: Value | list[str]) -> bytes:
    """A value with its type: that of an array without dimensions its own; other whole numbers take 32 bits where
    they fit, others are float32."""
    if isinstance(value, bool):
        return struct.pack("<IB", BOOL, value)
    if isinstance(value, int):
        kind = (_U32 if value < 1 << 32 else _U64) if value >= 0 else (_I32 if value >= -(1 << 31) else _I64)
        return struct.pack("<I", kind) + struct.pack(NUMBERS[kind][0], value)
    if isinstance(value, float):
        return struct.pack("<If", _F32, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_string, value))
    if (array_kind := _KIND_OF.get(value.dtype.newbyteorder("<"))) is None:
        raise ModelError("bad_metadata", f"{key}: arrays of {value.dtype} cannot be written")
    if not value.ndim:
        return struct.pack("<I", array_kind) + value.tobytes()
    return struct.pack("<IIQ", ARRAY, array_kind, value.size) + np.ascontiguousarray(value).tobytes()


def encoded_header(metadata: dict[str, Value], tensors: Sequence[TensorInfo]) -> bytes:
    """The header of a file whose tensors have the given offsets from the beginning of its data, padded up to them."""
    alignment = metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int):
        raise ModelError("bad_metadata", f"{ALIGNMENT_KEY} is {alignment!r}")
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    parts += [_string(key) + _value(key, value) for key, value in metadata.items()]
    for info in tensors:
        dims = [len(info.shape), *info.shape[::-1]]
        parts.append(_string(info.name) + struct.pack(f"<I{len(info.shape)}QIQ", *dims, info.type.id, info.offset))
    header = b"".join(parts)
    return header + bytes(-len(header) % alignment)


def planned(
    tensors: Iterable[tuple[str, tuple[int, ...], Any]], alignment: int = DEFAULT_ALIGNMENT
) -> list[TensorInfo]:
    """Tensors (name, shape, type) one after the other, each with its offset from the beginning of the data.

    Raises:
        ModelError: bad_weights, for rows that are not whole blocks.
    """
    infos, offset = [], 0
    for name, shape, kind in tensors:
        if 0 in shape or (shape[-1] if shape else 1) % kind.block:
            raise ModelError("bad_weights", f"tensor {name}: {list(shape)} is not rows of whole {kind.name} blocks")
        nbytes = int(np.prod(shape, dtype=np.int64)) // kind.block * kind.size
        infos.append(TensorInfo(name, shape, kind, offset, nbytes))
        offset += -(-nbytes // alignment) * alignment
    return infos


def pad(file: BinaryIO, alignment: int = DEFAULT_ALIGNMENT) -> None:
    """Zeros up to the next multiple of `alignment`."""
    file.write(bytes(-file.tell() % alignment))
