"""Reads the headers of safetensors files, as strictly as the format is written down: tensors fill the data without gap
or overlap, and no name is there twice."""

import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from wherry_runtime.formats.mapped import open_mapped
from wherry_runtime.loading.errors import ModelError

LARGEST_HEADER = 100_000_000  # bytes; as the format says
MOST_DIMENSIONS = 32
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip


class TensorInfo(NamedTuple):
    """A tensor of the file; `offset` from the beginning of the file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int


class Header(NamedTuple):
    """What a file says before its data; `metadata` is its `__metadata__`."""

    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]
    data_start: int


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def parse_header(buffer: Any, size: int) -> Header:
    """The header at the beginning of `buffer` (bytes or a memory map), which is a file of `size` bytes.

    Raises:
        ModelError: bad_safetensors, saying what is wrong.
    """
    if size < 8:
        raise _bad(f"{size} bytes are no safetensors file")
    length = int.from_bytes(buffer[:8], "little")
    if length > min(LARGEST_HEADER, size - 8):
        raise _bad(f"its header takes {length} bytes, more than there are or than {LARGEST_HEADER}")
    text = bytes(buffer[8 : 8 + length])
    if not text.startswith(b"{"):
        raise _bad("its header is not a JSON object")
    metadata, entries = _decode(text)
    data_start = 8 + length
    tensors: dict[str, TensorInfo] = {}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        first, last = entry.data_offsets
        nbytes = _nbytes(name, entry)
        if first != end or last - first != nbytes:
            raise _bad(f"tensor {name!r}: {nbytes} bytes at [{first}, {last}] leave a gap, overlap or do not fit")
        end = last
        tensors[name] = TensorInfo(name, tuple(entry.shape), entry.dtype, data_start + first, nbytes)
    if data_start + end != size:
        raise _bad(f"its tensors end at byte {data_start + end} of a file of {size}: truncated?")
    return Header(metadata, tensors, data_start)


def _bad(why: str) -> ModelError:
    return ModelError("bad_safetensors", why)


def _decode(text: bytes) -> tuple[dict[str, str], dict[str, _Entry]]:
    # First into types, which takes little memory whatever is in there; then again to see names that are there twice.
    try:
        raw = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(raw.pop("__metadata__", msgspec.Raw(b"{}")), type=dict[str, str])
        entries = {name: msgspec.json.decode(value, type=_Entry) for name, value in raw.items()}
        json.loads(text, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as e:
        raise _bad(f"its header does not read: {e}") from None
    return metadata, entries


def _distinct(pairs: list[tuple[str, Any]]) -> None:
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("a name is there twice")


def _nbytes(name: str, entry: _Entry) -> int:
    if entry.dtype not in BITS:
        raise _bad(f"tensor {name!r}: dtype {entry.dtype!r} is not known")
    if len(entry.shape) > MOST_DIMENSIONS or any(n < 0 for n in (*entry.shape, *entry.data_offsets)):
        raise _bad(f"tensor {name!r}: its shape or its place is not possible")
    bits = math.prod(entry.shape) * BITS[entry.dtype]
    if bits % 8:
        raise _bad(f"tensor {name!r}: {bits} bits are not whole bytes")
    return bits // 8


@dataclass(frozen=True)
class SafetensorsFile:
    """An open file. Its tensors are views of the memory map, valid as long as this is."""

    path: Path
    header: Header
    data: mmap.mmap

    @classmethod
    def open(cls, path: Path) -> "SafetensorsFile":
        """Opens `path` and reads its header.

        Raises:
            ModelError: bad_safetensors or unreadable_file.
        """
        return cls(path, *open_mapped(path, "bad_safetensors", parse_header))

    def raw(self, info: TensorInfo) -> npt.NDArray[np.uint8]:
        """A tensor's bytes, not copied: [nbytes] uint8."""
        return np.frombuffer(self.data, np.uint8, info.nbytes, info.offset)
