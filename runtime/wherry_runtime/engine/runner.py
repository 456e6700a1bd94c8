"""Runs step plans on a device: the only part of the engine that touches tensors, besides sampling."""

import numpy as np
import torch

from wherry_runtime.attention.metadata import MetadataBuilder, sort_sequences
from wherry_runtime.engine.live import Live
from wherry_runtime.engine.sampling import BadLogitsError, Sampled, sample
from wherry_runtime.kvcache.paged import PagedKVCache
from wherry_runtime.models.decoder import Batch, Decoder
from wherry_runtime.scheduling.plan import SequenceStep


class ModelRunner:
    """A model and its KV cache."""

    def __init__(self, model: Decoder, cache: PagedKVCache) -> None:
        self.model = model
        self.cache = cache
        layer = cache.layers[0]
        self._device = layer.device
        self._metadata = MetadataBuilder(cache.block_size, cache.padding_block, layer.dtype, layer.device)
        self._windows = set(model.config.windows) or {None}

    def logits(self, sequences: list[SequenceStep]) -> tuple[torch.Tensor, list[str]]:
        """Computes the ranges of `sequences` and writes their keys and values.

        Returns:
            [S, vocab_size] float32 logits after the last token of each sequence that samples, and these sequences' ids.
        """
        with torch.inference_mode():
            batch, ids = self._batch(sort_sequences(sequences))
            return self.model(batch, self.cache), ids

    def step(self, sequences: list[SequenceStep], live: dict[str, Live]) -> dict[str, Sampled | BadLogitsError]:
        """Computes the ranges and draws the next tokens: request id → token, for those that sample."""
        with torch.inference_mode():
            logits, ids = self.logits(sequences)
            if not ids:
                return {}
            return dict(zip(ids, sample(logits, [live[i] for i in ids]), strict=True))

    def _batch(self, sequences: list[SequenceStep]) -> tuple[Batch, list[str]]:
        size = self.cache.block_size
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        sampled_rows: list[int] = []
        ids: list[str] = []
        for sequence in sequences:
            tokens += sequence.tokens
            span = range(sequence.start, sequence.end)
            positions += span
            slots += [sequence.blocks[p // size] * size + p % size for p in span]
            if sequence.samples:
                sampled_rows.append(len(tokens) - 1)
                ids.append(sequence.request_id)
        packed = torch.from_numpy(np.array([tokens, positions, slots], dtype=np.int64)).to(self._device)
        return Batch(
            token_ids=packed[0],
            positions=packed[1],
            slots=packed[2],
            sampled_rows=torch.tensor(sampled_rows, dtype=torch.int64, device=self._device),
            attention={window: self._metadata.build(sequences, window) for window in self._windows},
        ), ids
