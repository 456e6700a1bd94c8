"""A model's operations in PyTorch, computed as they are called: the reference, and what runs where nothing else can."""

from dataclasses import dataclass

import torch
from torch.nn import functional

from wherry_runtime.attention.metadata import AttentionMetadata
from wherry_runtime.attention.paged import paged_attention, write_cache
from wherry_runtime.kvcache.paged import PagedKVCache
from wherry_runtime.layers.linear import Linear
from wherry_runtime.layers.norm import RMSNorm
from wherry_runtime.layers.rope import Rope
from wherry_runtime.models.ops import Attention
from wherry_runtime.parallel.collective import Alone, Collective, embed_part
from wherry_runtime.parallel.shard import Span


@dataclass(slots=True, frozen=True)
class Batch:
    """One step's input. T rows in the order of `sort_sequences`, S of which draw a token."""

    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    slots: torch.Tensor  # [T] int64: block * block_size + offset, where each row's key and value go
    sampled_rows: torch.Tensor  # [S] int64
    attention: dict[int | None, AttentionMetadata]  # by window


class EagerOps:
    """`Ops` for one step: values are tensors [T, width]."""

    def __init__(self, batch: Batch, cache: PagedKVCache, rope: Rope, collective: Collective | None = None) -> None:
        self._batch = batch
        self._cache = cache
        self._rope = rope
        self._collective = collective or Alone()
        self._angles = rope.at(batch.positions)

    def embed(self, table: torch.Tensor, tokens: Span) -> torch.Tensor:
        if tokens.whole:
            return functional.embedding(self._batch.token_ids, table)
        return self._collective.all_reduce(embed_part(table, tokens, self._batch.token_ids)).to(table.dtype)

    def norm(self, norm: RMSNorm, x: torch.Tensor) -> torch.Tensor:
        return norm(x)

    def linear(self, linear: Linear, x: torch.Tensor) -> torch.Tensor:
        return linear(x)

    def add_linear(self, residual: torch.Tensor, linear: Linear, x: torch.Tensor) -> torch.Tensor:
        y = linear(x)
        return residual + (self._collective.all_reduce(y.float()).to(y.dtype) if linear.partial else y)

    def silu_mul(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)

    def attend(self, attention: Attention, qkv: torch.Tensor) -> torch.Tensor:
        num_heads, num_kv_heads, head_dim = attention.num_heads, attention.num_kv_heads, attention.head_dim
        heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, head_dim)
        rotated = heads[:, : num_heads + num_kv_heads]
        if attention.query_norm is not None and attention.key_norm is not None:
            rotated[:, :num_heads] = attention.query_norm(rotated[:, :num_heads])
            rotated[:, num_heads:] = attention.key_norm(rotated[:, num_heads:])
        self._rope.rotate_(rotated, *self._angles)
        cache = self._cache.layers[attention.layer]
        write_cache(cache, self._batch.slots, heads[:, num_heads:])
        return paged_attention(heads[:, :num_heads], cache, num_kv_heads, self._batch.attention[attention.window])

    def sampled_norm(self, norm: RMSNorm, x: torch.Tensor) -> torch.Tensor:
        return norm(x.index_select(0, self._batch.sampled_rows))

    def logits(self, head: Linear, tokens: Span, x: torch.Tensor) -> torch.Tensor:
        y = head(x)
        return y if tokens.whole else self._collective.gather(y, tokens)
