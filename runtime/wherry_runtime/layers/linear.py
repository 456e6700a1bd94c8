"""Matrix products with weights, fused where inputs are shared."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from wherry_runtime.parallel.shard import Span
from wherry_runtime.quantization.formats import PANEL
from wherry_runtime.quantization.packed import PackedMatrix, Rows, linear
from wherry_runtime.quantization.storage import Role, Storage

ROWS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class Slot:
    """A place for one tensor of the checkpoint: `fill` takes a tensor of `shape` and keeps this rank's part of it.

    Those of matrices take whole numbers with scales as well.
    """

    shape: tuple[int, ...]
    fill: Callable[..., object]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Slot":
        """A slot that copies into `tensor`."""
        return cls(tuple(tensor.shape), tensor.copy_)

    @classmethod
    def part(cls, rows: Span, columns: Span | None, fill: Callable[..., object]) -> "Slot":
        """A slot that fills in some rows and columns; the rest is never read. None: the tensor has one dimension."""
        if columns is None:
            return cls((rows.total,), lambda tensor: fill(tensor[rows.indices]))
        return cls((rows.total, columns.total), lambda tensor: fill(tensor[rows.indices, columns.indices]))


Slots = dict[str, Slot]
State = dict[str, torch.Tensor]


class Linear:
    """y = x Wᵀ + b, for one or more projections of the same x, their outputs side by side.

    Args:
        parts: checkpoint name (without `.weight`) and outputs of each projection.
        inputs: columns of the checkpoint's x that come in here.
        bias: whether the projections have biases.
        role, first_layer: which of the model's matrices this is; the storage gives each its format.
        shared: a plain weight that another layer holds and fills, for a head tied to the embedding.

    Attributes:
        packed: W in a packed format, or None.
        weight: W [num_outputs, num_inputs] plain, or None.
        bias: [num_outputs]; float32 and padded with zeros to a multiple of 64 where W is packed.
        partial: y is a summand: the ranks' sum is the result. The first rank's has the bias.
        role: as given.
        dtype: of y.
        seen: is shown every x [T, num_inputs] before it is multiplied; None: nobody looks.
    """

    def __init__(
        self,
        parts: Sequence[tuple[str, Span]],
        inputs: Span,
        *,
        bias: bool,
        storage: Storage,
        role: Role,
        first_layer: bool = False,
        shared: torch.Tensor | None = None,
    ) -> None:
        self.num_outputs = sum(span.length for _, span in parts)
        self.num_inputs = num_inputs = inputs.length
        self.partial = not inputs.whole
        self.packed: PackedMatrix | None = None
        self.weight: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None
        self._parts = tuple(parts)
        self._inputs = inputs
        self._skips_bias = bias and inputs.start > 0
        bias = bias and not self._skips_bias
        self._shared = shared is not None
        self.role = role
        self.dtype = storage.dtype
        self.seen: Callable[[torch.Tensor], object] | None = None
        kept = storage.kept(name for name, _ in parts)
        if kept is not None:
            kept = kept.cut_at(inputs.start)
        self._product: Callable[[torch.Tensor], torch.Tensor] | None = None
        if (format_ := kept or storage.format(role, first_layer=first_layer)) is not None:
            self.packed = PackedMatrix(format_, self.num_outputs, num_inputs, storage.allocate, storage.mapped)
            if bias:
                padded = -(-self.num_outputs // PANEL) * PANEL
                self.bias = torch.zeros(padded, dtype=torch.float32, device=storage.device)
            if storage.product is not None:
                self._product = storage.product(self)
        else:
            shape = (self.num_outputs, num_inputs)
            held = storage.matrix_dtype or storage.dtype
            self.weight = torch.empty(shape, dtype=held, device=storage.device) if shared is None else shared
            if bias:
                self.bias = torch.empty(self.num_outputs, dtype=storage.dtype, device=storage.device)

    @property
    def rows(self) -> dict[str, slice]:
        """Checkpoint name (without `.weight`) → its rows of W."""
        ends = list(itertools.accumulate(span.length for _, span in self._parts))
        return {name: slice(end - span.length, end) for (name, span), end in zip(self._parts, ends, strict=True)}

    def slots(self) -> Slots:
        """Checkpoint name → where its tensor goes."""
        slots: Slots = {}
        row = 0
        for name, span in self._parts:
            end = row + span.length
            if self.packed is not None:
                slots[f"{name}.weight"] = Slot.part(span, self._inputs, _filler(self.packed, row))
            elif self.weight is not None and not self._shared:
                slots[f"{name}.weight"] = Slot.part(span, self._inputs, copier(self.weight[row:end]))
            if self.bias is not None:
                slots[f"{name}.bias"] = Slot.part(span, None, self.bias[row:end].copy_)
            elif self._skips_bias:
                slots[f"{name}.bias"] = Slot((span.total,), lambda _: None)
            row = end
        return slots

    def state(self) -> State:
        """Every tensor held here, by a name of its own."""
        name = self._parts[0][0]
        state: State = {}
        if self.packed is not None:
            state[f"{name}.packed"] = self.packed.data
            if self.packed.scales is not None:
                state[f"{name}.scales"] = self.packed.scales
        elif self.weight is not None and not self._shared:
            state[f"{name}.weight"] = self.weight
        if self.bias is not None:
            state[f"{name}.bias"] = self.bias
        return state

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, num_inputs] → [T, num_outputs] in the model's dtype."""
        if self.seen is not None:
            self.seen(x)
        if self._product is not None:
            return self._product(x).to(self.dtype)
        if self.packed is not None:
            y = linear(x, self.packed)
            return (y if self.bias is None else y + self.bias[: self.num_outputs]).to(self.dtype)
        if self.weight is None:
            raise TypeError("a layer without weights")
        return project(x, self.weight, self.bias)


def _filler(matrix: PackedMatrix, row: int) -> Callable[[Rows], None]:
    return lambda rows: matrix.fill(row, rows)


def copier(target: torch.Tensor) -> Callable[[Rows], None]:
    """Puts rows into `target`, dequantized if they are packed: some at a time, as they are far larger then."""

    def fill(rows: Rows) -> None:
        if isinstance(rows, torch.Tensor):
            target.copy_(rows)
            return
        for start in range(0, len(target), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            target[part].copy_(rows[part, :].dequantized())

    return fill


def merged(slots: Sequence[Slots]) -> Slots:
    """All of `slots`; a tensor with places in several of them fills each."""
    result: Slots = {}
    for part in slots:
        for name, slot in part.items():
            result[name] = _both(result[name], slot) if name in result else slot
    return result


def _both(first: Slot, second: Slot) -> Slot:
    return Slot(first.shape, lambda tensor: (first.fill(tensor), second.fill(tensor)))


def project(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, I], weight [O, I], bias [O] → [T, O].

    A weight of another type than x's is converted for the product.

    On CPU, a single bfloat16 row goes as two: oneDNN takes a matrix-vector path for one row that rounds differently,
    and a token must not depend on how many others are in its batch.
    """
    weight = weight.to(x.dtype)
    if x.shape[0] == 1 and x.dtype is torch.bfloat16 and x.device.type == "cpu":
        return functional.linear(x.expand(2, -1), weight, bias)[:1]
    return functional.linear(x, weight, bias)
