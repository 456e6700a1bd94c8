"""Writes a GGUF file, or several that llama.cpp takes for one model (`-00001-of-00003.gguf`)."""

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from wherry_runtime.formats.conversion.output import Progress, appearing, finish, write_data
from wherry_runtime.formats.gguf.fields import Metadata
from wherry_runtime.formats.gguf.model import SPLIT_COUNT, SPLIT_TENSORS
from wherry_runtime.formats.gguf.reader import TensorInfo
from wherry_runtime.formats.gguf.types import GGMLType
from wherry_runtime.formats.gguf.writer import encoded_header, pad, planned
from wherry_runtime.loading.errors import ModelError

CHECKSUMS = "wherry.sha256"
# Which tensors the sums are of: tools that make another file of this one copy what they do not know.
LAYOUT = "wherry.layout"
SPLIT_NUMBER = "split.no"
_NO_SUM = "0" * 64
_MOST_PARTS = 65535  # the number of a part has 16 bits


class Written(NamedTuple):
    """A tensor to write; `data` gives its bytes in pieces."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    data: Callable[[], Iterable[npt.NDArray[np.uint8]]]


def layout_of(infos: Iterable[TensorInfo], data_start: int) -> str:
    """A digest of names, types, shapes and places, in hexadecimal."""
    lines = (f"{info.name} {info.type.name} {info.shape} {info.offset - data_start}" for info in infos)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def write_gguf(
    target: Path, metadata: Metadata, tensors: Sequence[Written], progress: Progress, part_size: int = 0
) -> list[Path]:
    """Writes the tensors, in order.

    Args:
        metadata: of the first part.
        progress: told how many bytes were written.
        part_size: bytes of tensors that a part has at most, unless one is larger; 0: one file.

    Returns: the files, `target` alone or its parts, the first of which appears last.

    Raises:
        ModelError: target_exists, no_space, bad_size or bad_weights.
    """
    parts = _divided(tensors, part_size)
    if len(parts) > _MOST_PARTS:
        raise ModelError("bad_size", f"{len(parts)} parts of {part_size} bytes are too many; let them be larger")
    targets = [target] if len(parts) == 1 else [_named(target, i, len(parts)) for i in range(len(parts))]
    infos = [planned(tensor[:3] for tensor in part) for part in parts]
    headers = [_metadata(metadata, i, placed, len(parts), len(tensors)) for i, placed in enumerate(infos)]
    sizes = [
        len(encoded_header(header, placed)) + placed[-1].offset + placed[-1].nbytes
        for header, placed in zip(headers, infos, strict=True)
    ]
    with contextlib.ExitStack() as stack:
        # The first asks for the room of all. It is entered first, and so takes its name last.
        needs = [sum(sizes), *sizes[1:]]
        partials = [stack.enter_context(appearing(path, need)) for path, need in zip(targets, needs, strict=True)]
        for partial, header, placed, part in zip(partials, headers, infos, parts, strict=True):
            _write(partial, header, placed, part, progress)
    return targets


def _divided(tensors: Sequence[Written], part_size: int) -> list[list[Written]]:
    parts: list[list[Written]] = [[]]
    size = 0
    for tensor, info in zip(tensors, planned(tensor[:3] for tensor in tensors), strict=True):
        if part_size and parts[-1] and size + info.nbytes > part_size:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += info.nbytes
    return parts


def _named(target: Path, index: int, count: int) -> Path:
    return target.with_name(f"{target.name.removesuffix('.gguf')}-{index + 1:05d}-of-{count:05d}.gguf")


def _metadata(metadata: Metadata, index: int, infos: list[TensorInfo], count: int, num_tensors: int) -> Metadata:
    """Of a part, with room for its checksums."""
    sums: Metadata = {CHECKSUMS: [_NO_SUM] * len(infos), LAYOUT: layout_of(infos, 0)}
    if count == 1:
        return metadata | sums
    own = metadata if index == 0 else {"general.architecture": metadata["general.architecture"]}
    numbers = {
        SPLIT_NUMBER: (index, np.uint16),
        SPLIT_COUNT: (count, np.uint16),
        SPLIT_TENSORS: (num_tensors, np.int32),
    }
    # Of the types that llama.cpp insists on.
    return own | sums | {key: np.array(number, dtype) for key, (number, dtype) in numbers.items()}


def _write(
    path: Path, metadata: Metadata, infos: list[TensorInfo], tensors: Sequence[Written], progress: Progress
) -> None:
    start = len(encoded_header(metadata, infos))
    with path.open("xb") as file:
        data = ((info.offset, tensor.data()) for info, tensor in zip(infos, tensors, strict=True))
        sums = write_data(file, data, start, progress)
        pad(file)
        finish(file, encoded_header({**metadata, CHECKSUMS: sums}, infos))
