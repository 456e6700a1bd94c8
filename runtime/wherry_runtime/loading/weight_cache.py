"""Packed weights on disk, so that a model is rounded and packed once and then only read.

A file holds every tensor of one model as it lies in memory, in the safetensors format. It is read into huge pages and
not mapped: the page cache has small pages, and every step of decoding would pay for them.

The cache may fail in any way and the model still loads: a file that is not exactly what is expected is not used, and is
written again; where that is impossible a line in the log says so.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from wherry_runtime.loading.checkpoint import read_header, shard_files
from wherry_runtime.parallel.shard import Shard
from wherry_runtime.quantization.storage import Storage

log = logging.getLogger(__name__)

LAYOUT = 2  # counts up when the same checkpoint would give other bytes
ALIGNMENT = 64
FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
PIECE = 64 << 20  # bytes in one read or write
TYPES = {torch.uint8: "U8", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


class WeightCacheError(Exception):
    """A cached file that cannot be used; the message says why."""


class WeightCache:
    """The cached file of one checkpoint in one format.

    Args:
        root: the cache's directory; made when something is written.
        directory: the checkpoint.
        storage: how its weights are held.
        shard: which part of them.
        arrangement: what else the bytes depend on: how the model has its checkpoint's tensors cut and ordered.

    Raises:
        ModelError: what is wrong with the checkpoint's files.
    """

    def __init__(self, root: Path, directory: Path, storage: Storage, shard: Shard, arrangement: str = "") -> None:
        self._key = _digest(directory, storage, shard, arrangement)
        name = re.sub(r"[^A-Za-z0-9._-]", "_", directory.resolve().name)[:64]
        self.path = root / f"{name}-{storage}-{self._key[:16]}.safetensors"

    def read(self, state: Mapping[str, torch.Tensor]) -> None:
        """Reads the file into the tensors of `state`.

        Raises:
            WeightCacheError: it cannot be used. `state` may then hold anything.
            FileNotFoundError: there is none.
        """
        began = time.monotonic()
        try:
            with self.path.open("rb", buffering=0) as file:
                checksums = self._check_header(file, state)
                for name, tensor in state.items():
                    _read(file, tensor)
                    if _checksum(tensor) != checksums[name]:
                        raise WeightCacheError(f"{name} is not what was written")
        except FileNotFoundError:
            raise
        except (OSError, ValueError, RecursionError) as e:
            raise WeightCacheError(str(e)) from e
        log.info("read packed weights from %s in %.1f s", self.path, time.monotonic() - began)

    def write(self, state: Mapping[str, torch.Tensor]) -> None:
        """Writes the file, whole or not at all. What goes wrong becomes a line in the log."""
        partial = self.path.with_suffix(".partial")
        began = time.monotonic()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(os.open(partial, FLAGS, 0o644), "wb", buffering=0) as file:
                if not _alone(file, partial):
                    log.info("another process writes %s", self.path)
                    return
                try:
                    self._write(file, state)
                    partial.replace(self.path)
                except BaseException:
                    with contextlib.suppress(OSError):
                        partial.unlink()
                    raise
            _sync_directory(self.path.parent)
        except OSError as e:
            log.warning("the packed weights were not kept: %s: %s", self.path, e.strerror or e)
            return
        log.info("wrote packed weights to %s in %.1f s", self.path, time.monotonic() - began)

    def _write(self, file: BinaryIO, state: Mapping[str, torch.Tensor]) -> None:
        header = _encoded(self._header(state, {name: _checksum(t) for name, t in state.items()}))
        file.truncate(0)
        size = len(header) + sum(t.nbytes for t in state.values())
        if (free := shutil.disk_usage(self.path.parent).free) < size:
            raise OSError(None, f"{size} bytes are needed and {free} are free")
        log.info("writing packed weights, %d MiB, to %s", size >> 20, self.path)
        _write_all(file, memoryview(header))
        for tensor in state.values():
            for piece in _pieces(tensor):
                _write_all(file, _view(piece.cpu()))
        os.fsync(file.fileno())

    def _check_header(self, file: BinaryIO, state: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """The checksums that the header tells, if it is the header of `state`."""
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise WeightCacheError("damaged or truncated")
        header = json.loads(file.read(length))
        metadata = header.get("__metadata__") if isinstance(header, dict) else None
        checksums = json.loads(metadata.get("checksums", "null")) if isinstance(metadata, dict) else None
        if (
            not isinstance(checksums, dict)
            or header != self._header(state, checksums)
            or checksums.keys() != state.keys()
        ):
            raise WeightCacheError("of another version or another model")
        if size != 8 + length + sum(t.nbytes for t in state.values()):
            raise WeightCacheError("damaged or truncated")
        return checksums

    def _header(self, state: Mapping[str, torch.Tensor], checksums: Mapping[str, int]) -> dict[str, Any]:
        header: dict[str, Any] = {
            "__metadata__": {"layout": str(LAYOUT), "key": self._key, "checksums": json.dumps(checksums)}
        }
        end = 0
        for name, tensor in state.items():
            begin, end = end, end + tensor.nbytes
            header[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        return header


def _digest(directory: Path, storage: Storage, shard: Shard, arrangement: str) -> str:
    """What the packed bytes depend on: the checkpoint's files (name, size, time, header), how they are held, in which
    order, and which part of them."""
    parts = [f"layout {LAYOUT}", storage.describe(), f"rank {shard.rank} of {shard.size}", arrangement]
    for path in shard_files(directory):
        stat = path.stat()
        parts.append(f"{path.name} {stat.st_size} {stat.st_mtime_ns} {hashlib.sha256(read_header(path)).hexdigest()}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _encoded(header: dict[str, Any]) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    data = _bytes(tensor)
    return (data[start : start + PIECE] for start in range(0, data.numel(), PIECE))


def _view(host: torch.Tensor) -> memoryview:
    array: npt.NDArray[np.uint8] = host.numpy()
    return array.data


def _checksum(tensor: torch.Tensor) -> int:
    """The sum of the 64-bit words, modulo 2⁶⁴: at the speed of memory, it sees what disks and interrupted copies do."""
    data = _bytes(tensor)
    whole = data.numel() // 8 * 8
    return int(data[:whole].view(torch.int64).sum()) + int(data[whole:].sum())


def _read(file: BinaryIO, tensor: torch.Tensor) -> None:
    for piece in _pieces(tensor):
        host = piece if piece.device.type == "cpu" else torch.empty(piece.shape, dtype=torch.uint8)
        view = _view(host)
        while view:
            if not (count := file.readinto(view)):  # type: ignore[attr-defined]  # unbuffered files have it
                raise WeightCacheError("ends early")
            view = view[count:]
        if host is not piece:
            piece.copy_(host)


def _write_all(file: BinaryIO, view: memoryview) -> None:
    while view:
        view = view[file.write(view) :]


def _alone(file: BinaryIO, path: Path) -> bool:
    """Locks `file` for as long as it is open. False: another process has it, or has just made it the final one."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
