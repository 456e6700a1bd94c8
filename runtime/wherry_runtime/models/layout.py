"""From our slots, named and cut as Llama's tensors, to those of a checkpoint that has them otherwise."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch

from wherry_runtime.layers.linear import Slot, Slots
from wherry_runtime.loading.config import ModelConfig
from wherry_runtime.quantization.fp4 import GROUP, unpack_mxfp4
from wherry_runtime.quantization.packed import Rows

LAYER = re.compile(r"(model\.layers)\.(\d+)\.(.+)\.([^.]+)")
QUERIES_AND_KEYS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.q_norm", "self_attn.k_norm")
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
EXPERT = re.compile(r"mlp\.experts\.\d+\.")

Fill = Callable[[torch.Tensor], object]


def checkpoint_slots(slots: Slots, config: ModelConfig) -> Slots:
    """`slots` by the checkpoint's names, each of which takes a tensor as the checkpoint has it."""
    layers: dict[str, dict[str, Slot]] = {}
    result: Slots = {}
    for name, slot in slots.items():
        if (match := LAYER.fullmatch(name)) is None:
            module, _, kind = name.rpartition(".")
            result[f"{config.layout.names.get(module, module)}.{kind}"] = slot
        else:
            _, number, module, kind = match.groups()
            layers.setdefault(number, {})[f"{module}.{kind}"] = slot
    prefix = layer_prefix(config)
    for number, own in layers.items():
        result |= {f"{prefix}{number}.{name}": slot for name, slot in _Layer(config, own).slots()}
    return result


def layer_prefix(config: ModelConfig) -> str:
    """What the checkpoint's names of all tensors in layers begin with; the layer's number follows."""
    return config.layout.names.get("model.layers", "model.layers") + "."


class Origin(NamedTuple):
    """Where the rows of a matrix lie in the checkpoint.

    Attributes:
        name: of the checkpoint's matrix, without `.weight`.
        rows: [N] int64: its rows, outputs of the product, in the order in which they are held.
    """

    name: str
    rows: torch.Tensor


def origins(slots: Slots, config: ModelConfig) -> dict[str, Origin]:
    """Our name of each matrix in layers (without `.weight`) → where it comes from.

    What is to be known is how the checkpoint's tensors are cut and ordered, and that is what `checkpoint_slots` does:
    so it is shown the numbers of rows instead of the rows.

    Args:
        slots: of matrices, by our names; none of experts that lie in one tensor.
    """
    numbers: dict[str, torch.Tensor] = {}  # of the rows that each of our matrices took

    def noting(own: str, slot: Slot) -> Slot:
        return Slot(slot.shape, lambda rows: numbers.update({own.removesuffix(".weight"): rows.flatten()}))

    found: dict[str, Origin] = {}
    for key, slot in checkpoint_slots({own: noting(own, slot) for own, slot in slots.items()}, config).items():
        # One column stands for all of a matrix.
        if config.layout.transposed:
            slot.fill(torch.arange(slot.shape[1])[None])
        else:
            slot.fill(torch.arange(slot.shape[0])[:, None])
        found |= {own: Origin(key.removesuffix(".weight"), rows) for own, rows in numbers.items()}
        numbers.clear()
    return found


def vector_name(own: str, config: ModelConfig) -> str:
    """The checkpoint's name of a tensor in a layer that is in no other one, such as a norm's weights."""
    if (match := LAYER.fullmatch(own)) is None:
        return own
    _, number, module, kind = match.groups()
    return f"{layer_prefix(config)}{number}.{config.layout.names.get(module, module)}.{kind}"


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
        module, _, _ = name.rpartition(".")
        if module not in QUERIES_AND_KEYS or self._order is None:
            return slot
        dim, order = self._config.head_dim, torch.tensor(self._order)
        if "norm" in module:
            return Slot(slot.shape, lambda tensor: slot.fill(tensor[..., order]))
        heads = torch.arange(slot.shape[0]).view(-1, dim)
        return Slot(slot.shape, lambda rows: slot.fill(_taken(rows, heads[:, order])))

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
        total = sum(slot.shape[0] for slot in held)
        numbers = torch.arange(total)
        in_groups = self._layout.grouped and len(held) == len(QKV)
        own = self._grouped(numbers) if in_groups else torch.split(numbers, [slot.shape[0] for slot in held])

        def fill(rows: Rows) -> None:
            for slot, part in zip(held, own, strict=True):
                slot.fill(_taken(rows, part))

        return {name: self._turned(Slot((total, *held[0].shape[1:]), fill))}

    def _grouped(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """Queries', keys' and values' rows, where each key head comes with its own queries before it."""
        kv_heads = self._config.num_kv_heads
        group = self._config.num_heads // kv_heads
        split = rows.view(kv_heads, group + 2, self._config.head_dim)
        return [part.flatten() for part in (split[:, :group], split[:, group], split[:, group + 1])]

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


def _taken(rows: Rows, index: torch.Tensor) -> Rows:
    """Some rows, in the order of `index` (int64, any shape): a view, where they lie side by side."""
    index = index.flatten()
    first, count = int(index[0]), len(index)
    if torch.equal(index, torch.arange(first, first + count)):
        return rows[first : first + count] if isinstance(rows, torch.Tensor) else rows[first : first + count, :]
    return rows[index] if isinstance(rows, torch.Tensor) else rows[index, :]
