"""GGUF files as a checkpoint: its config.json, and its tensors in PyTorch."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wherry_runtime.formats.detect import gguf_files
from wherry_runtime.formats.gguf.blocks import dequantized_pieces
from wherry_runtime.formats.gguf.model import CheckpointTensor, GGUFModel
from wherry_runtime.loading.config import read_json

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def raw_config(path: Path) -> tuple[dict[str, Any], Path]:
    """What config.json says, and the file that said it: that of the directory, or the metadata of a GGUF file.

    Raises:
        ModelError: missing_file, bad_json, bad_gguf, or what is missing or not supported.
    """
    file = path / "config.json"
    if not file.is_file() and (files := gguf_files(path)):
        return GGUFModel.open(files).config, files[0]
    return read_json(file), file


@dataclass(frozen=True)
class GGUFCheckpoint:
    """An open model in GGUF files."""

    model: GGUFModel

    @classmethod
    def open(cls, paths: list[Path]) -> "GGUFCheckpoint":
        """Opens the files.

        Raises:
            ModelError: as `GGUFModel.open`.
        """
        return cls(GGUFModel.open(paths))

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each tensor with its name in a checkpoint, copied: floats as they are, others as float32.

        Raises:
            ModelError: as `GGUFModel.tensors`.
        """
        for tensor in self.model.tensors():
            yield tensor.name, _copied(tensor)


def _copied(tensor: CheckpointTensor) -> torch.Tensor:
    out = torch.empty(tensor.shape, dtype=_PLAIN.get(tensor.type.name, torch.float32))
    flat = out.view(-1)
    if tensor.type.name in _PLAIN:
        flat.view(torch.uint8).numpy()[:] = tensor.raw
        return out
    done, values = 0, flat.numpy()
    for piece in dequantized_pieces(tensor.raw, tensor.type):
        values[done : done + piece.size] = piece
        done += piece.size
    return out
