"""Writing what becomes whole at once or not at all."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from wherry_runtime.formats.gguf.blocks import dequantized_pieces
from wherry_runtime.formats.gguf.blocks.encode import encode
from wherry_runtime.formats.gguf.types import GGMLType
from wherry_runtime.loading.errors import ModelError

_PIECE = 16 << 20  # bytes that are written, and hashed, at a time
Progress = Callable[[int], None]


@contextlib.contextmanager
def appearing(target: Path, needed: int) -> Iterator[Path]:
    """A path beside `target` to write to, which takes its name at the end; removed when anything goes wrong.

    Args:
        needed: bytes that there must be room for.

    Raises:
        ModelError: target_exists or no_space.
    """
    if target.exists():
        raise ModelError("target_exists", f"{target}: is there already; remove it or write elsewhere")
    target.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(target.parent).free) < needed:
        raise ModelError("no_space", f"{target.parent}: {needed} bytes are needed and {free} are free")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.rename(partial, target)
        _sync(target.parent)
    except BaseException:
        _remove(partial)
        raise


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def converted(raw: npt.NDArray[np.uint8], own: GGMLType, wanted: GGMLType) -> Iterator[npt.NDArray[np.uint8]]:
    """The bytes of a tensor in another type, in pieces; in its own, as they are.

    Raises:
        ModelError: bad_weights, where the type cannot hold the values.
    """
    if own == wanted:
        yield from (raw[start : start + _PIECE] for start in range(0, raw.size, _PIECE))
        return
    for values in dequantized_pieces(raw, own):
        yield encode(values, wanted)


def write_data(
    file: BinaryIO, tensors: Iterable[tuple[int, Iterable[npt.NDArray[np.uint8]]]], start: int, progress: Progress
) -> list[str]:
    """Writes tensors (offset from `start`, pieces of bytes) and returns each one's SHA-256 in hexadecimal.

    Args:
        progress: told how many bytes were written.
    """
    sums = []
    for offset, pieces in tensors:
        file.write(bytes(start + offset - file.tell()))
        checksum = hashlib.sha256()
        for piece in pieces:
            view = np.ascontiguousarray(piece).data
            checksum.update(view)
            file.write(view)
            progress(len(view))
        sums.append(checksum.hexdigest())
    return sums


def finish(file: BinaryIO, header: bytes) -> None:
    """Puts the header in its place, which was left zero, once the data are on disk: what ends early has none."""
    file.flush()
    os.fsync(file.fileno())
    file.seek(0)
    file.write(header)
    file.flush()
    os.fsync(file.fileno())


def checksum_of(raw: npt.NDArray[Any], progress: Progress) -> str:
    """SHA-256 of a tensor's bytes, in hexadecimal."""
    checksum = hashlib.sha256()
    for start in range(0, raw.size, _PIECE):
        piece = raw[start : start + _PIECE]
        checksum.update(np.ascontiguousarray(piece).data)
        progress(piece.size)
    return checksum.hexdigest()
