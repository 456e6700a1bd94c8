"""What a model's step is written in.

A model calls these operations in order and never looks inside a value, so one description serves three ways of running
it: PyTorch computes each operation when it is called (`layers.eager`), the native backend records the calls once and
replays them for every step (`kernels.cpu.recorder`), and on CUDA they launch kernels (`kernels.cuda.ops`).

A backend need not have all of them, nor all that attention can be: which models it computes is its own to say
(`attention.native.unsupported`, `kernels.cuda.support.unsupported`), before it is given one.
"""

from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from wherry_runtime.layers.activation import Activation
from wherry_runtime.layers.experts import Experts
from wherry_runtime.layers.linear import Linear
from wherry_runtime.layers.norm import Norm
from wherry_runtime.parallel.shard import Span
from wherry_runtime.quantization.packed import Table

V = TypeVar("V")


@dataclass(slots=True, frozen=True)
class Attention:
    """One layer's attention: its place in the KV cache and its shape.

    Attributes:
        window: how many tokens back a token sees, itself included; None: all.
        query_norm, key_norm: of heads, before they are rotated.
        scale: of scores; None: 1 / sqrt(head_dim).
        softcap: scores become c · tanh(score / c).
        slopes: [num_heads] float32: scores lose this much for each token of distance (ALiBi).
        sinks: [num_heads]: the score of attending to nothing.
        local_rope: rotates by the model's second tables.
        clip: queries, keys and values are cut off at this magnitude.
    """

    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    query_norm: Norm | None
    key_norm: Norm | None
    scale: float | None = None
    softcap: float | None = None
    slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    local_rope: bool = False
    clip: float | None = None

    @property
    def score_scale(self) -> float:
        return float(self.head_dim**-0.5) if self.scale is None else self.scale


class Ops(Protocol[V]):
    """T rows, one for each token of the step; S of them draw a token. A value is T (or S) rows of a width.

    Where several ranks compute a model together, values are the same on all of them but for those between the two
    matrices of a pair, of which each rank has its own columns.
    """

    def embed(self, table: Table, tokens: Span) -> V:
        """The rows of the whole table that the step's token ids name; `table` [tokens, width] has those of `tokens`."""

    def add_positions(self, x: V, table: torch.Tensor) -> V:
        """x + the rows of `table` [positions, width] that the step's positions name. x is used up."""

    def norm(self, norm: Norm, x: V) -> V:
        """`norm` of each row."""

    def linear(self, linear: Linear, x: V) -> V:
        """x Wᵀ + b."""

    def project(self, linear: Linear, x: V) -> V:
        """x Wᵀ + b, summed over the ranks where W is partial."""

    def add_linear(self, residual: V, linear: Linear, x: V) -> V:
        """residual + x Wᵀ + b, summed over the ranks where W is partial. The residual is used up."""

    def add(self, x: V, y: V, factor: float) -> V:
        """x + factor · y. x is used up."""

    def scale(self, x: V, factor: float) -> V:
        """factor · x, the factor rounded to the model's type. x is used up."""

    def activate(self, activation: Activation, x: V) -> V:
        """`activation` of each row."""

    def experts(self, experts: Experts, x: V) -> V:
        """The mixture of experts of each row, summed over the ranks."""

    def attend(self, attention: Attention, qkv: V) -> V:
        """Rotates queries and keys, keeps keys and values in the cache, and attends to the sequence so far.

        `qkv` has the heads of queries, keys and values side by side; the result the heads of queries.
        """

    def sampled(self, norm: Norm | None, x: V) -> V:
        """`norm` of the S rows of x that draw a token."""

    def logits(self, head: Linear, tokens: Span, x: V) -> V:
        """x Wᵀ + b of all ranks side by side, on the first one. Here are those of `tokens`."""

    def shape_logits(self, x: V, factor: float, softcap: float | None) -> V:
        """factor · x, of which y then becomes c · tanh(y / c). x is used up."""
