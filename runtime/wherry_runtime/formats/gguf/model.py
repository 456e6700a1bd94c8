"""A model in one GGUF file or in the parts of a split one, seen as the checkpoint that it was made from."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from wherry_runtime.formats.gguf.architectures import architecture_of
from wherry_runtime.formats.gguf.blocks import dequantize
from wherry_runtime.formats.gguf.config import config_of
from wherry_runtime.formats.gguf.cursor import Value
from wherry_runtime.formats.gguf.fields import Config
from wherry_runtime.formats.gguf.names import FACTORS, Part, parts_of
from wherry_runtime.formats.gguf.reader import GGUFFile, TensorInfo
from wherry_runtime.formats.gguf.types import GGMLType
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

    @cached_property
    def names(self) -> dict[str, Part]:
        """Name in a checkpoint → tensor, in the order of the files.

        Raises:
            ModelError: unexpected_tensors, missing_tensors or wrong_shape.
        """
        return parts_of(architecture_of(self.metadata, self.infos), self.infos, self.config)

    def tensors(self) -> Iterator[CheckpointTensor]:
        """Each tensor, in the order of the files.

        Raises:
            ModelError: as `names`.
        """
        return (self._read(name, part) for name, part in self.names.items())

    def read(self, name: str) -> CheckpointTensor:
        """The tensor that a checkpoint calls `name`.

        Raises:
            ModelError: wrong_shape.
            KeyError: there is none.
        """
        return self._read(name, self.names[name])

    def _read(self, name: str, part: Part) -> CheckpointTensor:
        """`raw` is a view of the memory map, or a copy where it lies otherwise in a checkpoint."""
        raws = [self._file(info).raw(info) for info in part.stored]
        if part.fused is not None:
            return CheckpointTensor(name, part.shape, part.type, part.fused(raws))
        try:
            raw = part.change.back(raws[0], part.shape, part.stored[0].type)
        except ModelError as e:
            raise ModelError(e.code, f"{self.files[0].path}: {part.stored[0].name}: {e.message}") from None
        return CheckpointTensor(name, part.shape, part.type, raw)

    def _file(self, info: TensorInfo) -> GGUFFile:
        return next(f for f in self.files if info.name in f.header.tensors)


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
