"""A model to convert: its configuration and its tensors, whatever they are in."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from wherry_runtime.formats.detect import gguf_files
from wherry_runtime.formats.gguf.cursor import Value
from wherry_runtime.formats.gguf.fields import Config
from wherry_runtime.formats.gguf.model import GGUFModel
from wherry_runtime.formats.gguf.types import BY_NAME, BYTES, GGMLType
from wherry_runtime.formats.safetensors.reader import SafetensorsFile
from wherry_runtime.formats.safetensors.shards import IGNORED, indexed_files, safetensors_files
from wherry_runtime.loading.config import read_json
from wherry_runtime.loading.errors import ModelError

PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


class SourceTensor(NamedTuple):
    """A tensor of a checkpoint; `read` gives its bytes [nbytes] uint8, which need not be kept."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    read: Callable[[], npt.NDArray[np.uint8]]


@dataclass(frozen=True)
class Source:
    """A model that is open for reading.

    Attributes:
        path: where it is.
        config: what its config.json says or would say.
        tensors: all of them, under their names in a checkpoint.
        metadata: of a GGUF file; else None.
    """

    path: Path
    config: Config
    tensors: list[SourceTensor]
    metadata: dict[str, Value] | None = None


def open_source(path: Path, *, torch_bin: bool = False) -> Source:
    """The model at `path`: a GGUF file, or a directory with safetensors, GGUF or, if allowed, PyTorch files.

    Raises:
        ModelError: what is missing, damaged, or not allowed.
    """
    if files := gguf_files(path) if path.is_file() else []:
        return _gguf(path, files)
    if not path.is_dir():
        raise ModelError("model_not_found", f"{path}: neither a directory nor a GGUF file")
    if files := safetensors_files(path):
        return Source(path, read_json(path / "config.json"), _not_empty(path, _safetensors(files)))
    if files := gguf_files(path):
        return _gguf(path, files)
    if files := _pickles(path):
        if not torch_bin:
            raise ModelError(
                "pickle_not_allowed",
                f"{path}: has PyTorch pickles only ({files[0].name}). --allow-pickle reads them, tensors alone "
                "(weights_only); do so only with files whose origin you trust, or get the model as safetensors",
            )
        return Source(path, read_json(path / "config.json"), _not_empty(path, _torch(files)))
    raise ModelError("missing_weights", f"{path}: neither safetensors nor GGUF files are there")


def _not_empty(path: Path, tensors: Iterator[SourceTensor]) -> list[SourceTensor]:
    found: dict[str, SourceTensor] = {}
    for tensor in tensors:
        if IGNORED.search(tensor.name):
            continue
        if tensor.name in found:
            raise ModelError("bad_weights", f"{path}: tensor {tensor.name} is in two files")
        found[tensor.name] = tensor
    if not found:
        raise ModelError("missing_weights", f"{path}: there are no tensors")
    return list(found.values())


def _type(name: str, dtype: str) -> GGMLType:
    if dtype == BYTES.name:
        return BYTES
    if dtype not in BY_NAME:
        raise ModelError("unsupported_dtype", f"tensor {name}: {dtype} is not converted")
    return BY_NAME[dtype]


def _gguf(path: Path, files: list[Path]) -> Source:
    model = GGUFModel.open(files)
    tensors = [
        SourceTensor(name, part.shape, part.type, lambda name=name: model.read(name).raw)  # type: ignore[misc]
        for name, part in model.names.items()
    ]
    return Source(path, model.config, tensors, model.metadata)


def _safetensors(files: list[Path]) -> Iterator[SourceTensor]:
    for path in files:
        file = SafetensorsFile.open(path)
        for info in sorted(file.header.tensors.values(), key=lambda t: t.offset):
            raw = file.raw(info)
            yield SourceTensor(info.name, info.shape, _type(info.name, info.dtype), lambda raw=raw: raw)  # type: ignore[misc]


def _pickles(path: Path) -> list[Path]:
    if (path / PICKLE).is_file():
        return [path / PICKLE]
    return indexed_files(path, PICKLE_INDEX) if (path / PICKLE_INDEX).is_file() else []


def _torch(files: list[Path]) -> Iterator[SourceTensor]:
    import torch

    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
    for path in files:
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as e:  # torch raises many kinds
            raise ModelError("damaged_shard", f"{path}: PyTorch does not read it: {str(e)[:300]}") from None
        if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
            raise ModelError("damaged_shard", f"{path}: is not tensors by name")
        for name, tensor in state.items():
            dtype = names.get(tensor.dtype, str(tensor.dtype))
            yield SourceTensor(name, tuple(tensor.shape), _type(name, dtype), lambda t=tensor: _bytes(t))  # type: ignore[misc]


def _bytes(tensor: Any) -> npt.NDArray[np.uint8]:
    import torch

    flat: npt.NDArray[np.uint8] = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return flat
