"""GGUF files as a checkpoint: its config.json, and its tensors in PyTorch."""

from collections import Counter
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from wherry_runtime.formats.detect import gguf_files
from wherry_runtime.formats.gguf.blocks import Blocks, dequantize, dequantized_pieces
from wherry_runtime.formats.gguf.blocks.parts import HELD, taken_apart
from wherry_runtime.formats.gguf.model import CheckpointTensor, GGUFModel
from wherry_runtime.formats.gguf.types import GGMLType
from wherry_runtime.loading.config import read_json
from wherry_runtime.quantization.formats import Format, joined, padded_inputs
from wherry_runtime.quantization.packed import Rows
from wherry_runtime.quantization.super_blocks import SuperBlocks

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}


def raw_config(path: Path) -> tuple[dict[str, Any], Path]:
    """What config.json says, and the file that said it: that of the directory, or the metadata of a GGUF file.

    Raises:
        ModelError: missing_file, bad_json, bad_gguf, or what is missing or not supported.
    """
    file = path / "config.json"
    if not file.is_file() and (files := gguf_files(path)):
        return GGUFModel.open(files).config, files[0]
    return read_json(file), file


@dataclass(frozen=True, slots=True)
class BlockRows:
    """Some columns of rows in blocks of a type that the engine computes with as it is (`HELD`).

    Attributes:
        raw: [N, bytes] uint8, whole rows; a view of the file.
        columns: of the rows, a slice from … to.
    """

    raw: Blocks
    type: GGMLType
    columns: slice

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.raw), self.columns.stop - self.columns.start

    def __getitem__(self, index: tuple[slice | torch.Tensor, slice]) -> "BlockRows":
        """Some rows, from one to another or by their numbers (int64), and some columns."""
        rows, columns = index
        start, stop, _ = columns.indices(self.shape[1])
        first = self.columns.start
        raw = self.raw[rows.numpy() if isinstance(rows, torch.Tensor) else rows]
        return replace(self, raw=raw, columns=slice(first + start, first + stop))

    def dequantized(self) -> torch.Tensor:
        """[N, K] float32."""
        values = dequantize(np.ascontiguousarray(self.raw).reshape(-1), self.type).reshape(len(self.raw), -1)
        return torch.from_numpy(values)[:, self.columns]

    def fits(self, format_: Format) -> bool:
        """Whether a matrix in `format_` holds exactly this."""
        step = format_.block or format_.group
        return bool(step) and not self.columns.start % step and joined([HELD[self.type.name], format_]) == format_

    def packed(self, format_: Format) -> tuple[torch.Tensor, torch.Tensor | SuperBlocks]:
        """Codes [N, Kp] int8 and scales: float16 [N, Kp / group], or those of super-blocks."""
        parts = taken_apart(np.ascontiguousarray(self.raw).reshape(-1, self.type.size), self.type.name)
        rows, padding = len(self.raw), padded_inputs(self.shape[1]) - self.shape[1]

        def whole(values: np.ndarray[Any, Any] | None) -> torch.Tensor | None:
            return None if values is None else torch.from_numpy(np.ascontiguousarray(values)).view(rows, -1)

        def cut(values: torch.Tensor, width: int) -> torch.Tensor:
            return values[:, self.columns.start // width : -(-self.columns.stop // width)]

        codes, d, scales, d_min, minima = map(whole, parts)
        if codes is None or d is None or scales is None:
            raise TypeError(f"{self.type.name} has no codes or scales")
        inside = functional.pad(codes[:, self.columns], (0, padding))
        if not format_.two_level:
            return inside, functional.pad(cut(d, format_.group), (0, padding // format_.group))
        held = SuperBlocks(codes, d, scales, d_min, minima).held_in(format_)
        block, group = format_.block, format_.group
        return inside, SuperBlocks(
            *(inside, cut(held.d, block), cut(held.scales, group)),
            None if held.d_min is None else cut(held.d_min, block),
            None if held.minima is None else cut(held.minima, group),
        )


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

    def formats(self) -> dict[str, Format]:
        """Each matrix, without `.weight`, whose blocks one of the engine's formats holds exactly."""
        return {
            name.removesuffix(".weight"): HELD[info.type.name]
            for name, info in self.model.names.items()
            if info.type.name in HELD and len(info.shape) == 2 and name.endswith(".weight")
        }

    def describe(self, held: Mapping[str, Format], dtype: torch.dtype) -> str:
        """One line: which types are held how."""
        counts: Counter[str] = Counter()
        for name, info in self.model.names.items():
            if len(info.shape) < 2 or info.type.name in _PLAIN:
                continue
            format_ = held.get(name.removesuffix(".weight"))
            how = str(dtype).removeprefix("torch.") if format_ is None else f"{format_} as it is"
            counts[f"{info.type.name} in {how}"] += 1
        return "; ".join(f"{count} of {how}" for how, count in sorted(counts.items())) or "no matrix is in blocks"

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each tensor with its name in a checkpoint, copied: floats as they are, others as float32.

        Raises:
            ModelError: as `GGUFModel.tensors`.
        """
        return ((tensor.name, _copied(tensor)) for tensor in self.model.tensors())

    def rows(self, held: Container[str]) -> Iterator[tuple[str, Rows]]:
        """The same, but those matrices (by name, without `.weight`) that are `held` in blocks are not copied.

        Raises:
            ModelError: as `GGUFModel.tensors`.
        """
        for tensor in self.model.tensors():
            if tensor.name.removesuffix(".weight") in held:
                rows, columns = tensor.shape
                yield tensor.name, BlockRows(tensor.raw.reshape(rows, -1), tensor.type, slice(0, columns))
            else:
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
