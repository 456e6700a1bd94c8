"""The encoder that every family without a causal mask is a setting of: Devlin et al., 2018
(https://arxiv.org/abs/1810.04805). Every token attends to all of its text, and nothing is kept between steps."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from wherry_runtime.layers.activation import Activation
from wherry_runtime.layers.linear import Linear, Slots, State, merged
from wherry_runtime.layers.norm import Norm
from wherry_runtime.loading.config import ModelConfig
from wherry_runtime.loading.encoder_config import EncoderConfig
from wherry_runtime.models.decoder import Embedding, new_norm
from wherry_runtime.models.layout import checkpoint_slots
from wherry_runtime.parallel.shard import Span
from wherry_runtime.quantization.storage import Role, Storage


@dataclass(slots=True, frozen=True)
class Packed:
    """Texts behind one another, without padding, those of equal length together.

    Attributes:
        token_ids, positions: [T] int64.
        groups: of texts of equal length, in order: the length, and how many there are.
        order: the texts in the order in which they were given → their places here, [B] int64.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    groups: list[tuple[int, int]]
    order: torch.Tensor

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]], device: torch.device) -> "Packed":
        """Packs texts of at least a token each."""
        sorted_ = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        lengths = [len(texts[index]) for index in sorted_]
        tokens = torch.tensor([token for index in sorted_ for token in texts[index]], dtype=torch.int64)
        groups = [(length, len(list(same))) for length, same in itertools.groupby(lengths)]
        positions = torch.cat([torch.arange(length).repeat(count) for length, count in groups])
        order = torch.empty(len(texts), dtype=torch.int64)
        order[torch.tensor(sorted_)] = torch.arange(len(texts))
        return cls(tokens.to(device), positions.to(device), groups, order.to(device))

    def split(self, rows: torch.Tensor) -> Iterator[torch.Tensor]:
        """rows [T, width] → of each group [texts, length, width]."""
        start = 0
        for length, count in self.groups:
            yield rows[start : start + length * count].view(count, length, -1)
            start += length * count


class EncoderLayer:
    """Attention and an MLP, each beside a residual that is normalized afterwards."""

    def __init__(self, config: ModelConfig, index: int, storage: Storage) -> None:
        prefix = f"model.layers.{index}"
        hidden, inner = Span.all(config.hidden_size), Span.all(config.intermediate_size)
        heads = Span.all(config.num_heads * config.head_dim)

        def linear(role: Role, parts: list[tuple[str, Span]], inputs: Span) -> Linear:
            named = [(f"{prefix}.{name}", span) for name, span in parts]
            return Linear(named, inputs, bias=True, storage=storage, role=role, first_layer=index == 0)

        fused = [(f"self_attn.{name}_proj", heads) for name in "qkv"]
        self.qkv = linear("qkv", fused, hidden)
        self.output = linear("output", [("self_attn.o_proj", hidden)], heads)
        self.up = linear("gate_up", [("mlp.up_proj", inner)], hidden)
        self.down = linear("down", [("mlp.down_proj", hidden)], inner)
        self.attended_norm = new_norm(f"{prefix}.post_attention_layernorm", config.hidden_size, config, storage)
        self.mlp_norm = new_norm(f"{prefix}.post_feedforward_layernorm", config.hidden_size, config, storage)
        self.activation = Activation(config.activation, gated=False)
        self._num_heads, self._head_dim = config.num_heads, config.head_dim

    def parts(self) -> Iterator[Linear | Norm]:
        """Everything that holds weights."""
        yield from (self.qkv, self.output, self.up, self.down, self.attended_norm, self.mlp_norm)

    def __call__(self, x: torch.Tensor, packed: Packed) -> torch.Tensor:
        """x [T, hidden_size] → the same."""
        x = self.attended_norm(x + self.output(self._attend(self.qkv(x), packed)))
        return self.mlp_norm(x + self.down(self.activation(self.up(x))))

    def _attend(self, qkv: torch.Tensor, packed: Packed) -> torch.Tensor:
        """qkv [T, 3 · width] → [T, width]. Texts of equal length go together, so that no row is padding."""
        parts = []
        for group in packed.split(qkv):
            count, length, _ = group.shape
            q, k, v = group.view(count, length, 3, self._num_heads, self._head_dim).permute(2, 0, 3, 1, 4).unbind()
            attended = functional.scaled_dot_product_attention(q, k, v)
            parts.append(attended.transpose(1, 2).reshape(count * length, -1))
        return torch.cat(parts)


class Encoder:
    """Embeddings, a norm and layers. Weights are uninitialized until `slots` are filled."""

    def __init__(self, config: ModelConfig, shape: EncoderConfig, storage: Storage) -> None:
        self.config = config
        self.storage = storage
        width, skipped = config.hidden_size, config.learned_positions or 0
        stop = config.max_position_embeddings + skipped
        tables = [("tokens", Span.all(config.vocab_size)), ("positions", Span(skipped, stop, stop))]
        if shape.token_types:
            tables.append(("types", Span(0, 1, shape.token_types)))
        self._tables = {name: Embedding(f"model.embed_{name}", rows, width, storage) for name, rows in tables}
        self.norm = new_norm("model.embed_norm", width, config, storage)
        self.layers = [EncoderLayer(config, index, storage) for index in range(config.num_layers)]

    def parts(self) -> Iterator[Embedding | Linear | Norm]:
        """Everything that holds weights."""
        yield from self._tables.values()
        yield self.norm
        for layer in self.layers:
            yield from layer.parts()

    def slots(self) -> Slots:
        """Checkpoint name → where its tensor goes; all of them, once."""
        return checkpoint_slots(merged([part.slots() for part in self.parts()]), self.config)

    def state(self) -> State:
        """Every tensor that holds weights, as they are held."""
        return {name: tensor for part in self.parts() for name, tensor in part.state().items()}

    def num_parameters(self) -> int:
        """Of the whole model, as far as it is used here."""
        return sum(math.prod(slot.shape) for slot in self.slots().values())

    def hidden(self, packed: Packed) -> torch.Tensor:
        """The last layer's rows: [T, hidden_size]."""
        x = functional.embedding(packed.token_ids, self._tables["tokens"].weight)
        x = x + functional.embedding(packed.positions, self._tables["positions"].weight)
        if (types := self._tables.get("types")) is not None:
            x = x + types.weight[0]
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x, packed)
        return x
