"""Any model into a GGUF file."""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from wherry_runtime.formats.conversion.gguf_files import Written, write_gguf
from wherry_runtime.formats.conversion.output import Progress, converted
from wherry_runtime.formats.conversion.source import Source, SourceTensor
from wherry_runtime.formats.gguf.architectures import architecture_for
from wherry_runtime.formats.gguf.blocks.encode import ENCODE
from wherry_runtime.formats.gguf.changes import Change
from wherry_runtime.formats.gguf.config import metadata_of
from wherry_runtime.formats.gguf.cursor import Value
from wherry_runtime.formats.gguf.fields import Metadata
from wherry_runtime.formats.gguf.fused_experts import separated
from wherry_runtime.formats.gguf.names import change_of, gguf_name
from wherry_runtime.formats.gguf.particular import POOLING
from wherry_runtime.formats.gguf.types import BY_NAME, FILE_TYPES, GGMLType
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.tokenization.to_gguf import tokenizer_metadata

_CARRIED = ("tokenizer.", "general.")
_FLOATS = ("F32", "F16", "BF16")
# What llama.cpp wants of the head: it decides each token, and takes little of the model.
_HEAD_TYPE = "Q6_K"
# What llama.cpp computes with in float32 only, beside vectors and what is no module's weight.
_PLAIN = ("position_embd.weight", "token_types.weight", "ssm_conv1d.weight")


class _Planned(NamedTuple):
    sources: list[SourceTensor]  # one, or those of all experts, which become one
    name: str
    shape: tuple[int, ...]
    type: GGMLType
    change: Change


def to_gguf(
    source: Source, target: Path, wanted: GGMLType | None, progress: Progress, part_size: int = 0
) -> dict[str, int]:
    """Writes the model to the file `target`.

    Args:
        wanted: of matrices; None: what they are in.
        progress: told how many bytes were written.
        part_size: bytes of tensors after which there is another file; 0: one file.

    Returns: how many tensors there are of each type.

    Raises:
        ModelError: what cannot be converted, or written.
    """
    if wanted is not None and wanted.name not in ENCODE:
        raise ModelError("unknown_type", f"{wanted.name} is read only; written are {', '.join(ENCODE)}")
    metadata, factors = metadata_of(source.config)
    plan = _plan(source, wanted)
    metadata |= _described(source, plan) | _pooling(source)
    tensors = [Written(p.name, p.shape, p.type, partial(_bytes, p)) for p in plan]
    tensors += [
        Written(name, values.shape, BY_NAME["F32"], partial(iter, [values.view(np.uint8)]))
        for name, values in factors.items()
    ]
    write_gguf(target, metadata, tensors, progress, part_size)
    return dict(Counter(tensor.type.name for tensor in tensors))


def _plan(source: Source, wanted: GGMLType | None) -> list[_Planned]:
    architecture = architecture_for(source.config)
    found: dict[str, dict[int | None, SourceTensor]] = {}
    fused = architecture.experts is not None and architecture.experts.fused
    tensors = [SourceTensor(*tensor) for tensor in separated(source.tensors)] if fused else source.tensors
    for tensor in tensors:
        if (named := gguf_name(architecture, tensor.name)) is not None:
            found.setdefault(named[0], {})[named[1]] = tensor
    if architecture.tied or source.config.get("tie_word_embeddings"):
        found.pop("output.weight", None)
    head = "output.weight" if "output.weight" in found else "token_embd.weight"
    plan = []
    for name, several in found.items():
        change, one = change_of(architecture, name, source.config), _one(name, several)
        shape = change.shape(one.shape)
        kind = _target_type(name, shape, change.held(one.type), wanted, is_head=name == head)
        ordered = [several[index] for index in sorted(several, key=lambda i: i or 0)]
        plan.append(_Planned(ordered, name, shape if None in several else (len(several), *shape), kind, change))
    return plan


def _one(name: str, tensors: dict[int | None, SourceTensor]) -> SourceTensor:
    """Of those that a tensor of GGUF is made of."""
    shapes = {tensor.shape for tensor in tensors.values()}
    if len(shapes) > 1 or (None not in tensors and set(tensors) != set(range(len(tensors)))):
        raise ModelError("bad_weights", f"{name}: experts are missing, or of several shapes")
    return next(iter(tensors.values()))


def _target_type(
    name: str, shape: tuple[int, ...], own: GGMLType, wanted: GGMLType | None, *, is_head: bool
) -> GGMLType:
    """What a tensor becomes: vectors stay float32, and rows that are not whole blocks take a type with smaller ones."""
    router = "ffn_gate_inp" in name and (wanted is not None or len(shape) < 2)  # decides between experts
    if len(shape) < 2 or router or name.endswith(_PLAIN) or not name.endswith(".weight"):
        return BY_NAME["F32"]
    if wanted is None:
        return BY_NAME["F32"] if own.name == "F64" else own
    if is_head and wanted.bits < BY_NAME[_HEAD_TYPE].bits:
        wanted = BY_NAME[_HEAD_TYPE]
    candidates = [wanted.name] if wanted.name in _FLOATS else [wanted.name, "Q8_0", "F16"]
    return next(BY_NAME[name] for name in candidates if shape[-1] % BY_NAME[name].block == 0)


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


def _pooling(source: Source) -> Metadata:
    """How an embedding model makes a vector of a text's rows."""
    if not architecture_for(source.config).own.pooled:
        return {}
    # Imported late: it needs torch, and whoever converts another model does not.
    from wherry_runtime.embedding.pooling import read_pooling

    kind = read_pooling(source.path, source.config).kind
    number = next((number for number, name in POOLING.items() if name == kind), None)
    if number is None:
        raise ModelError("unsupported_pooling", f"pooling by {kind} cannot be said in GGUF")
    return {f"{architecture_for(source.config).name}.pooling_type": number}


def _bytes(planned_tensor: _Planned) -> Iterator[npt.NDArray[np.uint8]]:
    change = planned_tensor.change
    for tensor in planned_tensor.sources:
        try:
            raw = change.there(tensor.read(), tensor.shape, tensor.type)
        except ModelError as e:
            raise ModelError(e.code, f"{tensor.name}: {e.message}") from None
        yield from converted(raw, change.held(tensor.type), planned_tensor.type)
