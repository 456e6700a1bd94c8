"""The decoder-only transformer that every family here is a setting of."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional

from wherry_runtime.attention.metadata import AttentionMetadata
from wherry_runtime.attention.paged import paged_attention
from wherry_runtime.kvcache.paged import PagedKVCache
from wherry_runtime.layers.linear import Linear, Slot, Slots, State, merged
from wherry_runtime.layers.norm import RMSNorm
from wherry_runtime.layers.rope import Rope
from wherry_runtime.loading.config import ModelConfig
from wherry_runtime.quantization.storage import Role, Storage


@dataclass(slots=True, frozen=True)
class Batch:
    """One step's input. T rows in the order of `sort_sequences`, S of which draw a token."""

    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    slots: torch.Tensor  # [T] int64: block * block_size + offset, where each row's key and value go
    sampled_rows: torch.Tensor  # [S] int64
    attention: dict[int | None, AttentionMetadata]  # by window


class Embedding:
    """A row for each token."""

    def __init__(self, name: str, shape: tuple[int, int], storage: Storage) -> None:
        size = math.prod(shape) * storage.dtype.itemsize
        self.weight = storage.allocate(size).view(storage.dtype).view(shape)
        self._name = name

    def slots(self) -> Slots:
        return {f"{self._name}.weight": Slot.of(self.weight)}

    def state(self) -> State:
        return {f"{self._name}.weight": self.weight}


class DecoderLayer:
    """Attention and a gated MLP (SwiGLU), each behind a norm and beside a residual."""

    def __init__(self, config: ModelConfig, index: int, storage: Storage) -> None:
        def linear(role: Role, parts: list[tuple[str, int]], inputs: int, bias: bool) -> Linear:
            named = [(f"{prefix}.{n}", w) for n, w in parts]
            return Linear(named, inputs, bias=bias, storage=storage, role=role)

        def norm(name: str, width: int) -> RMSNorm:
            dtype, eps = storage.vector_dtype, config.rms_norm_eps
            return RMSNorm(f"{prefix}.{name}", width, eps, dtype=dtype, device=storage.device)

        prefix = f"model.layers.{index}"
        self.heads = (config.num_heads, config.num_kv_heads, config.head_dim)
        self.window = config.windows[index] if config.windows else None
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        fused = [("self_attn.q_proj", queries), ("self_attn.k_proj", keys), ("self_attn.v_proj", keys)]
        self.qkv = linear("qkv", fused, config.hidden_size, config.qkv_bias)
        self.output = linear("output", [("self_attn.o_proj", config.hidden_size)], queries, config.output_bias)
        gated = [("mlp.gate_proj", config.intermediate_size), ("mlp.up_proj", config.intermediate_size)]
        self.gate_up = linear("gate_up", gated, config.hidden_size, config.mlp_bias)
        self.down = linear("down", [("mlp.down_proj", config.hidden_size)], config.intermediate_size, config.mlp_bias)
        self.input_norm = norm("input_layernorm", config.hidden_size)
        self.post_norm = norm("post_attention_layernorm", config.hidden_size)
        self.query_norm = norm("self_attn.q_norm", config.head_dim) if config.qk_norm else None
        self.key_norm = norm("self_attn.k_norm", config.head_dim) if config.qk_norm else None

    def parts(self) -> Iterator[Linear | RMSNorm]:
        """Everything that holds weights."""
        yield from (self.qkv, self.output, self.gate_up, self.down, self.input_norm, self.post_norm)
        yield from (norm for norm in (self.query_norm, self.key_norm) if norm is not None)

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

    def __init__(self, config: ModelConfig, num_positions: int, storage: Storage) -> None:
        self.config = config
        self.storage = storage
        dtype, device, vector_dtype = storage.dtype, storage.device, storage.vector_dtype
        self.embedding = Embedding("model.embed_tokens", (config.vocab_size, config.hidden_size), storage)
        self.layers = [DecoderLayer(config, i, storage) for i in range(config.num_layers)]
        self.norm = RMSNorm("model.norm", config.hidden_size, config.rms_norm_eps, dtype=vector_dtype, device=device)
        # A tied head is the embedding itself where that is a plain matrix; where it is packed, it has bits of its own.
        tied = config.tie_word_embeddings
        self.head = Linear(
            [("model.embed_tokens" if tied else "lm_head", config.vocab_size)],
            config.hidden_size,
            bias=False,
            storage=storage,
            role="head",
            shared=self.embedding.weight if tied else None,
        )
        self.rope = Rope(config.rope, config.head_dim, num_positions, dtype=dtype, device=device)

    def parts(self) -> Iterator[Embedding | Linear | RMSNorm]:
        """Everything that holds weights."""
        yield self.embedding
        for layer in self.layers:
            yield from layer.parts()
        yield from (self.norm, self.head)

    def slots(self) -> Slots:
        """Checkpoint name → where its tensor goes; all of them, once."""
        return merged([part.slots() for part in self.parts()])

    def state(self) -> State:
        """Every tensor that holds weights, as they are held."""
        return {name: tensor for part in self.parts() for name, tensor in part.state().items()}

    def num_parameters(self) -> int:
        return sum(math.prod(slot.shape) for slot in self.slots().values())

    def __call__(self, batch: Batch, cache: PagedKVCache) -> torch.Tensor:
        """The logits of the rows that draw a token: [S, vocab_size] float32."""
        x = functional.embedding(batch.token_ids, self.embedding.weight)
        angles = self.rope.at(batch.positions)
        for layer, pages in zip(self.layers, cache.layers, strict=True):
            x = layer(x, pages, batch, self.rope, angles)
        return self.head(self.norm(x.index_select(0, batch.sampled_rows))).float()
