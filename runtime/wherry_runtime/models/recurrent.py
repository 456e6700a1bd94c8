"""The decoder whose layers keep a state instead of attending: embedding, layers, norm and head."""

import math
from collections.abc import Iterator

import torch

from wherry_runtime.layers.linear import Linear, Slots, State, merged
from wherry_runtime.layers.norm import LayerNorm, RMSNorm
from wherry_runtime.layers.recurrent import Kept, Part, RecurrentLayer, States
from wherry_runtime.loading.config import ModelConfig
from wherry_runtime.loading.recurrent_config import RecurrentConfig
from wherry_runtime.models.decoder import Embedding
from wherry_runtime.models.families.mamba import MambaLayer
from wherry_runtime.models.families.mamba2 import Mamba2Layer
from wherry_runtime.models.families.rwkv import RwkvLayer
from wherry_runtime.models.layout import Origin
from wherry_runtime.parallel.shard import Span
from wherry_runtime.quantization.storage import Storage

LAYERS: dict[str, type[RecurrentLayer]] = {"mamba": MambaLayer, "mamba2": Mamba2Layer, "rwkv": RwkvLayer}


class RecurrentDecoder:
    """A model without attention. Weights are uninitialized until `slots` are filled.

    Attributes:
        layers: in order.
    """

    def __init__(self, config: ModelConfig, shape: RecurrentConfig, storage: Storage) -> None:
        names = config.layout.names
        self.config = config
        self.storage = storage
        vocabulary, hidden = Span.all(config.vocab_size), config.hidden_size
        self.embedding = Embedding(names["model.embed_tokens"], vocabulary, hidden, storage)
        self._shape = shape
        self.layers = [self.new_layer(i) for i in range(config.num_layers)]
        norm_type = LayerNorm if shape.kind == "rwkv" else RMSNorm
        dtype, device = storage.vector_dtype, storage.device
        self.norm = norm_type(names["model.norm"], hidden, config.norm_eps, dtype=dtype, device=device)
        tied = config.tie_word_embeddings
        head = names["model.embed_tokens"] if tied else names.get("lm_head", "lm_head")
        self.head = Linear(
            [(head, vocabulary)],
            Span.all(hidden),
            bias=False,
            storage=storage,
            role="head",
            shared=self.embedding.weight if tied else None,
        )
        self._residual = torch.float32 if shape.float32_residual else storage.dtype

    def new_layer(self, index: int) -> RecurrentLayer:
        """Layer `index`, without its weights."""
        name = f"{self.config.layout.names['model.layers']}.{index}"
        return LAYERS[self._shape.kind](name, self.config, self._shape, self.storage)

    def parts(self) -> Iterator[Part]:
        """Everything that holds weights."""
        yield self.embedding
        for layer in self.layers:
            yield from layer.parts()
        yield from (self.norm, self.head)

    def slots(self) -> Slots:
        """Checkpoint name → where its tensor goes; all of them, once."""
        return merged([part.slots() for part in self.parts()])

    def origins(self) -> dict[str, Origin]:
        """The name of each matrix in layers (without `.weight`) → where it comes from."""
        matrices = [part for layer in self.layers for part in layer.parts() if isinstance(part, Linear)]
        rows = {name: part for matrix in matrices for name, part in matrix.rows.items()}
        return {name: Origin(name, torch.arange(part.stop - part.start)) for name, part in rows.items()}

    def state(self) -> State:
        """Every tensor that holds weights, as they are held."""
        return {name: tensor for part in self.parts() for name, tensor in part.state().items()}

    def num_parameters(self) -> int:
        """Of the whole model."""
        return sum(math.prod(slot.shape) for slot in self.slots().values())

    def kept(self) -> list[tuple[Kept, ...]]:
        """What each layer keeps of a sequence."""
        return [tuple(layer.kept) for layer in self.layers]

    def embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [B, L] int64 → the residual stream before the first layer: [B, L, hidden_size]."""
        return self.embedding.weight[tokens].to(self._residual)

    def hidden(self, tokens: torch.Tensor, states: list[States]) -> tuple[torch.Tensor, list[States]]:
        """L tokens of each of B sequences.

        Args:
            tokens: [B, L] int64.
            states: of each layer, after the tokens before.

        Returns:
            The residual stream after the last layer [B, L, hidden_size], and the states after these tokens.
        """
        x = self.embedded(tokens)
        after = []
        for layer, before in zip(self.layers, states, strict=True):
            x, kept = layer(x, before)
            after.append(kept)
        return x, after

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """x [S, hidden_size] → [S, vocab_size] float32."""
        return self.head(self.norm(x.to(self.storage.dtype))).float()
