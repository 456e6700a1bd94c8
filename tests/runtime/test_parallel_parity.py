"""Several ranks against one: same logits, same tokens, for every family, format and way of meeting.

Ranks are threads here; `test_parallel_group.py` has processes.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from tests.runtime.engines import TINY, VOCAB_SIZE
from tests.runtime.random_models import CASES, Case

from wherry_runtime.engine.eager_model import EagerModel
from wherry_runtime.engine.runner import Model, ModelRunner
from wherry_runtime.kernels.cpu.model import CAPACITY, NativeModel
from wherry_runtime.kernels.cpu.ranks import DistributedRanks, SharedMemoryRanks, shared_bytes
from wherry_runtime.kvcache.formats import format_of
from wherry_runtime.kvcache.native import NativeKVCache
from wherry_runtime.kvcache.paged import PagedKVCache
from wherry_runtime.loading.config import ModelConfig
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.loading.loader import load_model
from wherry_runtime.models.registry import read_config
from wherry_runtime.parallel.shard import Shard, Span, check
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
    directory: Path
    config: ModelConfig

    def storage(self, backend: str, quantization: str = "none", dtype: torch.dtype = torch.float32) -> Storage:
        return Storage(dtype, torch.device("cpu"), quantization, native=backend != "pytorch")  # type: ignore[arg-type]

    def rank(self, shard: Shard, storage: Storage, make: Callable[[Any, Any], Model]) -> ModelRunner:
        model = load_model(self.directory, self.config, 256, storage, shard=shard)
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


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    case: Case = request.param
    directory = tmp_path_factory.mktemp(case.name)
    case.build(directory)
    return Checkpoint(directory, read_config(directory))


@pytest.mark.parametrize("backend", ["pytorch", "shared", "distributed"])
@pytest.mark.parametrize("size", [2, 4])
def test_logits_are_those_of_one_rank(checkpoint: Checkpoint, backend: str, size: int) -> None:
    one, many = group(checkpoint, 1, backend), group(checkpoint, size, backend)
    for sequences in steps():
        want, got = together(one, sequences), together(many, sequences)
        assert got.shape == want.shape == (sum(s.samples for s in sequences), VOCAB_SIZE)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
        assert got.argmax(-1).tolist() == want.argmax(-1).tolist()


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("size", [2, 4])
def test_quantized_weights(checkpoint: Checkpoint, quantization: str, size: int) -> None:
    """Shares that begin within a group of weights have other scales than the whole, so only about the same numbers."""
    one = group(checkpoint, 1, "shared", quantization=quantization)
    many = group(checkpoint, size, "shared", quantization=quantization)
    for sequences in steps():
        want, got = together(one, sequences), together(many, sequences)
        similarity = torch.nn.functional.cosine_similarity(got, want, dim=-1)
        assert similarity.min() > (0.995 if quantization == "int8" else 0.9)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "fits"),
    [
        (32, 4, 1, True),
        (32, 4, 2, True),
        (32, 4, 4, True),
        (32, 4, 8, True),  # two ranks hold the same head of keys
        (32, 4, 3, False),
        (32, 4, 64, False),  # fewer heads than ranks
        (12, 4, 6, False),  # a rank's queries would need keys of two ranks
        (12, 4, 12, True),
        (14, 2, 7, False),
        (14, 2, 2, True),
        (32, 4, 0, False),
    ],
)
def test_what_can_be_split(heads: int, kv_heads: int, size: int, fits: bool) -> None:
    config = msgspec.structs.replace(read_config(TINY), num_heads=heads, num_kv_heads=kv_heads, vocab_size=32000)
    if fits:
        check(config, size)
        return
    with pytest.raises(ModelError, match=f"over {size} ranks; it can over 1, "):
        check(config, size)


@pytest.mark.parametrize(
    ("total", "unit", "size", "shares"),
    [
        (5632, 128, 2, [2816, 2816]),
        (5632, 128, 4, [1408] * 4),
        (4864, 128, 4, [1152, 1280, 1152, 1280]),
        (160, 128, 2, [80, 80]),
        (32000, 64, 3, [10624, 10688, 10688]),
        (100, 64, 1, [100]),
        (130, 64, 2, [64, 66]),
    ],
)
def test_shares(total: int, unit: int, size: int, shares: list[int]) -> None:
    spans = [shard.span(total, unit) for shard in Shard(0, size).everyone()]
    assert [s.length for s in spans] == shares
    assert spans[0].start == 0
    assert all(a.stop == b.start for a, b in pairwise(spans))
    assert spans[-1].stop == total
