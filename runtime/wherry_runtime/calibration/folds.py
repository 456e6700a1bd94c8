"""Where a layer's inputs can be scaled down, so that the weights which read them can be scaled up."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from wherry_runtime.calibration.matrices import Layer
from wherry_runtime.layers.activation import Activation
from wherry_runtime.layers.experts import Experts
from wherry_runtime.layers.linear import Linear
from wherry_runtime.layers.norm import LayerNorm, Norm, RMSNorm
from wherry_runtime.models.decoder import DecoderLayer
from wherry_runtime.models.ops import Attention

Before = RMSNorm | LayerNorm | Linear


@dataclass
class Fold:
    """Inputs of `linear` and what makes them: a norm, or some rows of a matrix before.

    Attributes:
        rows: [K] of `before`, the row that each input is in proportion to; None: `before` is a norm.
    """

    linear: Linear
    before: Before
    rows: torch.Tensor | None

    def apply(self, scales: torch.Tensor) -> None:
        """The inputs are divided by `scales` [K], the weights multiplied; the result is the same.

        Inputs of one row have one scale.
        """
        if self.linear.weight is None or self.before.weight is None:
            raise TypeError("packed weights cannot be scaled")
        self.linear.weight.copy_(self.linear.weight.float() * scales)
        if self.rows is None:
            for held in self.before.state().values():  # weights, and biases if there are any
                held.copy_(held.float() / scales)
            return
        of_row = torch.ones(self.before.weight.shape[0]).index_copy_(0, self.rows, scales)
        self.before.weight.copy_(self.before.weight.float() / of_row.unsqueeze(-1))
        if isinstance(self.before, Linear) and self.before.bias is not None:
            self.before.bias.copy_(self.before.bias.float() / of_row)


@dataclass
class _Value:
    """Something that flows through a layer: what it is in proportion to, if anything, and who reads it."""

    before: Before | None = None
    rows: torch.Tensor | None = None
    readers: list[Linear] = field(default_factory=list)
    others: int = 0


class _Tracer:
    """`Ops` that compute nothing and remember who reads what. Of operations not known here nothing is assumed."""

    def __init__(self) -> None:
        self.values: list[_Value] = []

    def norm(self, norm: Norm, x: _Value) -> _Value:
        x.others += 1
        known = type(norm) in (RMSNorm, LayerNorm) and getattr(norm, "weight", None) is not None
        return self._new(norm if known else None)  # type: ignore[arg-type]

    def linear(self, linear: Linear, x: _Value) -> _Value:
        x.readers.append(linear)
        return self._new(linear, torch.arange(linear.num_outputs))

    def add_linear(self, residual: _Value, linear: Linear, x: _Value) -> _Value:
        residual.others += 1
        x.readers.append(linear)
        return self._new()

    def project(self, linear: Linear, x: _Value) -> _Value:
        x.readers.append(linear)
        return self._new()

    def experts(self, experts: Experts, x: _Value) -> _Value:
        """The router reads the same inputs as all experts; within an expert there is nobody else."""
        x.others += 1
        for expert in experts.all():
            self.linear(expert.down, self.activate(expert.activation, self.linear(expert.gate_up, _Value())))
        return self._new()

    def activate(self, activation: Activation, x: _Value) -> _Value:
        """act(a) · b is in proportion to b; act(x) alone to nothing."""
        x.others += 1
        in_proportion = activation.gated and activation.kind != "clamped_silu" and x.rows is not None
        rows = x.rows[len(x.rows) // 2 :] if in_proportion and x.rows is not None else None
        return self._new(x.before if rows is not None else None, rows)

    def attend(self, attention: Attention, qkv: _Value) -> _Value:
        """An output head is in proportion to the values' head that it reads."""
        qkv.others += 1
        if qkv.rows is None or attention.clip is not None:
            return self._new()
        width, shared = attention.head_dim, attention.num_heads // attention.num_kv_heads
        values = qkv.rows[-attention.num_kv_heads * width :].view(attention.num_kv_heads, 1, width)
        return self._new(qkv.before, values.expand(-1, shared, -1).reshape(-1))

    def __getattr__(self, name: str) -> Callable[..., _Value]:
        def unknown(*arguments: Any, **named: Any) -> _Value:
            for value in (*arguments, *named.values()):
                if isinstance(value, _Value):
                    value.others += 1
            return self._new()

        return unknown

    def _new(self, before: Before | None = None, rows: torch.Tensor | None = None) -> _Value:
        self.values.append(_Value(before, rows))
        return self.values[-1]


def folds(layer: Layer) -> list[Fold]:
    """Those of one layer, in the order of computation; none are looked for where a state is kept."""
    if not isinstance(layer, DecoderLayer):
        return []
    tracer = _Tracer()
    layer(tracer, _Value())
    found = []
    for value in tracer.values:
        # With two readers the scales of one would have to suit the other.
        if value.before is not None and len(value.readers) == 1 and not value.others:
            reader = value.readers[0]
            if value.rows is None or len(value.rows) == reader.num_inputs:
                found.append(Fold(reader, value.before, value.rows))
    return found
