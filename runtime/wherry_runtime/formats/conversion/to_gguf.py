"""Any model into a GGUF file."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from wherry_runtime.formats.conversion.output import Progress, appearing, converted, finish, write_data
from wherry_runtime.formats.conversion.source import Source, SourceTensor
from wherry_runtime.formats.gguf.architectures import (
    ROPE_FACTORS,
    architecture_for,
    gguf_name,
    metadata_of,
    rotated_heads,
    rows_to_neighbours,
)
from wherry_runtime.formats.gguf.blocks.encode import ENCODE
from wherry_runtime.formats.gguf.cursor import Value
from wherry_runtime.formats.gguf.reader import TensorInfo
from wherry_runtime.formats.gguf.types import BY_NAME, FILE_TYPES, GGMLType
from wherry_runtime.formats.gguf.writer import encoded_header, pad, planned
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.tokenization.to_gguf import tokenizer_metadata

CHECKSUMS = "wherry.sha256"
# Which tensors the sums are of: tools that make another file of this one copy what they do not know.
LAYOUT = "wherry.layout"
_NO_SUM = "0" * 64
_CARRIED = ("tokenizer.", "general.")
_FLOATS = ("F32", "F16", "BF16")
# What llama.cpp wants of the head: it decides each token, and takes little of the model.
_HEAD_TYPE = "Q6_K"


class _Planned(NamedTuple):
    source: SourceTensor
    name: str
    type: GGMLType
    heads: int  # whose rows change places; 0: none


def to_gguf(source: Source, target: Path, wanted: GGMLType | None, progress: Progress) -> dict[str, int]:
    """Writes the model to the file `target`.

    Args:
        wanted: of matrices; None: what they are in.
        progress: told how many bytes were written.

    Returns: how many tensors there are of each type.

    Raises:
        ModelError: what cannot be converted, or written.
    """
    if wanted is not None and wanted.name not in ENCODE:
        raise ModelError("unknown_type", f"{wanted.name} is read only; written are {', '.join(ENCODE)}")
    metadata, factors = metadata_of(source.config)
    plan = _plan(source, wanted)
    metadata |= _described(source, plan)
    tensors: list[tuple[str, tuple[int, ...], GGMLType]] = [(p.name, p.source.shape, p.type) for p in plan]
    if factors is not None:
        tensors.append((ROPE_FACTORS, factors.shape, BY_NAME["F32"]))
    infos = planned(tensors)
    metadata |= {CHECKSUMS: [_NO_SUM] * len(infos), LAYOUT: layout_of(infos, 0)}
    start = len(encoded_header(metadata, infos))
    with appearing(target, start + infos[-1].offset + infos[-1].nbytes) as partial, partial.open("xb") as file:
        data: Iterator[Iterable[npt.NDArray[np.uint8]]] = (_bytes(p) for p in plan)
        if factors is not None:
            data = itertools.chain(data, [[factors.view(np.uint8)]])
        offsets = (info.offset for info in infos)
        metadata[CHECKSUMS] = write_data(file, zip(offsets, data, strict=True), start, progress)
        pad(file)
        finish(file, encoded_header(metadata, infos))
    return {name: sum(i.type.name == name for i in infos) for name in dict.fromkeys(i.type.name for i in infos)}


def layout_of(infos: Iterable[TensorInfo], data_start: int) -> str:
    """A digest of names, types, shapes and places, in hexadecimal."""
    lines = (f"{info.name} {info.type.name} {info.shape} {info.offset - data_start}" for info in infos)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _plan(source: Source, wanted: GGMLType | None) -> list[_Planned]:
    architecture = architecture_for(source.config)
    heads = {
        "num_attention_heads": source.config["num_attention_heads"],
        "num_key_value_heads": source.config.get("num_key_value_heads") or source.config["num_attention_heads"],
    }
    names = [(tensor, gguf_name(tensor.name)) for tensor in source.tensors]
    if source.config.get("tie_word_embeddings"):
        names = [(tensor, name) for tensor, name in names if name != "output.weight"]
    head = "output.weight" if any(name == "output.weight" for _, name in names) else "token_embd.weight"
    return [
        _Planned(t, name, _target_type(t, wanted, is_head=name == head), rotated_heads(architecture, name, heads))
        for t, name in names
    ]


def _target_type(tensor: SourceTensor, wanted: GGMLType | None, *, is_head: bool) -> GGMLType:
    """What a tensor becomes: vectors stay float32, and rows that are not whole blocks take a type with smaller ones."""
    if len(tensor.shape) < 2:
        return BY_NAME["F32"]
    if wanted is None:
        return BY_NAME["F32"] if tensor.type.name == "F64" else tensor.type
    if is_head and wanted.bits < BY_NAME[_HEAD_TYPE].bits:
        wanted = BY_NAME[_HEAD_TYPE]
    candidates = [wanted.name] if wanted.name in _FLOATS else [wanted.name, "Q8_0", "F16"]
    return next(BY_NAME[name] for name in candidates if tensor.shape[-1] % BY_NAME[name].block == 0)


def _described(source: Source, plan: list[_Planned]) -> dict[str, Value]:
    """Name, file type, tokenizer and chat template: carried along from GGUF, or read from a checkpoint's files."""
    carried: dict[str, Value] = {}
    if source.metadata is not None:
        carried = {k: v for k, v in source.metadata.items() if k.startswith(_CARRIED)}
        carried.pop("general.alignment", None)
    else:
        carried = tokenizer_metadata(source.path, source.config)
    sizes: dict[str, int] = {}
    for p in plan:
        sizes[p.type.name] = sizes.get(p.type.name, 0) + int(np.prod(p.source.shape))
    mostly = max(sizes, key=lambda name: sizes[name])
    carried.setdefault("general.name", source.path.resolve().stem)
    described: dict[str, Value] = {"general.type": "model", "general.quantization_version": 2}
    described |= carried
    described.pop("general.file_type", None)
    if mostly in FILE_TYPES:
        described["general.file_type"] = FILE_TYPES[mostly]
    described["general.architecture"] = architecture_for(source.config).name
    return described


def _bytes(planned_tensor: _Planned) -> Iterator[npt.NDArray[np.uint8]]:
    tensor = planned_tensor.source
    raw = tensor.read()
    if planned_tensor.heads:
        rows = tensor.shape[0]
        if rows % (2 * planned_tensor.heads):
            raise ModelError("wrong_shape", f"{tensor.name}: {rows} rows of {planned_tensor.heads} heads")
        raw = raw.reshape(rows, -1)[rows_to_neighbours(rows, planned_tensor.heads)].reshape(-1)
    return converted(raw, tensor.type, planned_tensor.type)
