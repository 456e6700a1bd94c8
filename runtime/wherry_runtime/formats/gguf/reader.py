"""Reads GGUF files, versions 2 and 3, from a memory map.

A header may say anything: every count, length, offset, type and dimension is checked against the size of the file
before memory is taken or a byte read for it. What parsing takes is bounded by the header's own size.
"""

import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from wherry_runtime.formats.gguf.cursor import LONGEST_KEY, Buffer, Cursor, Value
from wherry_runtime.formats.gguf.types import GGMLType, type_of
from wherry_runtime.formats.mapped import open_mapped
from wherry_runtime.loading.errors import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT_KEY = "general.alignment"
DEFAULT_ALIGNMENT = 32
LARGEST_ALIGNMENT = 1 << 20
LARGEST_HEADER = 512 << 20  # bytes; vocabularies of 256,000 tokens with their merges take 20 million
MOST_DIMENSIONS = 4
_LEAST_VALUE = 8 + 4 + 1  # bytes: key length, type, the smallest value
_LEAST_TENSOR = 8 + 4 + 4 + 8  # bytes: name length, number of dimensions, type, offset


class TensorInfo(NamedTuple):
    """A tensor of the file.

    Attributes:
        shape: row-major, the last dimension contiguous: the reverse of how the file has it.
        offset: of its first byte, from the beginning of the file.
        nbytes: that it takes.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    offset: int
    nbytes: int


class Header(NamedTuple):
    """What a file says before its data."""

    version: int
    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]
    alignment: int
    data_start: int


def parse_header(buffer: Buffer, size: int) -> Header:
    """The header at the beginning of `buffer`, which is a file of `size` bytes.

    Raises:
        ModelError: bad_gguf, saying what is wrong and where.
    """
    cursor = Cursor(buffer, min(size, LARGEST_HEADER))
    start = cursor.need(4, "the magic")
    if bytes(buffer[start : start + 4]) != MAGIC:
        raise cursor.fail("it does not begin with GGUF")
    version = int(cursor.number("<I", "the version"))
    if version not in VERSIONS:
        hint = "; big-endian files are not read" if version and not version & 0xFFFF else ""
        raise cursor.fail(f"version {version} is not read; 2 and 3 are{hint}")
    num_tensors = cursor.count("tensors", _LEAST_TENSOR)
    num_values = cursor.count("metadata values", _LEAST_VALUE)
    metadata: dict[str, Value] = {}
    for _ in range(num_values):
        key = cursor.string("a key", LONGEST_KEY)
        if key in metadata:
            raise cursor.fail(f"key {key!r} is there twice")
        metadata[key] = cursor.value(key)
    alignment = _alignment(cursor, metadata)
    infos = [_tensor_info(cursor, alignment, size) for _ in range(num_tensors)]
    data_start = -(-cursor.at // alignment) * alignment
    return Header(version, metadata, _placed(cursor, infos, data_start, size), alignment, data_start)


def _alignment(cursor: Cursor, metadata: dict[str, Value]) -> int:
    alignment = metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= LARGEST_ALIGNMENT or alignment & (alignment - 1):
        raise cursor.fail(f"{ALIGNMENT_KEY} is {alignment!r}; a power of two up to {LARGEST_ALIGNMENT} is expected")
    return alignment


def _tensor_info(cursor: Cursor, alignment: int, size: int) -> TensorInfo:
    """The next one, with its offset still from the beginning of the data."""
    name = cursor.string("a tensor's name", LONGEST_KEY)
    num_dimensions = int(cursor.number("<I", name))
    if num_dimensions > MOST_DIMENSIONS:
        raise cursor.fail(f"tensor {name!r} has {num_dimensions} dimensions; at most {MOST_DIMENSIONS} are allowed")
    shape = tuple(int(cursor.number("<Q", name)) for _ in range(num_dimensions))[::-1]
    try:
        kind = type_of(int(cursor.number("<I", name)))
    except ModelError as e:
        raise cursor.fail(f"tensor {name!r}: {e.message}") from None
    offset = int(cursor.number("<Q", name))
    row = shape[-1] if shape else 1
    if 0 in shape or row % kind.block:
        raise cursor.fail(f"tensor {name!r}: shape {list(shape)} is not whole blocks of {kind.block} ({kind.name})")
    nbytes = math.prod(shape) // kind.block * kind.size
    if nbytes > size or offset > size or offset % alignment:
        raise cursor.fail(f"tensor {name!r}: {nbytes} bytes at {offset} of the data are not where they can be")
    return TensorInfo(name, shape, kind, offset, nbytes)


def _placed(cursor: Cursor, infos: list[TensorInfo], data_start: int, size: int) -> dict[str, TensorInfo]:
    """By name, with offsets from the beginning of the file; each inside it and none over another."""
    tensors: dict[str, TensorInfo] = {}
    for info in infos:
        if info.name in tensors:
            raise cursor.fail(f"tensor {info.name!r} is there twice")
        tensors[info.name] = info._replace(offset=data_start + info.offset)
    end = data_start
    for info in sorted(tensors.values(), key=lambda t: t.offset):
        if info.offset < end:
            raise cursor.fail(f"tensor {info.name!r} overlaps the one before it")
        end = info.offset + info.nbytes
        if end > size:
            raise cursor.fail(f"tensor {info.name!r} ends at byte {end} of a file of {size}: truncated?")
    return tensors


@dataclass(frozen=True)
class GGUFFile:
    """An open file. Its tensors are views of the memory map, valid as long as this is."""

    path: Path
    header: Header
    data: mmap.mmap

    @classmethod
    def open(cls, path: Path) -> "GGUFFile":
        """Opens `path` and reads its header.

        Raises:
            ModelError: bad_gguf or unreadable_file.
        """
        return cls(path, *open_mapped(path, "bad_gguf", parse_header))

    def raw(self, info: TensorInfo) -> npt.NDArray[np.uint8]:
        """A tensor's bytes, not copied: [nbytes] uint8."""
        return np.frombuffer(self.data, np.uint8, info.nbytes, info.offset)
