"""Writes a quantized checkpoint, a file at a time: whatever has its name is whole."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from wherry_runtime.formats.safetensors.shards import IGNORED, INDEX
from wherry_runtime.loading.checkpoint import shard_files
from wherry_runtime.loading.config import read_json
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.loading.loader import AnyDecoder, whole_name

KEPT = ("*.json", "*.model", "*.jinja", "*.txt", "LICENSE*", "README*")


class Source:
    """The checkpoint that is quantized; tensors are read when asked for.

    Args:
        model: what the checkpoint is of. Some leave out what all names begin with; here names are whole.
    """

    def __init__(self, directory: Path, model: AnyDecoder) -> None:
        self.directory = directory
        self._layout = model.config.layout
        self._known = frozenset(model.slots())
        self._files: dict[str, tuple[Path, str]] = {}
        for path in shard_files(directory):
            with safe_open(path, framework="pt") as shard:
                self._files.update({self._whole(name): (path, name) for name in shard.keys()})  # noqa: SIM118

    @property
    def names(self) -> list[str]:
        """Of all tensors, in order, but those that nobody reads."""
        return sorted(name for name in self._files if not IGNORED.search(name))

    def read(self, name: str) -> torch.Tensor:
        """A tensor of its own memory.

        Raises:
            ModelError: missing_tensors.
        """
        if name not in self._files:
            raise ModelError("missing_tensors", f"{self.directory}: the checkpoint lacks {name}")
        path, own = self._files[name]
        with safe_open(path, framework="pt") as shard:
            tensor: torch.Tensor = shard.get_tensor(own).clone()
        return tensor

    def matrix(self, name: str) -> torch.Tensor:
        """A matrix in layers, by its name without `.weight`: [outputs, inputs]."""
        return self.turned(self.read(f"{name}.weight"))

    def turned(self, matrix: torch.Tensor) -> torch.Tensor:
        """From how the checkpoint has matrices in layers to [outputs, inputs], or back."""
        return matrix.t().contiguous() if self._layout.transposed else matrix

    def _whole(self, name: str) -> str:
        return whole_name(name, self._known, self._layout)


def shard_name(number: int, count: int) -> str:
    """Of file `number`, from 0."""
    return f"model-{number + 1:05}-of-{count:05}.safetensors"


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata={"format": "pt"})
    partial.replace(path)


def write_rest(source: Path, directory: Path, shards: Iterable[Path], quantization: dict[str, Any] | None) -> None:
    """Index, config.json and what else belongs to a model: tokenizer, templates, licence."""
    weight_map: dict[str, str] = {}
    size = 0
    for path in shards:
        size += path.stat().st_size
        with safe_open(path, framework="pt") as shard:
            weight_map.update(dict.fromkeys(shard.keys(), path.name))
    for path in sorted({file for pattern in KEPT for file in source.glob(pattern)}):
        if path.name not in ("config.json", INDEX):
            shutil.copy(path, directory / path.name)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    config = read_json(source / "config.json")
    if quantization is not None:
        config["quantization_config"] = quantization
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
