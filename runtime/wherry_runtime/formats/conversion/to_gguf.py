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
    architecture_for,
    gguf_name,
    norm_offset,
    rotated_heads,
    rows_to_neighbours,
)
from wherry_runtime.formats.gguf.blocks import dequantize
from wherry_runtime.formats.gguf.blocks.encode import ENCODE, encode
from wherry_runtime.formats.gguf.config import metadata_of
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
    sources: list[SourceTensor]  # one, or those of all experts, which become one
    name: str
    shape: tuple[int, ...]
    type: GGMLType
    heads: int  # whose rows change places; 0: none
    offset: float  # added to each element


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
    tensors: list[tuple[str, tuple[int, ...], GGMLType]] = [(p.name, p.shape, p.type) for p in plan]
    tensors += [(name, values.shape, BY_NAME["F32"]) for name, values in factors.items()]
    infos = planned(tensors)
    metadata |= {CHECKSUMS: [_NO_SUM] * len(infos), LAYOUT: layout_of(infos, 0)}
    start = len(encoded_header(metadata, infos))
    with appearing(target, start + infos[-1].offset + infos[-1].nbytes) as partial, partial.open("xb") as file:
        data: Iterator[Iterable[npt.NDArray[np.uint8]]] = (_bytes(p) for p in plan)
        data = itertools.chain(data, ([values.view(np.uint8)] for values in factors.values()))
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
    found: dict[str, dict[int | None, SourceTensor]] = {}
    for tensor in source.tensors:
        name, index = gguf_name(architecture, tensor.name)
        found.setdefault(name, {})[index] = tensor
    if architecture.tied or source.config.get("tie_word_embeddings"):
        found.pop("output.weight", None)
    head = "output.weight" if "output.weight" in found else "token_embd.weight"
    plan = []
    for name, tensors in found.items():
        first, shape = next(iter(tensors.values())), _shape(name, tensors)
        kind = _target_type(first, wanted, is_head=name == head, router="ffn_gate_inp" in name)
        ordered = [tensors[index] for index in sorted(tensors, key=lambda i: i or 0)]
        moved, added = rotated_heads(architecture, name, heads), norm_offset(architecture, name)
        plan.append(_Planned(ordered, name, shape, kind, moved, added))
    return plan


def _shape(name: str, tensors: dict[int | None, SourceTensor]) -> tuple[int, ...]:
    """Of a tensor of GGUF that is made of these."""
    shapes = {tensor.shape for tensor in tensors.values()}
    if len(shapes) > 1 or (None not in tensors and set(tensors) != set(range(len(tensors)))):
        raise ModelError("bad_weights", f"{name}: experts are missing, or of several shapes")
    (shape,) = shapes
    if name.endswith("ffn_gate_inp_shexp.weight"):
        return shape[1:]  # a gate's only row
    return shape if None in tensors else (len(tensors), *shape)


def _target_type(tensor: SourceTensor, wanted: GGMLType | None, *, is_head: bool, router: bool) -> GGMLType:
    """What a tensor becomes: vectors stay float32, and rows that are not whole blocks take a type with smaller ones."""
    if len(tensor.shape) < 2 or (router and (wanted is not None or tensor.shape[0] == 1)):
        return BY_NAME["F32"]  # what decides between experts, too
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
        sizes[p.type.name] = sizes.get(p.type.name, 0) + int(np.prod(p.shape))
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
    for tensor in planned_tensor.sources:
        raw = tensor.read()
        if planned_tensor.offset:
            yield encode(dequantize(raw, tensor.type) + np.float32(planned_tensor.offset), planned_tensor.type)
            continue
        if planned_tensor.heads:
            rows = tensor.shape[0]
            if rows % (2 * planned_tensor.heads):
                raise ModelError("wrong_shape", f"{tensor.name}: {rows} rows of {planned_tensor.heads} heads")
            raw = raw.reshape(rows, -1)[rows_to_neighbours(rows, planned_tensor.heads)].reshape(-1)
        yield from converted(raw, tensor.type, planned_tensor.type)
