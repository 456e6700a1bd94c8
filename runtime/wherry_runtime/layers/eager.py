"""A model's operations in PyTorch, computed as they are called: the reference, and what runs where nothing else can."""

from dataclasses import dataclass

import torch
from torch.nn import functional

from wherry_runtime.attention.metadata import AttentionMetadata
from wherry_runtime.attention.paged import paged_attention, write_cache
from wherry_runtime.kvcache.paged import PagedKVCache
from wherry_runtime.layers.activation import Activation
from wherry_runtime.layers.experts import Experts
from wherry_runtime.layers.linear import Linear
from wherry_runtime.layers.norm import Norm
from wherry_runtime.layers.rope import Rope
from wherry_runtime.models.ops import Attention
from wherry_runtime.parallel.collective import Alone, Collective, embed_part
from wherry_runtime.parallel.shard import Span
from wherry_runtime.quantization.packed import Table, lookup


@dataclass(slots=True, frozen=True)
class Batch:
    """One step's input. T rows in the order of `sort_sequences`, S of which draw a token."""

    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    slots: torch.Tensor  # [T] int64: block * block_size + offset, where each row's key and value go
    sampled_rows: torch.Tensor  # [S] int64
    attention: dict[int | None, AttentionMetadata]  # by window


class TensorOps:
    """Operations on tensors, on any device, that PyTorch computes: what a backend has no kernels for."""

    def __init__(self, positions: torch.Tensor, collective: Collective) -> None:
        self._positions = positions
        self._collective = collective

    def add_positions(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return x + functional.embedding(self._positions, table)

    def linear(self, linear: Linear, x: torch.Tensor) -> torch.Tensor:
        return linear(x)

    def project(self, linear: Linear, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(linear, x)
        return self._collective.all_reduce(y.float()).to(y.dtype) if linear.partial else y

    def add(self, x: torch.Tensor, y: torch.Tensor, factor: float) -> torch.Tensor:
        return x.add(y, alpha=factor)

    def scale(self, x: torch.Tensor, factor: float) -> torch.Tensor:
        return x * float(torch.tensor(factor, dtype=x.dtype))

    def activate(self, activation: Activation, x: torch.Tensor) -> torch.Tensor:
        return activation(x)

    def shape_logits(self, x: torch.Tensor, factor: float, softcap: float | None) -> torch.Tensor:
        scaled = x * factor
        return scaled if softcap is None else torch.tanh(scaled / softcap) * softcap


class EagerOps(TensorOps):
    """`Ops` for one step: values are tensors [T, width].

    Args:
        rope, local_rope: the model's.
    """

    def __init__(
        self,
        batch: Batch,
        cache: PagedKVCache,
        rope: Rope,
        collective: Collective | None = None,
        local_rope: Rope | None = None,
    ) -> None:
        super().__init__(batch.positions, collective or Alone())
        self._batch = batch
        self._cache = cache
        self._rope = rope
        self._angles = {local: r.at(batch.positions) for local, r in ((False, rope), (True, local_rope)) if r}

    def embed(self, table: Table, tokens: Span) -> torch.Tensor:
        if tokens.whole:
            return lookup(table, self._batch.token_ids)
        return self._collective.all_reduce(embed_part(table, tokens, self._batch.token_ids)).to(table.dtype)

    def norm(self, norm: Norm, x: torch.Tensor) -> torch.Tensor:
        return norm(x)

    def add_linear(self, residual: torch.Tensor, linear: Linear, x: torch.Tensor) -> torch.Tensor:
        return residual + self.project(linear, x)

    def experts(self, experts: Experts, x: torch.Tensor) -> torch.Tensor:
        y = experts(x)
        return (self._collective.all_reduce(y) if experts.partial else y).to(x.dtype)

    def attend(self, attention: Attention, qkv: torch.Tensor) -> torch.Tensor:
        num_heads, num_kv_heads, head_dim = attention.num_heads, attention.num_kv_heads, attention.head_dim
        if attention.clip is not None:
            qkv = qkv.clamp(-attention.clip, attention.clip)
        heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, head_dim)
        rotated = heads[:, : num_heads + num_kv_heads]
        if attention.query_norm is not None and attention.key_norm is not None:
            rotated[:, :num_heads] = attention.query_norm(rotated[:, :num_heads])
            rotated[:, num_heads:] = attention.key_norm(rotated[:, num_heads:])
        if self._rope.rotates:
            self._rope.rotate_(rotated, *self._angles[attention.local_rope])
        cache = self._cache.layers[attention.layer]
        write_cache(cache, self._batch.slots, heads[:, num_heads:])
        return paged_attention(heads[:, :num_heads], cache, attention, self._batch.attention[attention.window])

    def sampled(self, norm: Norm | None, x: torch.Tensor) -> torch.Tensor:
        rows = x.index_select(0, self._batch.sampled_rows)
        return rows if norm is None else norm(rows)

    def logits(self, head: Linear, tokens: Span, x: torch.Tensor) -> torch.Tensor:
        y = head(x)
        return y if tokens.whole else self._collective.gather(y, tokens)
