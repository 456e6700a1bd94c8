"""The decoder-only transformer that every family here is a setting of."""

import math
from collections.abc import Iterator

from wherry_runtime.layers.linear import Linear, Slot, Slots, State, merged
from wherry_runtime.layers.norm import RMSNorm
from wherry_runtime.layers.rope import Rope
from wherry_runtime.loading.config import ModelConfig
from wherry_runtime.models.ops import Attention, Ops, V
from wherry_runtime.parallel.shard import Shard, Span
from wherry_runtime.quantization.storage import Role, Storage


class Embedding:
    """A row for each token of `tokens`.

    Attributes:
        weight: [tokens, width]
    """

    def __init__(self, name: str, tokens: Span, width: int, storage: Storage) -> None:
        size = tokens.length * width * storage.dtype.itemsize
        self.weight = storage.allocate(size).view(storage.dtype).view(tokens.length, width)
        self.tokens = tokens
        self._name = name

    def slots(self) -> Slots:
        columns = Span.all(self.weight.shape[1])
        return {f"{self._name}.weight": Slot.part(self.tokens, columns, self.weight.copy_)}

    def state(self) -> State:
        return {f"{self._name}.weight": self.weight}


class DecoderLayer:
    """Attention and a gated MLP (SwiGLU), each behind a norm and beside a residual."""

    def __init__(self, config: ModelConfig, index: int, storage: Storage, shard: Shard) -> None:
        def linear(role: Role, parts: list[tuple[str, Span]], inputs: Span, bias: bool) -> Linear:
            named = [(f"{prefix}.{n}", w) for n, w in parts]
            return Linear(named, inputs, bias=bias, storage=storage, role=role, first_layer=index == 0)

        def norm(name: str, width: int) -> RMSNorm:
            dtype, eps = storage.vector_dtype, config.rms_norm_eps
            return RMSNorm(f"{prefix}.{name}", width, eps, dtype=dtype, device=storage.device)

        prefix = f"model.layers.{index}"
        heads, kv_heads, inner = shard.heads(config), shard.kv_heads(config), shard.mlp(config)
        hidden = Span.all(config.hidden_size)
        queries, keys = heads.times(config.head_dim), kv_heads.times(config.head_dim)
        fused = [("self_attn.q_proj", queries), ("self_attn.k_proj", keys), ("self_attn.v_proj", keys)]
        self.qkv = linear("qkv", fused, hidden, config.qkv_bias)
        self.output = linear("output", [("self_attn.o_proj", hidden)], queries, config.output_bias)
        self.gate_up = linear("gate_up", [("mlp.gate_proj", inner), ("mlp.up_proj", inner)], hidden, config.mlp_bias)
        self.down = linear("down", [("mlp.down_proj", hidden)], inner, config.mlp_bias)
        self.input_norm = norm("input_layernorm", config.hidden_size)
        self.post_norm = norm("post_attention_layernorm", config.hidden_size)
        self.attention = Attention(
            layer=index,
            num_heads=heads.length,
            num_kv_heads=kv_heads.length,
            head_dim=config.head_dim,
            window=config.windows[index] if config.windows else None,
            query_norm=norm("self_attn.q_norm", config.head_dim) if config.qk_norm else None,
            key_norm=norm("self_attn.k_norm", config.head_dim) if config.qk_norm else None,
        )

    def parts(self) -> Iterator[Linear | RMSNorm]:
        """Everything that holds weights."""
        yield from (self.qkv, self.output, self.gate_up, self.down, self.input_norm, self.post_norm)
        yield from (norm for norm in (self.attention.query_norm, self.attention.key_norm) if norm is not None)

    def __call__(self, ops: Ops[V], x: V) -> V:
        """x [T, hidden_size] → [T, hidden_size]; keeps the rows' keys and values."""
        attended = ops.attend(self.attention, ops.linear(self.qkv, ops.norm(self.input_norm, x)))
        x = ops.add_linear(x, self.output, attended)
        gated = ops.silu_mul(ops.linear(self.gate_up, ops.norm(self.post_norm, x)))
        return ops.add_linear(x, self.down, gated)


class Decoder:
    """Embedding, layers, norm and head, or one rank's part of them. Weights are uninitialized until `slots` are filled.

    Attributes:
        config: of this rank's part.
        vocabulary: the tokens whose logits are computed here.
    """

    def __init__(self, config: ModelConfig, num_positions: int, storage: Storage, shard: Shard | None = None) -> None:
        self.shard = shard or Shard()
        self.config = self.shard.part(config)
        self.storage = storage
        dtype, device, vector_dtype = storage.dtype, storage.device, storage.vector_dtype
        self.vocabulary = self.shard.vocabulary(config)
        self.embedding = Embedding("model.embed_tokens", self.vocabulary, config.hidden_size, storage)
        self.layers = [DecoderLayer(config, i, storage, self.shard) for i in range(config.num_layers)]
        self.norm = RMSNorm("model.norm", config.hidden_size, config.rms_norm_eps, dtype=vector_dtype, device=device)
        # A tied head is the embedding itself where that is a plain matrix; where it is packed, it has bits of its own.
        tied = config.tie_word_embeddings
        self.head = Linear(
            [("model.embed_tokens" if tied else "lm_head", self.vocabulary)],
            Span.all(config.hidden_size),
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
        """Of the whole model."""
        return sum(math.prod(slot.shape) for slot in self.slots().values())

    def hidden(self, ops: Ops[V]) -> V:
        """The residual stream after the last layer: [T, hidden_size]."""
        x = ops.embed(self.embedding.weight, self.embedding.tokens)
        for layer in self.layers:
            x = layer(ops, x)
        return x

    def logits(self, ops: Ops[V], hidden: V) -> V:
        """Of the rows that draw a token: [S, vocab_size] on the first rank; on others, nothing to look at."""
        return ops.logits(self.head, self.vocabulary, ops.sampled_norm(self.norm, hidden))
