"""Runs step plans on a device: the only part of the engine that touches tensors, besides sampling.

A step has two halves. `prepare` is host work that needs no token: the step loop does it while the step before is still
computing. `run` is the device's thread's: it starts when the last tokens are known.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from wherry_runtime.attention.metadata import MetadataBuilder, sort_sequences
from wherry_runtime.engine.live import Live
from wherry_runtime.engine.sampling import BadLogitsError, Sampled, sample
from wherry_runtime.kvcache.paged import PagedKVCache
from wherry_runtime.models.decoder import Batch, Decoder
from wherry_runtime.scheduling.plan import SequenceStep


@dataclass(slots=True, frozen=True)
class Prepared:
    """A step as far as it is known before the tokens of the step before it."""

    sequences: list[SequenceStep]  # in row order; `tokens` is read by `run`, not earlier
    positions: "np.ndarray[tuple[int], np.dtype[np.int64]]"  # [T]
    slots: "np.ndarray[tuple[int], np.dtype[np.int64]]"  # [T]: block * block_size + offset
    sampled_rows: list[int]
    ids: list[str]  # of the sequences that sample


class ModelRunner:
    """A model and its KV cache. `prepare` may run in one thread while `run` does in another."""

    def __init__(self, model: Decoder, cache: PagedKVCache) -> None:
        self.model = model
        self.cache = cache
        layer = cache.layers[0]
        self._device = layer.device
        self._metadata = MetadataBuilder(cache.block_size, cache.padding_block, layer.dtype, layer.device)
        self._windows = set(model.config.windows) or {None}

    def prepare(self, sequences: list[SequenceStep]) -> Prepared:
        """What can be known of a step ahead. Does not look at the tokens' values, which may still be `UNKNOWN`."""
        ordered = sort_sequences(sequences)
        size = self.cache.block_size
        positions = np.concatenate([np.arange(s.start, s.end) for s in ordered])
        slots = np.empty_like(positions)
        sampled_rows: list[int] = []
        ids: list[str] = []
        row = 0
        for sequence in ordered:
            count = len(sequence.tokens)
            span = positions[row : row + count]
            slots[row : row + count] = np.asarray(sequence.blocks)[span // size] * size + span % size
            row += count
            if sequence.samples:
                sampled_rows.append(row - 1)
                ids.append(sequence.request_id)
        return Prepared(ordered, positions, slots, sampled_rows, ids)

    def run(self, prepared: Prepared, live: Mapping[str, Live]) -> dict[str, Sampled | BadLogitsError]:
        """Computes the ranges and draws the next tokens: request id → token, for those that sample. Blocks."""
        with torch.inference_mode():
            logits = self._logits(prepared)
            if not prepared.ids:
                return {}
            return dict(zip(prepared.ids, sample(logits, [live[i] for i in prepared.ids]), strict=True))

    def step(self, sequences: list[SequenceStep], live: Mapping[str, Live]) -> dict[str, Sampled | BadLogitsError]:
        """Both halves."""
        return self.run(self.prepare(sequences), live)

    def logits(self, sequences: list[SequenceStep]) -> tuple[torch.Tensor, list[str]]:
        """Computes the ranges of `sequences` and writes their keys and values.

        Returns:
            [S, vocab_size] float32 logits after the last token of each sequence that samples, and these sequences' ids.
        """
        prepared = self.prepare(sequences)
        with torch.inference_mode():
            return self._logits(prepared), prepared.ids

    def _logits(self, prepared: Prepared) -> torch.Tensor:
        return self.model(self._batch(prepared), self.cache)

    def _batch(self, prepared: Prepared) -> Batch:
        sequences = prepared.sequences
        tokens = np.array([token for s in sequences for token in s.tokens], dtype=np.int64)
        packed = torch.from_numpy(np.stack([tokens, prepared.positions, prepared.slots])).to(self._device)
        return Batch(
            token_ids=packed[0],
            positions=packed[1],
            slots=packed[2],
            sampled_rows=torch.tensor(prepared.sampled_rows, dtype=torch.int64, device=self._device),
            attention={window: self._metadata.build(sequences, window) for window in self._windows},
        )
