"""GPT-OSS's experts (https://arxiv.org/abs/2508.10925): a checkpoint has gate and up projections of all experts of a
layer in one tensor, columns alternating, in MXFP4 or as floats; GGUF has three tensors [experts, outputs, inputs]."""

import re
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from wherry_runtime.formats.gguf.blocks import dequantize
from wherry_runtime.formats.gguf.changes import Raw, Shape
from wherry_runtime.formats.gguf.reader import TensorInfo
from wherry_runtime.formats.gguf.types import BY_NAME, BYTES, GGMLType
from wherry_runtime.loading.errors import ModelError

Join = Callable[[list[Raw]], Raw]
Read = Callable[[], Raw]
# Shape and type of what comes of some tensors, and how.
Joined = tuple[Shape, GGMLType, tuple[TensorInfo, ...], Join]
# Name, shape, type, and what reads it.
Tensor = tuple[str, Shape, GGMLType, Read]
_ONE = re.compile(r"(.+\.experts)\.(gate|up|down)_proj\.(weight|bias)")
_FUSED = re.compile(r"(.+\.experts)\.(gate_up|down)_proj(_bias|_blocks|_scales|)")
_PARTS = {"gate_up": ("gate", "up"), "down": ("down",)}
_MXFP4, _F32 = BY_NAME["MXFP4"], BY_NAME["F32"]
_GROUP = _MXFP4.block


def is_one(name: str) -> bool:
    """Whether it is one of the three, or of their biases, in a checkpoint's words."""
    return _ONE.fullmatch(name) is not None


def packed(infos: Iterable[TensorInfo]) -> bool:
    """Whether the experts of a file (by their names there) are all in MXFP4."""
    kinds = {info.type.name for info in infos if info.name.endswith("_exps.weight")}
    return kinds == {"MXFP4"}


def joined(experts: dict[str, TensorInfo]) -> dict[str, Joined]:
    """The tensors of a checkpoint that these make, which are named by what they would be alone.

    Raises:
        ModelError: missing_tensors or wrong_shape.
    """
    in_mxfp4 = packed(experts.values())
    modules = dict.fromkeys(name.partition(".experts.")[0] + ".experts" for name in experts)
    found: dict[str, Joined] = {}
    for module in modules:
        for fused, parts in _PARTS.items():
            name = f"{module}.{fused}_proj"
            found[f"{name}_bias"] = _bias([_get(experts, f"{module}.{part}_proj.bias") for part in parts])
            stored = [_get(experts, f"{module}.{part}_proj.weight") for part in parts]
            if len({info.shape for info in stored}) > 1 or len(stored[0].shape) != 3:
                raise ModelError("wrong_shape", f"{stored[0].name}: {list(stored[0].shape)} is not its neighbour's")
            found |= _blocks(name, stored) if in_mxfp4 else {name: _floats(stored)}
    return found


def _get(experts: dict[str, TensorInfo], name: str) -> TensorInfo:
    if (info := experts.get(name)) is None:
        raise ModelError("missing_tensors", f"the file lacks {name}")
    return info


def _bias(stored: list[TensorInfo]) -> Joined:
    if len({info.shape for info in stored}) > 1 or len(stored[0].shape) != 2:
        raise ModelError("wrong_shape", f"{stored[0].name}: {list(stored[0].shape)} is not its neighbour's")
    experts, outputs = stored[0].shape
    kinds = [info.type for info in stored]

    def join(raws: list[Raw]) -> Raw:
        values = [dequantize(raw, kind).reshape(experts, outputs) for raw, kind in zip(raws, kinds, strict=True)]
        return np.stack(values, axis=-1).reshape(-1).view(np.uint8)

    return (experts, outputs * len(stored)), _F32, tuple(stored), join


def _floats(stored: list[TensorInfo]) -> Joined:
    """[experts, outputs, inputs] each → [experts, inputs, all outputs]."""
    experts, outputs, inputs = stored[0].shape
    plain = all(info.type == stored[0].type and info.type.block == 1 for info in stored)
    kind = stored[0].type if plain else _F32

    def join(raws: list[Raw]) -> Raw:
        cells = [
            (raw if plain else dequantize(raw, info.type).view(np.uint8)).reshape(experts, outputs, inputs, kind.size)
            for raw, info in zip(raws, stored, strict=True)
        ]
        return np.stack([c.swapaxes(1, 2) for c in cells], axis=3).reshape(-1)

    return (experts, inputs, outputs * len(stored)), kind, tuple(stored), join


def _blocks(name: str, stored: list[TensorInfo]) -> dict[str, Joined]:
    """Codes [experts, outputs, groups, 16] and scales [experts, outputs, groups]."""
    experts, outputs, inputs = stored[0].shape
    shape = (experts, outputs * len(stored), inputs // _GROUP)

    def join(raws: list[Raw], taken: Callable[[Raw], Raw]) -> Raw:
        cells = [taken(raw.reshape(-1, _MXFP4.size)).reshape(experts, outputs, -1) for raw in raws]
        return np.stack(cells, axis=2).reshape(-1)

    return {
        f"{name}_blocks": (
            *((*shape, _GROUP // 2), BYTES, tuple(stored)),
            lambda raws: join(raws, lambda blocks: _neighbours(blocks[:, 1:])),
        ),
        f"{name}_scales": (shape, BYTES, tuple(stored), lambda raws: join(raws, lambda blocks: blocks[:, 0])),
    }


def _neighbours(halves: Raw) -> Raw:
    """Codes of 32 inputs, [n, 16] bytes: first and second half in each byte's halves → neighbours there."""
    codes = np.concatenate([halves & 15, halves >> 4], axis=1)
    packed_codes: Raw = codes[:, ::2] | codes[:, 1::2] << 4
    return packed_codes


def _halves(neighbours: Raw) -> Raw:
    """The other way."""
    codes = np.stack([neighbours & 15, neighbours >> 4], axis=2).reshape(len(neighbours), _GROUP)
    packed_codes: Raw = codes[:, : _GROUP // 2] | codes[:, _GROUP // 2 :] << 4
    return packed_codes


def separated(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """A checkpoint's tensors, those of fused experts as the three that GGUF has; others as they are.

    Raises:
        ModelError: bad_weights.
    """
    scales: dict[str, Tensor] = {}
    given = list(tensors)
    for tensor in given:
        if (match := _FUSED.fullmatch(tensor[0])) and match[3] == "_scales":
            scales[f"{match[1]}.{match[2]}"] = tensor
    for tensor in given:
        match = _FUSED.fullmatch(tensor[0])
        if match is None:
            yield tensor
        elif match[3] != "_scales":
            count = len(_PARTS[match[2]])
            for index, part in enumerate(_PARTS[match[2]]):
                name = f"{match[1]}.{part}_proj"
                if match[3] == "_bias":
                    yield _bias_of(f"{name}.bias", tensor, index, count)
                elif match[3] == "_blocks":
                    yield _blocks_of(f"{name}.weight", tensor, scales.get(f"{match[1]}.{match[2]}"), index, count)
                else:
                    yield _floats_of(f"{name}.weight", tensor, index, count)


def _bias_of(name: str, tensor: Tensor, index: int, count: int) -> Tensor:
    _, shape, kind, read = tensor
    _check(tensor, 2, shape[-1] % count == 0)
    cells = (*shape, kind.size)
    return (
        *(name, (shape[0], shape[1] // count), kind),
        lambda: np.ascontiguousarray(read().reshape(cells)[:, index::count]).reshape(-1),
    )


def _floats_of(name: str, tensor: Tensor, index: int, count: int) -> Tensor:
    _, shape, kind, read = tensor
    _check(tensor, 3, kind.block == 1 and shape[-1] % count == 0)
    cells = (*shape, kind.size)
    return (
        *(name, (shape[0], shape[2] // count, shape[1]), kind),
        lambda: np.ascontiguousarray(read().reshape(cells)[:, :, index::count].swapaxes(1, 2)).reshape(-1),
    )


def _blocks_of(name: str, tensor: Tensor, scales: Tensor | None, index: int, count: int) -> Tensor:
    _, shape, kind, read = tensor
    _check(tensor, 4, kind == BYTES and shape[-1] == _GROUP // 2 and shape[1] % count == 0)
    if scales is None or scales[1] != shape[:-1] or scales[2] != BYTES:
        raise ModelError("bad_weights", f"{tensor[0]}: has no scales of its shape")

    def blocks() -> Raw:
        codes = read().reshape(shape)[:, index::count].reshape(-1, _GROUP // 2)
        powers = scales[3]().reshape(shape[:-1])[:, index::count].reshape(-1, 1)
        return np.concatenate([powers, _halves(codes)], axis=1).reshape(-1)

    return name, (shape[0], shape[1] // count, shape[2] * _GROUP), _MXFP4, blocks


def _check(tensor: Tensor, dimensions: int, fits: bool) -> None:
    if len(tensor[1]) != dimensions or not fits:
        raise ModelError("bad_weights", f"{tensor[0]}: {tensor[2].name} of {list(tensor[1])} is not GPT-OSS's")
