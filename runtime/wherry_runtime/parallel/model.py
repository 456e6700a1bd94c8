"""The first rank's model: it tells the others what to compute, and computes its own part."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from wherry_runtime.engine.prepared import Prepared
from wherry_runtime.engine.runner import Cache, Model
from wherry_runtime.engine.sampling import Sampler
from wherry_runtime.parallel.wire import Go, Message, Prepare, Range, Scrub
from wherry_runtime.scheduling.plan import UNKNOWN, SequenceStep

Send = Callable[[Message], None]


@dataclass(slots=True, frozen=True)
class Sent:
    """A step that the others know of."""

    number: int
    unknown: list[SequenceStep]  # whose last token they do not know yet
    work: Any  # of the part here


class ParallelCache:
    """The KV caches of all ranks, which hold the same blocks of their own heads."""

    def __init__(self, own: Cache, send: Send) -> None:
        self._own = own
        self._send = send
        self.block_size = own.block_size

    def scrub(self, blocks: list[int]) -> None:
        self._send(Scrub(blocks))
        self._own.scrub(blocks)


class ParallelModel:
    """A `Model` of which this rank computes a part.

    Args:
        own: this rank's.
        send: sends to all others, in order.
        fail: ends the group, with the reason.
    """

    def __init__(self, own: Model, send: Send, fail: Callable[[str], None]) -> None:
        self.own = own
        self.cache = ParallelCache(own.cache, send)
        self._send = send
        self._fail = fail
        self._numbers = itertools.count(1)

    @property
    def workspace_bytes(self) -> int:
        """Of this rank."""
        return int(getattr(self.own, "workspace_bytes", 0))

    @property
    def sampler(self) -> Sampler | None:
        return self.own.sampler

    def prepare(self, prepared: Prepared) -> Sent:
        """Tells the others of the step, so that they prepare it while this rank does."""
        number = next(self._numbers)
        ranges = [Range(s.tokens, s.start, s.blocks.astype("<i4").tobytes(), s.samples) for s in prepared.sequences]
        self._send(Prepare(number, ranges))
        unknown = [s for s in prepared.sequences if s.tokens[-1] == UNKNOWN]
        return Sent(number, unknown, self.own.prepare(prepared))

    def logits(self, prepared: Prepared) -> Iterator[torch.Tensor]:
        """Begins the step everywhere. Every rank computes all of it, also when nobody wants the rest of it here; the
        group ends with a step that one of them cannot compute."""
        sent: Sent = prepared.work
        self._send(Go(sent.number, [s.tokens[-1] for s in sent.unknown]))
        parts = self._computed(replace(prepared, work=sent.work))
        try:
            for part in parts:  # noqa: UP028 - `yield from` would end them too
                yield part
        finally:
            for _ in parts:
                pass

    def _computed(self, prepared: Prepared) -> Iterator[torch.Tensor]:
        try:
            yield from self.own.logits(prepared)
        except Exception as e:  # out of memory, for one: the others are in the middle of the step
            self._fail(f"step_failed: {type(e).__name__}: {e}")
            raise


def steps_of(message: Prepare) -> list[SequenceStep]:
    """What `ParallelModel.prepare` sent."""
    return [
        SequenceStep("", r.tokens, r.start, np.frombuffer(r.blocks, "<i4").astype(np.int32), r.samples)
        for r in message.ranges
    ]
