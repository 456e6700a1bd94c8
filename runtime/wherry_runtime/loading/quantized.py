"""Checkpoints that were quantized before: GPTQ, AWQ, compressed-tensors, FP8, bitsandbytes."""

from collections import Counter
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from wherry_runtime.formats.safetensors.shards import IGNORED
from wherry_runtime.loading.checkpoint import shard_files
from wherry_runtime.loading.config import read_json
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.quantization.formats import Format
from wherry_runtime.quantization.grouped import Grouped
from wherry_runtime.quantization.layouts import kinds_of
from wherry_runtime.quantization.layouts.base import Kind, UnsupportedLayoutError


class _Parts(Mapping[str, torch.Tensor]):
    """The tensors of one matrix by suffix, each read when it is asked for."""

    def __init__(self, files: "_Files", name: str, suffixes: tuple[str, ...]) -> None:
        self._files = files
        self._name = name
        self._suffixes = [s for s in suffixes if f"{name}.{s}" in files.paths]

    def __getitem__(self, suffix: str) -> torch.Tensor:
        return self._files.read(f"{self._name}.{suffix}")

    def __contains__(self, suffix: object) -> bool:
        return suffix in self._suffixes

    def __iter__(self) -> Iterator[str]:
        return iter(self._suffixes)

    def __len__(self) -> int:
        return len(self._suffixes)


class _Files:
    """All tensors of a checkpoint, by name. Those of the mapped file are views of it."""

    def __init__(self, directory: Path) -> None:
        self._open: dict[Path, Any] = {}
        self.paths: dict[str, Path] = {}
        for path in shard_files(directory):
            try:
                self._open[path] = shard = safe_open(path, framework="pt")
                names: list[str] = shard.keys()  # type: ignore[no-untyped-call]
                self.paths.update(dict.fromkeys(names, path))
            except (SafetensorError, OSError) as e:
                raise ModelError("damaged_shard", f"{path}: damaged or truncated ({e}); copy it again") from e

    def read(self, name: str) -> torch.Tensor:
        try:
            tensor: torch.Tensor = self._open[self.paths[name]].get_tensor(name)
        except (SafetensorError, OSError) as e:
            raise ModelError("damaged_shard", f"{self.paths[name]}: damaged ({e}); copy it again") from e
        return tensor


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A checkpoint with a `quantization_config`.

    Attributes:
        method: its name.
    """

    directory: Path
    method: str
    _files: _Files
    _matrices: dict[str, Kind]

    @classmethod
    def of(cls, directory: Path) -> "QuantizedCheckpoint | None":
        """The one in `directory`; None if it is not quantized.

        Raises:
            ModelError: unsupported_quantization, or what is wrong with the files.
        """
        path = directory / "config.json"
        config = read_json(path).get("quantization_config") if path.is_file() else None
        if config is None:
            return None
        try:
            kinds = kinds_of(config)
        except UnsupportedLayoutError as e:
            raise ModelError("unsupported_quantization", f"{path}: quantization_config: {e}") from e
        files = _Files(directory)
        found: dict[str, Kind] = {}
        for kind in kinds:
            ending = f".{kind.suffixes[0]}"
            for name in files.paths:
                matrix = name.removesuffix(ending)
                if matrix != name and all(f"{matrix}.{s}" in files.paths for s in kind.suffixes):
                    found.setdefault(matrix, kind)
        return cls(directory, str(config["quant_method"]), files, found)

    def formats(self) -> dict[str, Format]:
        """Each matrix that one of the engine's formats holds exactly, without its codes being read."""
        with _explained(self.directory):
            found = {name: kind.format(self._parts(name)) for name, kind in self._matrices.items()}
        return {name: format_ for name, format_ in found.items() if format_ is not None}

    def ternary(self) -> dict[str, Format]:
        """Matrices of -1, 0 and 1, in the format that takes the least memory, which PyTorch unpacks in each step."""
        of = [name for name, kind in self._matrices.items() if kind.ternary]
        with _explained(self.directory):
            found = {name: self._matrices[name].format(self._parts(name)) for name in of}
        return {name: Format("ternary", format_.group) for name, format_ in found.items() if format_ is not None}

    def describe(self, held: Mapping[str, Format], dtype: torch.dtype) -> str:
        """One line: what is held how."""
        counts = Counter(str(format_) for format_ in held.values())
        parts = [f"{count} matrices as they are, in {name}" for name, count in sorted(counts.items())]
        if widened := len(self._matrices) - len(held):
            parts.append(f"{widened} in {str(dtype).removeprefix('torch.')}, which takes that type's memory")
        return f"quantized by {self.method}; held are {' and '.join(parts) or 'no matrices'}"

    def tensors(self, wanted: Container[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Each tensor that is not quantized.

        Args:
            wanted: names that the model has. Biases that are all zero and that it has no place for are left out: some
                writers add them.
        """
        consumed = {f"{n}.{s}" for n, k in self._matrices.items() for s in (*k.suffixes, *k.optional, *k.unused)}
        for name in self._files.paths:
            if name in consumed or IGNORED.search(name):
                continue
            tensor = self._files.read(name)
            extra = name not in wanted and name.removesuffix(".bias") in self._matrices
            if not (extra and not tensor.any()):
                yield name, tensor

    def matrices(self) -> Iterator[tuple[str, torch.Tensor | Grouped]]:
        """Each matrix [outputs, inputs], as an unquantized checkpoint names it."""
        for name, kind in self._matrices.items():
            with _explained(self.directory, name):
                matrix = kind.read(self._parts(name))
            yield f"{name}.weight", matrix

    def _parts(self, name: str) -> _Parts:
        kind = self._matrices[name]
        return _Parts(self._files, name, (*kind.suffixes, *kind.optional))


class _explained:
    """Turns what tensors of odd shapes raise into an error that names the matrix."""

    def __init__(self, directory: Path, name: str = "a matrix") -> None:
        self._what = f"{directory}: {name}"

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (ValueError, RuntimeError, IndexError, KeyError, TypeError, ZeroDivisionError)):
            raise ModelError("bad_weights", f"{self._what} is not what its quantization says: {error}") from error
