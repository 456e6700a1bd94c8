"""The decoder-only transformer that every family here is a setting of."""

import math
from collections.abc import Iterator

import torch

from wherry_runtime.layers.activation import Activation
from wherry_runtime.layers.experts import Experts
from wherry_runtime.layers.linear import Linear, Slot, Slots, State, copier, merged
from wherry_runtime.layers.norm import LayerNorm, Norm, RMSNorm, WholeRMSNorm
from wherry_runtime.layers.rope import Rope
from wherry_runtime.loading.config import ModelConfig
from wherry_runtime.loading.rope_config import RopeConfig
from wherry_runtime.models.layout import EXPERT, Origin, checkpoint_slots, origins
from wherry_runtime.models.ops import Attention, Ops, V
from wherry_runtime.parallel.shard import Shard, Span
from wherry_runtime.quantization.packed import PackedMatrix, Table
from wherry_runtime.quantization.storage import Role, Storage

# Of the norms of a layer: before and after attention, before and after the MLP; None: there is none.
NORM_NAMES: dict[str, tuple[str | None, ...]] = {
    "before": ("input_layernorm", None, "post_attention_layernorm", None),
    "after": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "around": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}


class Embedding:
    """A row for each token of `tokens`.

    Attributes:
        table: [tokens, width]; a tied head's matrix, where it has them as they are.
    """

    def __init__(self, name: str, tokens: Span, width: int, storage: Storage, head: PackedMatrix | None = None) -> None:
        if head is None:
            held = storage.matrix_dtype or storage.dtype
            size = tokens.length * width * held.itemsize
            self.table: Table = storage.allocate(size).view(held).view(tokens.length, width)
        else:
            self.table = head
        self.tokens = tokens
        self._name = name

    @property
    def weight(self) -> torch.Tensor:
        """The table as a tensor.

        Raises:
            TypeError: it is the head's, and packed.
        """
        if isinstance(self.table, PackedMatrix):
            raise TypeError("the embedding is in the packed head")
        return self.table

    def slots(self) -> Slots:
        if isinstance(self.table, PackedMatrix):
            return {}  # the head fills it
        columns = Span.all(self.table.shape[1])
        return {f"{self._name}.weight": Slot.part(self.tokens, columns, copier(self.table))}

    def state(self) -> State:
        return {} if isinstance(self.table, PackedMatrix) else {f"{self._name}.weight": self.table}


class Sinks:
    """What each head's attention to nothing weighs."""

    def __init__(self, name: str, heads: Span, storage: Storage) -> None:
        self.values = torch.empty(heads.length, dtype=storage.dtype, device=storage.device)
        self._heads = heads
        self._name = name

    def slots(self) -> Slots:
        return {self._name: Slot.part(self._heads, None, self.values.copy_)}

    def state(self) -> State:
        return {self._name: self.values}


Part = Embedding | Linear | Norm | Sinks


def new_norm(name: str, width: int, config: ModelConfig, storage: Storage) -> Norm:
    """A norm as the model's layers have them."""
    kind, dtype, device = config.norm, storage.vector_dtype, storage.device
    if kind.kind == "rms":
        return RMSNorm(name, width, config.norm_eps, dtype=dtype, device=device, offset=kind.offset)
    return LayerNorm(name, width, config.norm_eps, dtype=dtype, device=device, weight=kind.weight, bias=kind.bias)


def slopes(num_heads: int) -> torch.Tensor:
    """[num_heads] float32: what a token of distance costs each head (Press et al., 2022,
    https://arxiv.org/abs/2108.12409): a geometric series, and where their number is no power of two, every second
    member of the next longer one."""
    power = 2 ** math.floor(math.log2(num_heads))

    def series(length: int) -> list[float]:
        return [2.0 ** (-8 * (i + 1) / length) for i in range(length)]

    return torch.tensor(series(power) + series(2 * power)[::2][: num_heads - power])


class DecoderLayer:
    """Attention and an MLP or experts, each beside a residual, one after the other or both at once."""

    def __init__(self, config: ModelConfig, index: int, storage: Storage, shard: Shard) -> None:
        def linear(role: Role, parts: list[tuple[str, Span]], inputs: Span, bias: bool) -> Linear:
            named = [(f"{prefix}.{n}", w) for n, w in parts]
            return Linear(named, inputs, bias=bias, storage=storage, role=role, first_layer=index == 0)

        def norm(name: str | None, width: int = config.hidden_size) -> Norm | None:
            return None if name is None else new_norm(f"{prefix}.{name}", width, config, storage)

        prefix = f"model.layers.{index}"
        heads, kv_heads, inner = shard.heads(config), shard.kv_heads(config), shard.mlp(config)
        hidden = Span.all(config.hidden_size)
        queries, keys = heads.times(config.head_dim), kv_heads.times(config.head_dim)
        fused = [("self_attn.q_proj", queries), ("self_attn.k_proj", keys), ("self_attn.v_proj", keys)]
        self.qkv = linear("qkv", fused, hidden, config.qkv_bias)
        self.output = linear("output", [("self_attn.o_proj", hidden)], queries, config.output_bias)
        self.activation = Activation(config.activation, config.gated)
        self.experts: Experts | None = None
        if config.experts is not None and config.experts.layers[index]:
            given = (config.experts, f"{prefix}.mlp", config.hidden_size, self.activation, storage, shard)
            self.experts = Experts(*given)
        else:
            up = [("mlp.gate_proj", inner)] * config.gated + [("mlp.up_proj", inner)]
            self.gate_up = linear("gate_up", up, hidden, config.mlp_bias)
            self.down = linear("down", [("mlp.down_proj", hidden)], inner, config.mlp_bias)
        names = list(NORM_NAMES[config.norm.placement])
        if config.shared_norm:
            names[2] = None
        self.input_norm, self.attended_norm, self.mlp_norm, self.mlp_result_norm = map(norm, names)
        self.output_norm = norm("self_attn.attn_sub_norm", queries.length) if config.sub_norms else None
        self.down_norm = norm("mlp.ffn_sub_norm", inner.length) if config.sub_norms else None
        self.sinks = Sinks(f"{prefix}.self_attn.sinks", heads, storage) if config.sinks else None
        self.attention = _attention(config, index, heads, kv_heads, storage, self.sinks)
        self._parallel = config.parallel
        self._factor = config.residual_scale

    def parts(self) -> Iterator[Part]:
        """Everything that holds weights."""
        yield from (self.qkv, self.output)
        yield from self.experts.parts() if self.experts is not None else (self.gate_up, self.down)
        optional = (
            *(self.input_norm, self.attended_norm, self.mlp_norm, self.mlp_result_norm),
            *(self.output_norm, self.down_norm, self.attention.query_norm, self.attention.key_norm, self.sinks),
        )
        yield from (part for part in optional if part is not None)

    def __call__(self, ops: Ops[V], x: V) -> V:
        """x [T, hidden_size] → [T, hidden_size]; keeps the rows' keys and values."""
        seen = _normed(ops, self.input_norm, x)
        if self._parallel:
            other = seen if self.mlp_norm is None else ops.norm(self.mlp_norm, x)
            return self._add_mlp(ops, self._add_attention(ops, x, seen), other)
        x = self._add_attention(ops, x, seen)
        return self._add_mlp(ops, x, _normed(ops, self.mlp_norm, x))

    def _add_attention(self, ops: Ops[V], x: V, seen: V) -> V:
        attended = _normed(ops, self.output_norm, ops.attend(self.attention, ops.linear(self.qkv, seen)))
        return self._add(ops, x, self.output, attended, self.attended_norm)

    def _add_mlp(self, ops: Ops[V], x: V, seen: V) -> V:
        if self.experts is not None:
            return ops.add(x, _normed(ops, self.mlp_result_norm, ops.experts(self.experts, seen)), self._factor)
        inner = ops.activate(self.activation, ops.linear(self.gate_up, seen))
        return self._add(ops, x, self.down, _normed(ops, self.down_norm, inner), self.mlp_result_norm)

    def _add(self, ops: Ops[V], x: V, linear: Linear, inner: V, norm: Norm | None) -> V:
        if norm is None and self._factor == 1:
            return ops.add_linear(x, linear, inner)
        return ops.add(x, _normed(ops, norm, ops.project(linear, inner)), self._factor)


def _normed(ops: Ops[V], norm: Norm | None, x: V) -> V:
    return x if norm is None else ops.norm(norm, x)


def _attention(
    config: ModelConfig, index: int, heads: Span, kv_heads: Span, storage: Storage, sinks: Sinks | None
) -> Attention:
    window = config.windows[index] if config.windows else None
    lost = slopes(config.num_heads)[heads.indices].to(storage.device) * config.alibi if config.alibi else None
    return Attention(
        layer=index,
        num_heads=heads.length,
        num_kv_heads=kv_heads.length,
        head_dim=config.head_dim,
        window=window,
        query_norm=_head_norm(config, f"model.layers.{index}.self_attn.q_norm", heads, storage),
        key_norm=_head_norm(config, f"model.layers.{index}.self_attn.k_norm", kv_heads, storage),
        scale=config.attention_scale,
        softcap=config.attention_softcap,
        slopes=lost,
        sinks=sinks.values if sinks is not None else None,
        local_rope=config.local_rope is not None and window is not None,
        clip=config.clip_qkv,
    )


def _head_norm(config: ModelConfig, name: str, heads: Span, storage: Storage) -> Norm | None:
    if config.qk_norm is None:
        return None
    if config.qk_norm == "head":
        return new_norm(name, config.head_dim, config, storage)
    eps, dtype, device = config.norm_eps, storage.vector_dtype, storage.device
    if config.qk_norm == "whole":
        return WholeRMSNorm(name, heads.times(config.head_dim).length, eps, dtype=dtype, device=device)
    return LayerNorm(name, config.head_dim, eps, dtype=dtype, device=device, bias=False, heads=heads)


class Decoder:
    """Embedding, layers, norm and head, or one rank's part of them. Weights are uninitialized until `slots` are filled.

    Attributes:
        config: of this rank's part.
        vocabulary: the tokens whose logits are computed here.
        local_rope: of layers that have one of their own, or None.
    """

    def __init__(self, config: ModelConfig, num_positions: int, storage: Storage, shard: Shard | None = None) -> None:
        self.shard = shard or Shard()
        self.config = self.shard.part(config)
        self.storage = storage
        self._whole = config
        self.vocabulary = self.shard.vocabulary(config)
        self.embedding, self.head = self._tables(storage)
        self.positions: Embedding | None = None
        if (skipped := config.learned_positions) is not None:
            stop = config.max_position_embeddings + skipped
            self.positions = Embedding("model.embed_positions", Span(skipped, stop, stop), config.hidden_size, storage)
        named = (config.embedding_norm, "model.embed_norm"), (config.final_norm, "model.norm")
        self.embedding_norm, self.norm = (
            new_norm(name, config.hidden_size, config, storage) if has else None for has, name in named
        )
        self.layers = [self.new_layer(i) for i in range(config.num_layers)]

        def rope(settings: RopeConfig | None) -> Rope:
            return Rope(settings, config.head_dim, num_positions, dtype=storage.dtype, device=storage.device)

        self.rope = rope(config.rope)
        self.local_rope = rope(config.local_rope) if config.local_rope is not None else None

    def _tables(self, storage: Storage) -> tuple[Embedding, Linear]:
        """Embedding and head. Tied, they are one matrix, unless the head is rounded: then each has bits of its own."""
        config, tied = self._whole, self._whole.tie_word_embeddings
        width = config.hidden_size

        def head(shared: torch.Tensor | None) -> Linear:
            parts = [("model.embed_tokens" if tied else "lm_head", self.vocabulary)]
            bias = config.head_bias
            return Linear(parts, Span.all(width), bias=bias, storage=storage, role="head", shared=shared)

        def embedding(packed: PackedMatrix | None) -> Embedding:
            return Embedding("model.embed_tokens", self.vocabulary, width, storage, packed)

        if tied and storage.format("head") is not None:
            made = head(None)
            return embedding(
                made.packed if made.packed is not None and not made.packed.format.quantized else None
            ), made
        plain = embedding(None)
        return plain, head(plain.weight if tied else None)

    def new_layer(self, index: int) -> DecoderLayer:
        """Layer `index`, without its weights."""
        return DecoderLayer(self._whole, index, self.storage, self.shard)

    def parts(self) -> Iterator[Part]:
        """Everything that holds weights."""
        yield self.embedding
        yield from (part for part in (self.positions, self.embedding_norm) if part is not None)
        for layer in self.layers:
            yield from layer.parts()
        yield from (part for part in (self.norm, self.head) if part is not None)

    def slots(self) -> Slots:
        """Checkpoint name → where its tensor goes; all of them, once."""
        return checkpoint_slots(self._slots(), self._whole)

    def origins(self) -> dict[str, Origin]:
        """Our name of each matrix in layers (without `.weight`) → where it comes from; not of experts in one tensor."""
        fused = self._whole.experts is not None and self._whole.experts.fused
        matrices = [part for layer in self.layers for part in layer.parts() if isinstance(part, Linear)]
        slots = {name: slot for part in matrices for name, slot in part.slots().items() if name.endswith(".weight")}
        return origins({n: s for n, s in slots.items() if not (fused and EXPERT.search(n))}, self._whole)

    def _slots(self) -> Slots:
        return merged([part.slots() for part in self.parts()])

    def state(self) -> State:
        """Every tensor that holds weights, as they are held."""
        return {name: tensor for part in self.parts() for name, tensor in part.state().items()}

    def unsettled(self) -> list[PackedMatrix]:
        """Matrices whose rows stayed in mapped files."""
        packed = (part.packed for part in self.parts() if isinstance(part, Linear))
        return [matrix for matrix in packed if matrix is not None and matrix.rows is not None]

    def num_parameters(self) -> int:
        """Of the whole model."""
        return sum(math.prod(slot.shape) for slot in self._slots().values())

    def hidden(self, ops: Ops[V]) -> V:
        """The residual stream after the last layer: [T, hidden_size]."""
        x = ops.embed(self.embedding.table, self.embedding.tokens)
        if self.config.embedding_scale != 1:
            x = ops.scale(x, self.config.embedding_scale)
        if self.positions is not None:
            x = ops.add_positions(x, self.positions.weight)
        x = _normed(ops, self.embedding_norm, x)
        for layer in self.layers:
            x = layer(ops, x)
        return x

    def logits(self, ops: Ops[V], hidden: V) -> V:
        """Of the rows that draw a token: [S, vocab_size] on the first rank; on others, nothing to look at."""
        logits = ops.logits(self.head, self.vocabulary, ops.sampled(self.norm, hidden))
        factor, softcap = self.config.logit_scale, self.config.logit_softcap
        if not self.shard.first or (factor == 1 and softcap is None):
            return logits
        return ops.shape_logits(logits, factor, softcap)
