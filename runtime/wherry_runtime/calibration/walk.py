"""A model in PyTorch, run one layer at a time."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from wherry_protocol.engine_config import Quantization
from wherry_runtime.attention.metadata import MetadataBuilder
from wherry_runtime.calibration.matrices import Layer
from wherry_runtime.kvcache.paged import PagedKVCache
from wherry_runtime.layers.eager import Batch, EagerOps
from wherry_runtime.layers.linear import Linear, project
from wherry_runtime.loading.loader import DTYPES, empty_model, fill_part
from wherry_runtime.models.decoder import Decoder
from wherry_runtime.models.layout import layer_prefix
from wherry_runtime.models.recurrent import RecurrentDecoder
from wherry_runtime.models.registry import read_config
from wherry_runtime.parallel.shard import Span
from wherry_runtime.quantization.packed import Table
from wherry_runtime.quantization.storage import Storage
from wherry_runtime.scheduling.plan import SequenceStep

Watch = Callable[[Linear, torch.Tensor], None]


class Reached(Exception):
    """Ends a run at the matrix product that was waited for."""


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
        self.model = empty_model(config, length, storage)
        self._directory, self._config = directory, config
        layers = layer_prefix(config)
        fill_part(self.model, directory, config, lambda name: not name.startswith(layers))
        self._way: _Way = (
            _Recurring(self.model) if isinstance(self.model, RecurrentDecoder) else _Attending(self.model, length)
        )

    @property
    def num_layers(self) -> int:
        return len(self.model.layers)

    def layer(self, index: int) -> Layer:
        """Layer `index`, read now.

        Raises:
            ModelError: what is wrong with its tensors.
        """
        prefix = f"{layer_prefix(self._config)}{index}."
        fill_part(self.model, self._directory, self._config, lambda name: name.startswith(prefix))
        return self.model.layers[index]

    def drop(self, index: int) -> None:
        """Frees the memory of a layer that nobody else holds."""
        layers: list[Any] = self.model.layers
        layers[index] = self.model.new_layer(index)

    def start(self, window: list[int]) -> torch.Tensor:
        """What comes into the first layer: [length, hidden_size] float32."""
        return self._way.start(window)

    def read_through(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """What comes out of layer `index`, which is read for it and let go of: [length, hidden_size] float32."""
        found = self.through(self.layer(index), x)
        self.drop(index)
        return found

    def logits(self, x: torch.Tensor, rows: int) -> torch.Tensor:
        """What comes out of the last layer → [length, vocab_size] float32, `rows` tokens of the head at a time."""
        return self._way.logits(x, torch.arange(len(x)), rows)

    def run(self, layer: Layer, x: torch.Tensor, watch: Watch) -> torch.Tensor | None:
        """A window's rows x [length, hidden_size] through one layer; None if `watch` ended it.

        Args:
            watch: is shown the inputs of every matrix product before it is computed.
        """
        products = [part for part in layer.parts() if isinstance(part, Linear)]
        for product in products:
            product.seen = _showing(watch, product)
        try:
            return self._way.through(layer, x)
        except Reached:
            return None
        finally:
            for product in products:
                product.seen = None

    def through(self, layer: Layer, x: torch.Tensor, watch: Watch = lambda linear, x: None) -> torch.Tensor:
        """`run` to the end, whatever `watch` sees."""
        out = self.run(layer, x, watch)
        if out is None:
            raise RuntimeError("nobody ends this run")
        return out

    def logprobs(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """[S, vocab_size] float32 after positions `at` [S], of what comes out of the last layer."""
        return self._way.logits(x, at, self._config.vocab_size).log_softmax(dim=-1)


def _showing(watch: Watch, linear: Linear) -> Callable[[torch.Tensor], None]:
    return lambda x: watch(linear, x)


def _head(head: Linear, x: torch.Tensor, rows: int) -> torch.Tensor:
    """[S, vocab_size] float32. A head that is not rounded is widened a piece at a time: whole, it would be the largest
    thing here."""
    if head.weight is None:
        return head(x).float()
    starts = range(0, head.num_outputs, rows)
    y = torch.cat([project(x, head.weight[start : start + rows]) for start in starts], dim=-1)
    return y if head.bias is None else y + head.bias


class _Way(Protocol):
    """What differs between models that attend and those that keep a state."""

    def start(self, window: list[int]) -> torch.Tensor: ...

    def through(self, layer: Any, x: torch.Tensor) -> torch.Tensor: ...

    def logits(self, x: torch.Tensor, at: torch.Tensor, rows: int) -> torch.Tensor: ...


class _Ops(EagerOps):
    """Computes in float32 whatever the embedding is, and the head in pieces of `rows`."""

    rows = 1

    def embed(self, table: Table, tokens: Span) -> torch.Tensor:
        return super().embed(table, tokens).float()

    def logits(self, head: Linear, tokens: Span, x: torch.Tensor) -> torch.Tensor:
        return _head(head, x, self.rows)


class _First:
    """Stands for a model's layers: keeps what comes into the first."""

    def __init__(self) -> None:
        self.x = torch.empty(0)

    def __call__(self, ops: EagerOps, x: torch.Tensor) -> torch.Tensor:
        self.x = x
        raise Reached


class _Attending:
    def __init__(self, model: Decoder, length: int) -> None:
        config, device = model.config, torch.device("cpu")
        self._model = model
        self._cache = PagedKVCache(config, 1, length, dtype=torch.float32, device=device)
        step = SequenceStep("window", [0] * length, 0, np.zeros(1, dtype=np.int32), samples=True)
        metadata = MetadataBuilder(length, self._cache.padding_block, torch.float32, device, config.alibi != 0)
        places = torch.arange(length)
        self._batch = Batch(
            token_ids=torch.zeros(length, dtype=torch.int64),
            positions=places,
            slots=places,
            sampled_rows=places,
            attention={window: metadata.build([step], window) for window in set(config.windows) or {None}},
        )

    def start(self, window: list[int]) -> torch.Tensor:
        layers, first = self._model.layers, _First()
        self._model.layers = [first]  # type: ignore[list-item]
        try:
            self._model.hidden(self._ops(replace(self._batch, token_ids=torch.tensor(window, dtype=torch.int64))))
        except Reached:
            pass
        finally:
            self._model.layers = layers
        return first.x

    def through(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = layer(self._ops(self._batch), x)
        return y

    def logits(self, x: torch.Tensor, at: torch.Tensor, rows: int) -> torch.Tensor:
        ops = self._ops(replace(self._batch, sampled_rows=at))
        ops.rows = rows
        return self._model.logits(ops, x).float()

    def _ops(self, batch: Batch) -> _Ops:
        return _Ops(batch, self._cache, self._model.rope, local_rope=self._model.local_rope)


class _Recurring:
    def __init__(self, model: RecurrentDecoder) -> None:
        self._model = model

    def start(self, window: list[int]) -> torch.Tensor:
        return self._model.embedded(torch.tensor([window], dtype=torch.int64))[0].float()

    def through(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        states = tuple(torch.full((1, *one.shape), one.initial) for one in layer.kept)
        y: torch.Tensor = layer(x.unsqueeze(0), states)[0][0]
        return y

    def logits(self, x: torch.Tensor, at: torch.Tensor, rows: int) -> torch.Tensor:
        return _head(self._model.head, self._model.norm(x[at]), rows)
