"""A model in one GGUF file or in the parts of a split one, seen as the checkpoint that it was made from."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from wherry_runtime.formats.gguf.architectures import (
    FACTORS,
    Architecture,
    Config,
    architecture_of,
    checkpoint_tensors,
    norm_offset,
    rotated_heads,
    rows_from_neighbours,
)
from wherry_runtime.formats.gguf.blocks import dequantize
from wherry_runtime.formats.gguf.config import config_of
from wherry_runtime.formats.gguf.cursor import Value
from wherry_runtime.formats.gguf.reader import GGUFFile, TensorInfo
from wherry_runtime.formats.gguf.types import BY_NAME, GGMLType
from wherry_runtime.loading.errors import ModelError

SPLIT_COUNT, SPLIT_TENSORS = "split.count", "split.tensors.count"
_CONFIG_DTYPES = {"F32": "float32", "F16": "float16"}


class CheckpointTensor(NamedTuple):
    """A tensor under its name in a checkpoint; `raw` [nbytes] uint8 in rows as a checkpoint has them."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    raw: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class GGUFModel:
    """The files of one model, open.

    Attributes:
        metadata: of the first file.
        infos: of all tensors, by name in GGUF.
        config: what config.json would say.
    """

    files: list[GGUFFile]
    metadata: dict[str, Value]
    infos: dict[str, TensorInfo]
    config: Config

    @classmethod
    def open(cls, paths: list[Path]) -> "GGUFModel":
        """Opens the files, in order.

        Raises:
            ModelError: bad_gguf, or what is missing or not supported.
        """
        files = [GGUFFile.open(path) for path in paths]
        metadata = files[0].header.metadata
        infos: dict[str, TensorInfo] = {}
        for file in files:
            if double := infos.keys() & file.header.tensors.keys():
                raise ModelError("bad_gguf", f"{file.path}: tensor {min(double)} is in another part, too")
            infos |= file.header.tensors
        _check_split(files, len(infos))
        try:
            factors = _factors(files)
            config = config_of(metadata, infos, factors, _dtype(infos))
        except ModelError as e:
            raise ModelError(e.code, f"{paths[0]}: {e.message}") from None
        return cls(files, metadata, infos, config)

    def names(self) -> dict[str, TensorInfo]:
        """Name in a checkpoint → tensor, or its part of one that has all experts', in the order of the files.

        Raises:
            ModelError: unexpected_tensors.
        """
        found: dict[str, TensorInfo] = {}
        for info in self.infos.values():
            found |= checkpoint_tensors(self._architecture, info)
        return found

    @property
    def _architecture(self) -> Architecture:
        return architecture_of(self.metadata)

    def tensors(self) -> Iterator[CheckpointTensor]:
        """Each tensor, in the order of the files.

        Raises:
            ModelError: unexpected_tensors or wrong_shape.
        """
        return (self._read(name, info) for name, info in self.names().items())

    def read(self, name: str) -> CheckpointTensor:
        """The tensor that a checkpoint calls `name`.

        Raises:
            ModelError: wrong_shape.
            KeyError: there is none.
        """
        return self._read(name, self.names()[name])

    def _read(self, name: str, info: TensorInfo) -> CheckpointTensor:
        """`raw` is a view of the memory map, or a copy where rows change places or norms are of another kind."""
        file = next(f for f in self.files if info.name in f.header.tensors)
        raw = file.raw(info)
        if added := norm_offset(self._architecture, info.name):
            values = dequantize(raw, info.type) - np.float32(added)
            return CheckpointTensor(name, info.shape, BY_NAME["F32"], values.view(np.uint8))
        if heads := rotated_heads(self._architecture, info.name, self.config):
            rows = info.shape[0] if info.shape else 1
            if rows % (2 * heads):
                raise ModelError("wrong_shape", f"{file.path}: {info.name}: {rows} rows of {heads} heads")
            raw = raw.reshape(rows, -1)[rows_from_neighbours(rows, heads)].reshape(-1)
        return CheckpointTensor(name, info.shape, info.type, raw)


def _check_split(files: list[GGUFFile], num_tensors: int) -> None:
    metadata = files[0].header.metadata
    count, tensors = metadata.get(SPLIT_COUNT, 1), metadata.get(SPLIT_TENSORS, num_tensors)
    if count not in (0, len(files)):
        raise ModelError("missing_shard", f"{files[0].path}: is one of {count!r} parts and {len(files)} are there")
    if tensors != num_tensors:
        raise ModelError("missing_shard", f"{files[0].path}: {tensors!r} tensors are promised, {num_tensors} are there")


def _factors(files: list[GGUFFile]) -> dict[str, npt.NDArray[np.float32]]:
    found = ((file, info) for file in files for name, info in file.header.tensors.items() if name in FACTORS)
    return {info.name: dequantize(file.raw(info), info.type) for file, info in found}


def _dtype(infos: dict[str, TensorInfo]) -> str:
    """The float type that holds most of the model; bfloat16 for what is rounded to less."""
    sizes: dict[str, int] = {}
    for info in infos.values():
        sizes[info.type.name] = sizes.get(info.type.name, 0) + info.nbytes
    return _CONFIG_DTYPES.get(max(sizes, key=lambda name: sizes[name]), "bfloat16") if sizes else "bfloat16"
