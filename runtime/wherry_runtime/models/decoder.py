"""The decoder-only transformer that every family here is a setting of."""

from dataclasses import dataclass

import torch
from torch.nn import functional

from wherry_runtime.attention.metadata import AttentionMetadata
from wherry_runtime.attention.paged import paged_attention
from wherry_runtime.kvcache.paged import PagedKVCache
from wherry_runtime.layers.linear import Linear, Slots, project
from wherry_runtime.layers.norm import RMSNorm
from wherry_runtime.layers.rope import Rope
from wherry_runtime.loading.config import ModelConfig


@dataclass(slots=True, frozen=True)
class Batch:
    """One step's input. T rows in the order of `sort_sequences`, S of which draw a token."""

    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    slots: torch.Tensor  # [T] int64: block * block_size + offset, where each row's key and value go
    sampled_rows: torch.Tensor  # [S] int64
    attention: dict[int | None, AttentionMetadata]  # by window


class DecoderLayer:
    """Attention and a gated MLP (SwiGLU), each behind a norm and beside a residual."""

    def __init__(self, config: ModelConfig, index: int, dtype: torch.dtype, device: torch.device) -> None:
        def linear(parts: list[tuple[str, int]], inputs: int, bias: bool) -> Linear:
            return Linear([(f"{prefix}.{n}", w) for n, w in parts], inputs, bias=bias, dtype=dtype, device=device)

        def norm(name: str, width: int) -> RMSNorm:
            return RMSNorm(f"{prefix}.{name}", width, config.rms_norm_eps, dtype=dtype, device=device)

        prefix = f"model.layers.{index}"
        self.heads = (config.num_heads, config.num_kv_heads, config.head_dim)
        self.window = config.windows[index] if config.windows else None
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        fused = [("self_attn.q_proj", queries), ("self_attn.k_proj", keys), ("self_attn.v_proj", keys)]
        self.qkv = linear(fused, config.hidden_size, config.qkv_bias)
        self.output = linear([("self_attn.o_proj", config.hidden_size)], queries, config.output_bias)
        gated = [("mlp.gate_proj", config.intermediate_size), ("mlp.up_proj", config.intermediate_size)]
        self.gate_up = linear(gated, config.hidden_size, config.mlp_bias)
        self.down = linear([("mlp.down_proj", config.hidden_size)], config.intermediate_size, config.mlp_bias)
        self.input_norm = norm("input_layernorm", config.hidden_size)
        self.post_norm = norm("post_attention_layernorm", config.hidden_size)
        self.query_norm = norm("self_attn.q_norm", config.head_dim) if config.qk_norm else None
        self.key_norm = norm("self_attn.k_norm", config.head_dim) if config.qk_norm else None

    def slots(self) -> Slots:
        """Checkpoint name → tensor to fill."""
        parts = (self.qkv, self.output, self.gate_up, self.down, self.input_norm, self.post_norm)
        optional = tuple(p for p in (self.query_norm, self.key_norm) if p is not None)
        return {name: tensor for part in parts + optional for name, tensor in part.slots().items()}

    def __call__(
        self, x: torch.Tensor, cache: torch.Tensor, batch: Batch, rope: Rope, angles: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """x [T, hidden_size] → [T, hidden_size]; writes the rows' keys and values to `cache` (one layer's)."""
        x = x + self.output(self._attend(self.input_norm(x), cache, batch, rope, angles))
        gate, up = self.gate_up(self.post_norm(x)).chunk(2, dim=-1)
        return x + self.down(functional.silu(gate).mul_(up))

    def _attend(
        self, x: torch.Tensor, cache: torch.Tensor, batch: Batch, rope: Rope, angles: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        num_heads, num_kv_heads, head_dim = self.heads
        qkv = self.qkv(x).view(x.shape[0], num_heads + 2 * num_kv_heads, head_dim)
        rotated = qkv[:, : num_heads + num_kv_heads]
        if self.query_norm is not None and self.key_norm is not None:
            rotated[:, :num_heads] = self.query_norm(rotated[:, :num_heads])
            rotated[:, num_heads:] = self.key_norm(rotated[:, num_heads:])
        rope.rotate_(rotated, *angles)
        cache.view(-1, 2 * num_kv_heads, head_dim).index_copy_(0, batch.slots, qkv[:, num_heads:])
        return paged_attention(qkv[:, :num_heads], cache, num_kv_heads, batch.attention[self.window])


class Decoder:
    """Embedding, layers, norm and head. Weights are uninitialized until `slots` are filled."""

    def __init__(self, config: ModelConfig, num_positions: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.config = config
        self.embedding = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        self.head = self.embedding if config.tie_word_embeddings else torch.empty_like(self.embedding)
        self.layers = [DecoderLayer(config, i, dtype, device) for i in range(config.num_layers)]
        self.norm = RMSNorm("model.norm", config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)
        self.rope = Rope(config.rope, config.head_dim, num_positions, dtype=dtype, device=device)

    def slots(self) -> Slots:
        """Checkpoint name → tensor to fill; all of them, once."""
        slots: Slots = {"model.embed_tokens.weight": self.embedding, **self.norm.slots()}
        if not self.config.tie_word_embeddings:
            slots["lm_head.weight"] = self.head
        for layer in self.layers:
            slots.update(layer.slots())
        return slots

    def num_parameters(self) -> int:
        return sum(slot.numel() for slot in self.slots().values())

    def __call__(self, batch: Batch, cache: PagedKVCache) -> torch.Tensor:
        """The logits of the rows that draw a token: [S, vocab_size] float32."""
        x = functional.embedding(batch.token_ids, self.embedding)
        angles = self.rope.at(batch.positions)
        for layer, pages in zip(self.layers, cache.layers, strict=True):
            x = layer(x, pages, batch, self.rope, angles)
        return project(self.norm(x.index_select(0, batch.sampled_rows)), self.head).float()
