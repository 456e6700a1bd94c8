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
    """T rows, one for each token of the step; S of them draw a token. A value is T (or S) rows of a width."""

    def embed(self, table: torch.Tensor) -> V:
        """The rows of `table` [vocabulary, width] that the step's token ids name."""

    def norm(self, norm: RMSNorm, x: V) -> V:
        """x / sqrt(mean(x²) + eps) · w."""

    def linear(self, linear: Linear, x: V) -> V:
        """x Wᵀ + b."""

    def add_linear(self, residual: V, linear: Linear, x: V) -> V:
        """residual + x Wᵀ + b. The residual is used up."""

    def silu_mul(self, x: V) -> V:
        """silu(a) · b where x = (a, b), side by side and equally wide."""

    def attend(self, attention: Attention, qkv: V) -> V:
        """Rotates queries and keys, keeps keys and values in the cache, and attends to the sequence so far.

        `qkv` has the heads of queries, keys and values side by side; the result the heads of queries.
        """

    def sampled_norm(self, norm: RMSNorm, x: V) -> V:
        """`norm` of the S rows of x that draw a token."""
