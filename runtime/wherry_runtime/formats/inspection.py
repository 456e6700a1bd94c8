"""What is in a model's files, and whether it is what was written."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wherry_runtime.formats.conversion.gguf_files import CHECKSUMS as GGUF_CHECKSUMS
from wherry_runtime.formats.conversion.gguf_files import LAYOUT, layout_of
from wherry_runtime.formats.conversion.output import checksum_of
from wherry_runtime.formats.conversion.to_safetensors import CHECKSUMS
from wherry_runtime.formats.detect import gguf_files, kind_of
from wherry_runtime.formats.gguf.cursor import Value
from wherry_runtime.formats.gguf.reader import GGUFFile
from wherry_runtime.formats.safetensors.reader import SafetensorsFile
from wherry_runtime.formats.safetensors.shards import INDEX, safetensors_files
from wherry_runtime.loading.config import read_json
from wherry_runtime.loading.errors import ModelError


class Tensor(NamedTuple):
    """A tensor as a file has it."""

    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class File:
    """A file of a model.

    Attributes:
        sums: recorded SHA-256 of tensors, by name; none where none were recorded.
        open_file: what the tensors' bytes are read from.
    """

    path: Path
    format: str
    metadata: dict[str, Value]
    tensors: list[Tensor]
    sums: dict[str, str]
    open_file: GGUFFile | SafetensorsFile


def inspect(path: Path) -> list[File]:
    """The files of the model at `path`, or the file there, with their headers read and checked.

    Raises:
        ModelError: what is missing or damaged, or pickle_not_read.
    """
    return [_file(p) for p in _files(path)]


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        if files := safetensors_files(path) or gguf_files(path):
            return files
        raise ModelError("missing_weights", f"{path}: neither safetensors nor GGUF files are there")
    if not path.is_file():
        raise ModelError("model_not_found", f"{path}: no such file or directory")
    return gguf_files(path) or [path]


def _file(path: Path) -> File:
    kind = kind_of(path)
    if kind == "gguf":
        gguf = GGUFFile.open(path)
        header = gguf.header
        tensors = [Tensor(t.name, t.type.name, t.shape, t.nbytes) for t in header.tensors.values()]
        sums = header.metadata.get(GGUF_CHECKSUMS)
        own = header.metadata.get(LAYOUT) == layout_of(header.tensors.values(), header.data_start)
        recorded = dict(zip(header.tensors, sums, strict=False)) if own and isinstance(sums, list) else {}
        return File(path, f"GGUF v{header.version}", header.metadata, tensors, recorded, gguf)
    if kind == "torch":
        raise ModelError("pickle_not_read", f"{path}: is a PyTorch pickle; wherry convert --allow-pickle reads it")
    shard = SafetensorsFile.open(path)
    found = [Tensor(t.name, t.dtype, t.shape, t.nbytes) for t in shard.header.tensors.values()]
    metadata: dict[str, Value] = dict(shard.header.metadata)
    return File(path, "safetensors", metadata, found, _recorded(path, shard.header.metadata), shard)


def _recorded(path: Path, metadata: dict[str, str]) -> dict[str, str]:
    if CHECKSUMS not in metadata:
        return {}
    try:
        sums = json.loads(metadata[CHECKSUMS])
    except (ValueError, RecursionError):
        sums = None
    if not isinstance(sums, dict) or not all(isinstance(s, str) for s in sums.values()):
        raise ModelError("bad_safetensors", f"{path}: its recorded checksums do not read")
    return sums


def total_bytes(files: list[File]) -> int:
    """Of all tensors."""
    return sum(t.nbytes for file in files for t in file.tensors)


def verify(path: Path, files: list[File], progress: Callable[[int], None]) -> Iterator[str]:
    """What is wrong with the files that `inspect` found at `path`, beyond what it refuses: sums and the index."""
    for file in files:
        missing = file.sums.keys() - {t.name for t in file.tensors}
        yield from (f"{file.path}: {name} has a checksum and is not there" for name in sorted(missing))
        for info in file.open_file.header.tensors.values():
            total = checksum_of(file.open_file.raw(info), progress)  # type: ignore[arg-type]
            if file.sums.get(info.name, total) != total:
                yield f"{file.path}: {info.name} is not what was written (its SHA-256 differs)"
    if path.is_dir() and files and files[0].format == "safetensors" and (path / INDEX).is_file():
        yield from _index_problems(path, files)


def _index_problems(path: Path, files: list[File]) -> Iterator[str]:
    weight_map = read_json(path / INDEX).get("weight_map")
    named = weight_map if isinstance(weight_map, dict) else {}
    found = {t.name: file.path.name for file in files for t in file.tensors}
    for name in sorted(named.keys() | found.keys()):
        if named.get(name) != found.get(name):
            yield f"{path / INDEX}: {name} is in {found.get(name, 'no file')}, not in {named.get(name, 'the index')}"


def as_json(files: list[File]) -> list[dict[str, Any]]:
    """The same for programs; long arrays by their length."""
    return [
        {
            "path": str(file.path),
            "format": file.format,
            "metadata": {key: shown(value) for key, value in file.metadata.items()},
            "tensors": [t._asdict() for t in file.tensors],
            "checksums": len(file.sums),
        }
        for file in files
    ]


def shown(value: Value, longest: int = 8) -> Any:
    """A metadata value that a person or JSON can take: long arrays as their length."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list) and len(value) > longest:
        return f"[{len(value)} of {type(value[0]).__name__}]"
    return value
