"""Runs step plans on a device: the only part of the engine that touches tensors, besides sampling.

A step has two halves. `prepare` is host work that needs no token: the step loop does it while the step before is still
computing. `run` is the device's thread's: it starts when the last tokens are known.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch

from wherry_runtime.attention.metadata import sort_sequences
from wherry_runtime.engine.live import Live
from wherry_runtime.engine.prepared import Prepared
from wherry_runtime.engine.rng import gumbel_noise
from wherry_runtime.engine.sampling import Noise, Sampler, TorchSampler
from wherry_runtime.engine.speculative.rows import Outcome, draw, one_by_one
from wherry_runtime.scheduling.plan import SequenceStep


class Cache(Protocol):
    """The KV cache's memory."""

    block_size: int

    def scrub(self, blocks: list[int]) -> None:
        """Zeroes blocks."""


class Model(Protocol):
    """A model with its KV cache on some backend."""

    @property
    def cache(self) -> Cache: ...

    @property
    def sampler(self) -> Sampler | None:
        """The backend's own, if it has one: for logits that the model computed last."""

    def prepare(self, prepared: Prepared) -> Any:
        """Whatever of a step's host work needs no token, for `logits` to find in `prepared.work`."""

    def logits(self, prepared: Prepared) -> Iterator[torch.Tensor]:
        """Computes a step and writes its keys and values.

        Yields:
            [S, vocab_size] float32 in parts of some rows, at least one, each valid until the next is asked for.
        """


class ModelRunner:
    """A model and its KV cache. `prepare` may run in one thread while `run` does in another.

    Args:
        noise: may be one that remembers.
    """

    def __init__(self, model: Model, noise: Noise = gumbel_noise) -> None:
        self.model = model
        self.cache = model.cache
        self._sampler = model.sampler or TorchSampler(noise)

    def prepare(self, sequences: list[SequenceStep]) -> Prepared:
        """What can be known of a step ahead. Does not look at the tokens' values, which may still be `UNKNOWN`."""
        size = self.cache.block_size
        ordered = sort_sequences(one_by_one(sequences))
        positions: list[int] = []
        slots: list[int] = []
        sampled_rows = []
        for sequence in ordered:
            span, blocks = range(sequence.start, sequence.end), sequence.blocks
            positions += span
            slots += [int(blocks[position // size]) * size + position % size for position in span]
            if sequence.samples:
                sampled_rows.append(len(positions) - 1)
        ids = [s.request_id for s in ordered if s.samples]
        prepared = Prepared(ordered, positions, slots, sampled_rows, ids)
        return replace(prepared, work=self.model.prepare(prepared))

    def run(self, prepared: Prepared, live: Mapping[str, Live]) -> dict[str, Outcome]:
        """Computes the ranges and draws the next tokens: request id → token or tokens, if it samples. Blocks."""
        with torch.inference_mode():
            return draw(self.model.logits(prepared), prepared.sequences, live, self._sampler)

    def step(self, sequences: list[SequenceStep], live: Mapping[str, Live]) -> dict[str, Outcome]:
        """Both halves."""
        return self.run(self.prepare(sequences), live)

    def logits(self, sequences: list[SequenceStep]) -> tuple[torch.Tensor, list[str]]:
        """Computes the ranges of `sequences` and writes their keys and values.

        Returns:
            [S, vocab_size] float32 logits after the last token of each sequence that samples, and these sequences' ids.
        """
        prepared = self.prepare(sequences)
        whole = len(prepared.ids)
        with torch.inference_mode():
            parts = [part if len(part) == whole else part.clone() for part in self.model.logits(prepared)]
        return parts[0] if len(parts) == 1 else torch.cat(parts), prepared.ids
