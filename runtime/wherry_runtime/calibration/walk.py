"""A model in PyTorch, run one layer at a time."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from wherry_protocol.engine_config import Quantization
from wherry_runtime.attention.metadata import MetadataBuilder
from wherry_runtime.kvcache.paged import PagedKVCache
from wherry_runtime.layers.eager import Batch, EagerOps
from wherry_runtime.layers.linear import Linear, project
from wherry_runtime.loading.loader import DTYPES, fill_part
from wherry_runtime.models.decoder import Decoder, DecoderLayer
from wherry_runtime.models.registry import read_config
from wherry_runtime.parallel.shard import Span
from wherry_runtime.quantization.packed import Table
from wherry_runtime.quantization.storage import Storage
from wherry_runtime.scheduling.plan import SequenceStep

Watch = Callable[[Linear, torch.Tensor], None]


class Reached(Exception):
    """Ends a run at the matrix product that was waited for."""


class WatchedOps(EagerOps):
    """Shows the inputs of every matrix product before it is computed."""

    def __init__(self, batch: Batch, cache: PagedKVCache, model: Decoder, watch: Watch) -> None:
        super().__init__(batch, cache, model.rope, local_rope=model.local_rope)
        self._watch = watch

    def embed(self, table: Table, tokens: Span) -> torch.Tensor:
        return super().embed(table, tokens).float()

    def linear(self, linear: Linear, x: torch.Tensor) -> torch.Tensor:
        self._watch(linear, x)
        return super().linear(linear, x)


class _PiecewiseOps(WatchedOps):
    """Widens a head that is not rounded a piece at a time: whole, it would be the largest thing here."""

    rows = 0

    def logits(self, head: Linear, tokens: Span, x: torch.Tensor) -> torch.Tensor:
        if head.weight is None:
            return head(x).float()
        starts = range(0, head.num_outputs, self.rows)
        y = torch.cat([project(x, head.weight[start : start + self.rows]) for start in starts], dim=-1)
        return y if head.bias is None else y + head.bias


class _First:
    """Stands for a model's layers: keeps what comes into the first."""

    def __init__(self) -> None:
        self.x = torch.empty(0)

    def __call__(self, ops: EagerOps, x: torch.Tensor) -> torch.Tensor:
        self.x = x
        raise Reached


LAYER = re.compile(r"model\.layers\.(\d+)\.")


class Walk:
    """A model whose matrices are held as the checkpoint has them and computed with in float32, a layer at a time.

    Args:
        length: tokens in a window. Windows know nothing of one another.
        quantization, group: matrices are rounded as they are read instead, as the engine rounds them.
    """

    def __init__(self, directory: Path, length: int, quantization: Quantization = "none", group: int = 0) -> None:
        config = read_config(directory)
        held = DTYPES[config.dtype]
        storage = Storage(torch.float32, torch.device("cpu"), quantization, group, matrix_dtype=held)
        if config.recurrent is not None:
            raise TypeError(f"{config.architecture} is not walked through")
        self.model = Decoder(config, length, storage)
        self._directory, self._config, self._storage = directory, config, storage
        fill_part(self.model, directory, config, lambda name: LAYER.match(name) is None)
        self._cache = PagedKVCache(config, 1, length, dtype=torch.float32, device=torch.device("cpu"))
        self._length = length
        block = np.zeros(1, dtype=np.int32)
        step = SequenceStep("window", [0] * length, 0, block, samples=True)
        metadata = MetadataBuilder(
            length, self._cache.padding_block, torch.float32, torch.device("cpu"), config.alibi != 0
        )
        places = torch.arange(length)
        self._batch = Batch(
            token_ids=torch.zeros(length, dtype=torch.int64),
            positions=places,
            slots=places,
            sampled_rows=places,
            attention={window: metadata.build([step], window) for window in set(config.windows) or {None}},
        )

    @property
    def num_layers(self) -> int:
        return len(self.model.layers)

    def layer(self, index: int) -> DecoderLayer:
        """Layer `index`, read now.

        Raises:
            ModelError: what is wrong with its tensors.
        """
        prefix = f"model.layers.{index}."
        fill_part(self.model, self._directory, self._config, lambda name: name.startswith(prefix))
        return self.model.layers[index]

    def drop(self, index: int) -> None:
        """Frees the memory of a layer that nobody else holds."""
        self.model.layers[index] = DecoderLayer(self._config, index, self._storage, self.model.shard)

    def start(self, window: list[int]) -> torch.Tensor:
        """What comes into the first layer: [length, hidden_size] float32."""
        layers, first = self.model.layers, _First()
        self.model.layers = [first]  # type: ignore[list-item]
        try:
            self.model.hidden(WatchedOps(self._for(window), self._cache, self.model, lambda linear, x: None))
        except Reached:
            pass
        finally:
            self.model.layers = layers
        return first.x

    def read_through(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """What comes out of layer `index`, which is read for it and let go of: [length, hidden_size] float32."""
        found = self.through(self.layer(index), x)
        self.drop(index)
        return found

    def logits(self, x: torch.Tensor, rows: int) -> torch.Tensor:
        """What comes out of the last layer → [length, vocab_size] float32, `rows` tokens of the head at a time."""
        ops = _PiecewiseOps(self._batch, self._cache, self.model, lambda linear, x: None)
        ops.rows = rows
        return self.model.logits(ops, x)

    def run(self, layer: DecoderLayer, x: torch.Tensor, watch: Watch) -> torch.Tensor | None:
        """A window's rows x [length, hidden_size] through one layer; None if `watch` ended it."""
        try:
            return layer(WatchedOps(self._batch, self._cache, self.model, watch), x)
        except Reached:
            return None

    def through(self, layer: DecoderLayer, x: torch.Tensor, watch: Watch = lambda linear, x: None) -> torch.Tensor:
        """`run` to the end, whatever `watch` sees."""
        out = self.run(layer, x, watch)
        if out is None:
            raise RuntimeError("nobody ends this run")
        return out

    def logprobs(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """[S, vocab_size] float32 after positions `at` [S], of what comes out of the last layer."""
        batch = replace(self._batch, sampled_rows=at)
        ops = WatchedOps(batch, self._cache, self.model, lambda linear, x: None)
        return self.model.logits(ops, x).float().log_softmax(dim=-1)

    def _for(self, window: list[int]) -> Batch:
        return replace(self._batch, token_ids=torch.tensor(window, dtype=torch.int64))
