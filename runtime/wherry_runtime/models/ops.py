"""What a model's step is written in.

A model calls these operations in order and never looks inside a value, so one description serves three ways of running
it: PyTorch computes each operation when it is called (`layers.eager`), the native backend records the calls once and
replays them for every step (`kernels.cpu.recorder`), and on CUDA they launch kernels (`kernels.cuda.ops`).
"""

from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from wherry_runtime.layers.linear import Linear
from wherry_runtime.layers.norm import RMSNorm
from wherry_runtime.parallel.shard import Span

V = TypeVar("V")


@dataclass(slots=True, frozen=True)
class Attention:
    """One layer's attention: its place in the KV cache and its shape."""

    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None  # how many tokens back a token sees, itself included; None: all
    query_norm: RMSNorm | None
    key_norm: RMSNorm | None


class Ops(Protocol[V]):
    """T rows, one for each token of the step; S of them draw a token. A value is T (or S) rows of a width.

    Where several ranks compute a model together, values are the same on all of them but for those between the two
    matrices of a pair, of which each rank has its own columns.
    """

    def embed(self, table: torch.Tensor, tokens: Span) -> V:
        """The rows of the whole table that the step's token ids name; `table` [tokens, width] has those of `tokens`."""

    def norm(self, norm: RMSNorm, x: V) -> V:
        """x / sqrt(mean(x²) + eps) · w."""

    def linear(self, linear: Linear, x: V) -> V:
        """x Wᵀ + b."""

    def add_linear(self, residual: V, linear: Linear, x: V) -> V:
        """residual + x Wᵀ + b, summed over the ranks where W is partial. The residual is used up."""

    def silu_mul(self, x: V) -> V:
        """silu(a) · b where x = (a, b), side by side and equally wide."""

    def attend(self, attention: Attention, qkv: V) -> V:
        """Rotates queries and keys, keeps keys and values in the cache, and attends to the sequence so far.

        `qkv` has the heads of queries, keys and values side by side; the result the heads of queries.
        """

    def sampled_norm(self, norm: RMSNorm, x: V) -> V:
        """`norm` of the S rows of x that draw a token."""

    def logits(self, head: Linear, tokens: Span, x: V) -> V:
        """x Wᵀ of all ranks side by side, on the first one. Here are those of `tokens`."""
