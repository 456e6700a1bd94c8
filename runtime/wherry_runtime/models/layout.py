"""From our slots, named and cut as Llama's tensors, to those of a checkpoint that has them otherwise."""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch

from wherry_runtime.layers.linear import Slot, Slots
from wherry_runtime.loading.config import ModelConfig
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.quantization.fp4 import GROUP, unpack_mxfp4
from wherry_runtime.quantization.packed import Rows

LAYER = re.compile(r"(model\.layers)\.(\d+)\.(.+)\.([^.]+)")
QUERIES_AND_KEYS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.q_norm", "self_attn.k_norm")
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
EXPERT = re.compile(r"mlp\.experts\.\d+\.")

Fill = Callable[[torch.Tensor], object]


def checkpoint_slots(slots: Slots, config: ModelConfig) -> Slots:
    """`slots` by the checkpoint's names, each of which takes a tensor as the checkpoint has it.

    Raises:
        ModelError: unsupported_quantization, where a matrix that is to be cut or turned comes packed.
    """
    layers: dict[str, dict[str, Slot]] = {}
    result: Slots = {}
    for name, slot in slots.items():
        if (match := LAYER.fullmatch(name)) is None:
            module, _, kind = name.rpartition(".")
            result[f"{config.layout.names.get(module, module)}.{kind}"] = slot
        else:
            _, number, module, kind = match.groups()
            layers.setdefault(number, {})[f"{module}.{kind}"] = slot
    prefix = config.layout.names.get("model.layers", "model.layers")
    for number, own in layers.items():
        result |= {f"{prefix}.{number}.{name}": slot for name, slot in _Layer(config, own).slots()}
    return result


class _Layer:
    """The slots of one layer, by names within it."""

    def __init__(self, config: ModelConfig, slots: Slots) -> None:
        self._config = config
        self._layout = config.layout
        self._order = config.rope.order(config.head_dim) if config.rope is not None else None
        self._slots = {name: self._ordered(name, slot) for name, slot in slots.items()}

    def slots(self) -> Iterator[tuple[str, Slot]]:
        if self._config.experts is not None and self._config.experts.fused:
            yield from self._fused_experts().items()
        for fused, modules in self._layout.fused.items():
            for kind in ("weight", "bias"):
                yield from self._fused(f"{fused}.{kind}", [f"{module}.{kind}" for module in modules]).items()
        for name, slot in self._slots.items():
            module, _, kind = name.rpartition(".")
            own = self._layout.names.get(_pattern(module), module)
            if "{}" in own and "{}" not in _pattern(module):
                yield from _rows(f"{own}.{kind}", slot).items()
            else:
                yield f"{own.format(*re.findall(r'[0-9]+', module))}.{kind}", self._turned(slot)

    def _ordered(self, name: str, slot: Slot) -> Slot:
        """Queries and keys in the order that they are rotated in."""
        module, _, kind = name.rpartition(".")
        if module not in QUERIES_AND_KEYS or self._order is None:
            return slot
        _plain_only(kind, self._config)
        dim, order = self._config.head_dim, torch.tensor(self._order)

        def fill(tensor: torch.Tensor) -> object:
            if "norm" in module:
                return slot.fill(tensor[..., order])
            heads = tensor.reshape(-1, dim, *tensor.shape[1:])
            return slot.fill(heads[:, order].reshape(tensor.shape))

        return Slot(slot.shape, fill)

    def _turned(self, slot: Slot) -> Slot:
        if not self._layout.transposed or len(slot.shape) != 2:
            return slot
        return Slot(slot.shape[::-1], lambda tensor: slot.fill(tensor.t()))

    def _fused(self, name: str, parts: list[str]) -> Slots:
        """One slot for all of `parts`, or none where there are none."""
        slots = [self._slots.pop(part, None) for part in parts]
        if slots[0] is None:
            return {}
        held = [slot for slot in slots if slot is not None]
        sizes = [slot.shape[0] for slot in held]

        def fill(rows: Rows) -> None:
            for slot, part in zip(held, cut(rows), strict=True):
                slot.fill(part)

        def cut(rows: Rows) -> Iterable[Rows]:
            if not isinstance(rows, torch.Tensor):
                ends = list(itertools.accumulate(sizes))
                return [rows[end - size : end, :] for end, size in zip(ends, sizes, strict=True)]
            return self._grouped(rows) if self._layout.grouped and len(held) == len(QKV) else torch.split(rows, sizes)

        return {name: self._turned(Slot((sum(sizes), *held[0].shape[1:]), fill))}

    def _grouped(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values, where each key head comes with its own queries before it."""
        heads, kv_heads, dim = self._config.num_heads, self._config.num_kv_heads, self._config.head_dim
        group, rest = heads // kv_heads, tensor.shape[1:]
        split = tensor.reshape(kv_heads, group + 2, dim, *rest)
        parts = (split[:, :group], split[:, group], split[:, group + 1])
        return tuple(part.reshape(-1, *rest) for part in parts)

    def _fused_experts(self) -> Slots:
        """All experts' matrices in one tensor, as GPT-OSS has them."""
        own = {name: self._slots.pop(name) for name in list(self._slots) if EXPERT.match(name)}
        experts = self._config.experts
        if experts is None or not own:
            return {}
        count, inner, hidden = experts.num_experts, experts.intermediate_size, self._config.hidden_size

        def gate_up(kind: str, tensor: torch.Tensor) -> None:  # [experts, 2 inner, …]
            for index in range(count):
                own[f"mlp.experts.{index}.gate_proj.{kind}"].fill(tensor[index, ::2])
                own[f"mlp.experts.{index}.up_proj.{kind}"].fill(tensor[index, 1::2])

        def down(kind: str, tensor: torch.Tensor) -> None:  # [experts, hidden, …]
            for index in range(count):
                own[f"mlp.experts.{index}.down_proj.{kind}"].fill(tensor[index])

        slots: Slots = {}
        for name, outputs, inputs, fill in (("gate_up", 2 * inner, hidden, gate_up), ("down", hidden, inner, down)):
            module = f"mlp.experts.{name}_proj"
            slots[f"{module}_bias"] = Slot((count, outputs), _kind(fill, "bias"))
            if experts.packed:
                slots |= _mxfp4(module, (count, outputs, inputs), _kind(fill, "weight"))
            else:
                slots[module] = Slot((count, inputs, outputs), _transposed(_kind(fill, "weight")))
        return slots


def _kind(fill: Callable[[str, torch.Tensor], object], kind: str) -> Fill:
    return lambda tensor: fill(kind, tensor)


def _transposed(fill: Fill) -> Fill:
    return lambda tensor: fill(tensor.transpose(-1, -2))


def _pattern(module: str) -> str:
    return re.sub(r"[0-9]+", "{}", module)


def _mxfp4(name: str, shape: tuple[int, int, int], fill: Fill) -> Slots:
    experts, outputs, inputs = shape
    groups = math.ceil(inputs / GROUP)
    shapes = {
        f"{name}_blocks": (experts, outputs, groups, GROUP // 2),
        f"{name}_scales": (experts, outputs, groups),
    }

    def unpacked(found: Mapping[str, torch.Tensor]) -> object:
        blocks, scales = found.values()
        return fill(unpack_mxfp4(blocks.flatten(-2), scales))

    return _collected(shapes, unpacked)


def _rows(name: str, slot: Slot) -> Slots:
    """A slot for each row of `slot`."""
    shapes = {name.format(index): slot.shape[1:] for index in range(slot.shape[0])}
    return _collected(shapes, lambda found: slot.fill(torch.stack(list(found.values()))))


def _collected(shapes: Mapping[str, tuple[int, ...]], use: Callable[[Mapping[str, torch.Tensor]], object]) -> Slots:
    """Slots that keep what comes, until all of it is there to be used, in the order of `shapes`."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Fill:
        def fill(tensor: torch.Tensor) -> None:
            found[name] = tensor.clone()
            if len(found) == len(shapes):
                use({n: found[n] for n in shapes})
                found.clear()

        return fill

    return {name: Slot(shape, keep(name)) for name, shape in shapes.items()}


def _plain_only(kind: str, config: ModelConfig) -> None:
    if kind not in ("weight", "bias"):
        raise ModelError(
            "unsupported_quantization",
            f"{config.architecture}: queries and keys that come packed cannot be put in order; use a float checkpoint",
        )
