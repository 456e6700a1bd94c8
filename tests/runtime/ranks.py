"""Several ranks of a model in one process, each a thread, on any backend."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.runtime.engines import VOCAB_SIZE

from wherry_runtime.engine.eager_model import EagerModel
from wherry_runtime.engine.runner import Model, ModelRunner
from wherry_runtime.kernels.cpu.model import CAPACITY, NativeModel
from wherry_runtime.kernels.cpu.ranks import DistributedRanks, SharedMemoryRanks, shared_bytes
from wherry_runtime.kvcache.formats import format_of
from wherry_runtime.kvcache.native import NativeKVCache
from wherry_runtime.kvcache.paged import PagedKVCache
from wherry_runtime.loading.config import ModelConfig
from wherry_runtime.loading.loader import load_model
from wherry_runtime.parallel.shard import Shard, Span
from wherry_runtime.quantization.storage import Storage
from wherry_runtime.scheduling.plan import SequenceStep

BLOCKS, BLOCK_SIZE = 16, 16


class Meeting:
    """Collectives between threads."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=60)
        self._brought: list[Any] = [None] * size

    def of(self, rank: int) -> "InThread":
        return InThread(self, rank)

    def exchange(self, rank: int, x: torch.Tensor) -> list[torch.Tensor]:
        self._brought[rank] = x.clone()
        self._barrier.wait()
        everything = list(self._brought)
        self._barrier.wait()
        return everything


class InThread:
    """A `Collective`."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self._meeting = meeting
        self._rank = rank

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        parts = self._meeting.exchange(self._rank, x)
        x.copy_(sum(parts[1:], start=parts[0]))
        return x

    def gather(self, x: torch.Tensor, columns: Span) -> torch.Tensor:
        return torch.cat(self._meeting.exchange(self._rank, x), dim=1) if self._rank == 0 else self._sent(x)

    def _sent(self, x: torch.Tensor) -> torch.Tensor:
        self._meeting.exchange(self._rank, x)
        return x


@dataclass
class Checkpoint:
    """A checkpoint; `positions`: the context to serve."""

    directory: Path
    config: ModelConfig
    positions: int = 256

    def storage(self, backend: str, quantization: str = "none", dtype: torch.dtype = torch.float32) -> Storage:
        return Storage(dtype, torch.device("cpu"), quantization, native=backend != "pytorch")  # type: ignore[arg-type]

    def rank(self, shard: Shard, storage: Storage, make: Callable[[Any, Any], Model]) -> ModelRunner:
        model = load_model(self.directory, self.config, self.positions, storage, shard=shard)
        if storage.native:
            cache: Any = NativeKVCache(model.config, BLOCKS, BLOCK_SIZE, stored=format_of(torch.float32))
        else:
            cache = PagedKVCache(model.config, BLOCKS, BLOCK_SIZE, dtype=torch.float32, device=torch.device("cpu"))
        return ModelRunner(make(model, cache))


def group(checkpoint: Checkpoint, size: int, backend: str, **how: Any) -> list[ModelRunner]:
    """All ranks. `backend`: pytorch, or native through shared memory or a collective (shared, distributed)."""
    meeting = Meeting(size)
    memory = torch.zeros(shared_bytes(size, checkpoint.config, CAPACITY), dtype=torch.uint8)

    def make(shard: Shard) -> Callable[[Any, Any], Model]:
        config = checkpoint.config
        if size == 1:
            return (lambda m, c: EagerModel(m, c)) if backend == "pytorch" else (lambda m, c: NativeModel(m, c, 2))
        if backend == "pytorch":
            return lambda m, c: EagerModel(m, c, meeting.of(shard.rank))
        if backend == "shared":
            return lambda m, c: NativeModel(m, c, 1, SharedMemoryRanks(memory, shard, config, CAPACITY, 1))
        return lambda m, c: NativeModel(m, c, 1, DistributedRanks(meeting.of(shard.rank), config, CAPACITY))

    storage = lambda: checkpoint.storage(backend, **how)  # noqa: E731 - each rank has its own
    return [checkpoint.rank(shard, storage(), make(shard)) for shard in Shard(0, size).everyone()]


def together(ranks: list[ModelRunner], sequences: list[SequenceStep]) -> torch.Tensor:
    """The step's logits, on the first rank."""
    with ThreadPoolExecutor(len(ranks)) as threads:
        found = [threads.submit(rank.logits, sequences) for rank in ranks]
        logits = [f.result(timeout=120)[0] for f in found]
    return logits[0].clone()


def steps() -> Iterator[list[SequenceStep]]:
    """A long prompt, another one in chunks beside its decodes, and decodes."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, VOCAB_SIZE, (200,), generator=generator).tolist()
    first, second = (np.arange(start, start + 8, dtype=np.int32) for start in (0, 8))
    yield [SequenceStep("a", ids[:90], 0, first, samples=True)]
    yield [
        SequenceStep("a", ids[90:91], 90, first, samples=True),
        SequenceStep("b", ids[100:117], 0, second, samples=False),
    ]
    for i in range(3):
        yield [
            SequenceStep("a", ids[91 + i : 92 + i], 91 + i, first, samples=True),
            SequenceStep("b", ids[117 + i : 118 + i], 17 + i, second, samples=True),
        ]
