"""Attention in Triton against float64: decodes, chunks at any offset, grouped queries, windows, every type of cache."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.runtime.cuda_models import DEVICE
from tests.runtime.native_attention import model_config

from wherry_runtime.attention.paged import write_cache
from wherry_runtime.engine.runner import ModelRunner
from wherry_runtime.kernels import reference
from wherry_runtime.kernels.cuda.attention_decode import Partials
from wherry_runtime.kernels.cuda.attention_prefill import tokens_per_tile
from wherry_runtime.kernels.cuda.ops import CudaOps, Fixed
from wherry_runtime.kernels.cuda.rope_cache import CacheView
from wherry_runtime.kernels.cuda.step import Step, pack
from wherry_runtime.kvcache.formats import FORMATS
from wherry_runtime.kvcache.paged import PagedKVCache
from wherry_runtime.layers.rope import Rope
from wherry_runtime.models.ops import Attention
from wherry_runtime.parallel.collective import Alone
from wherry_runtime.scheduling.plan import SequenceStep

CONTEXT = 700


@dataclass(frozen=True)
class Case:
    """`parts`: for each sequence, how many tokens are in the cache and how many come."""

    heads: int
    kv_heads: int
    dim: int
    parts: tuple[tuple[int, int], ...]
    stored: str = "float32"
    window: int | None = None
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    atol: float = 1e-5

    def __str__(self) -> str:
        window = f"-window{self.window}" if self.window else ""
        return f"{self.heads}/{self.kv_heads}x{self.dim}-{len(self.parts)}-{self.stored}{window}"


def decodes(*lengths: int) -> tuple[tuple[int, int], ...]:
    return tuple((length - 1, 1) for length in lengths)


MIXED = (*decodes(1, 40), (0, 7), (37, 21))
CASES = [
    Case(4, 4, 64, decodes(*range(1, 18))),
    Case(8, 2, 80, decodes(300, 3, 64, 65)),
    Case(8, 1, 128, decodes(257, 256)),
    Case(8, 1, 128, MIXED),
    Case(4, 4, 64, MIXED),
    Case(7, 1, 96, ((130, 20), (0, 1))),
    Case(2, 1, 256, (*decodes(30), (10, 3))),
    Case(6, 2, 24, MIXED, window=5),
    Case(8, 2, 64, (*decodes(600, 20), (100, 40)), window=70, block_size=4),
    Case(8, 2, 64, MIXED, stored="bfloat16", atol=0.04),
    Case(8, 2, 64, MIXED, stored="float16", dtype=torch.float16, atol=5e-3),
    Case(8, 2, 64, MIXED, stored="bfloat16", dtype=torch.bfloat16, atol=0.06),
    Case(8, 2, 80, MIXED, stored="fp8", window=33),
    Case(8, 2, 80, MIXED, stored="int8", window=33),
    Case(8, 2, 128, decodes(270, 5), stored="int8"),
    Case(8, 2, 128, (*decodes(270, 5), (20, 4)), stored="fp8", dtype=torch.float16, atol=5e-3),
]


class Layer:
    """A layer with a cache in which every sequence's earlier tokens lie, put there by PyTorch."""

    def __init__(self, case: Case) -> None:
        config = model_config(case.heads, case.kv_heads, case.dim, CONTEXT)
        needed = [-(-(start + count) // case.block_size) for start, count in case.parts]
        self.case = case
        self.cache = PagedKVCache(config, sum(needed) + 2, case.block_size, dtype=FORMATS[case.stored], device=DEVICE)
        if not FORMATS[case.stored].quantized:  # what earlier owners left must not matter
            self.cache.layers[0].fill_(float("nan"))
        self.rope = Rope(config.rope, case.dim, CONTEXT, dtype=torch.float32, device=DEVICE)
        self.attention = Attention(0, case.heads, case.kv_heads, case.dim, case.window, None, None)
        order = torch.randperm(sum(needed) + 2, generator=torch.Generator().manual_seed(5)).to(torch.int32).numpy()
        ends = np.cumsum(needed)
        self.blocks = [order[end - count : end] for end, count in zip(ends, needed, strict=True)]
        generator = torch.Generator().manual_seed(9)
        width = (case.heads + 2 * case.kv_heads) * case.dim
        self.qkv = [torch.randn(sum(part), width, generator=generator).to(DEVICE, case.dtype) for part in case.parts]
        for qkv in self.qkv:  # for a softmax that is not flat
            qkv[:, : case.heads * case.dim] *= 2
        for qkv, blocks, (start, _) in zip(self.qkv, self.blocks, case.parts, strict=True):
            _, keys, values = self.rotated(qkv[:start])
            places = torch.arange(start)
            slots = torch.from_numpy(blocks).long()[places // case.block_size] * case.block_size
            rows = torch.cat((keys, values), dim=1).float()
            write_cache(self.cache.layers[0], (slots + places % case.block_size).to(DEVICE), rows)

    def rotated(self, qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values from position 0 on, in float64."""
        case = self.case
        heads = qkv.double().view(len(qkv), case.heads + 2 * case.kv_heads, case.dim)
        query, key, value = heads.split([case.heads, case.kv_heads, case.kv_heads], dim=1)
        cos, sin = (t[: len(qkv)].double().to(DEVICE) for t in self.rope.tables())
        return reference.rotate(query, cos, sin), reference.rotate(key, cos, sin), value

    def expected(self, index: int) -> torch.Tensor:
        """The new rows of a sequence: [count, heads * dim] float64."""
        start, _ = self.case.parts[index]
        query, key, value = self.rotated(self.qkv[index])
        stored = FORMATS[self.case.stored]
        key, value = (reference.as_kept(x.float(), stored).double().cpu() for x in (key, value))
        return reference.attention(query[start:].cpu(), key, value, start, self.case.window)

    def found(self, programs: int) -> dict[int, torch.Tensor]:
        """The new rows of each sequence."""
        case = self.case
        steps = [
            SequenceStep(str(i), [0] * count, start, self.blocks[i], True)
            for i, (start, count) in enumerate(case.parts)
        ]
        runner = ModelRunner(SimpleNamespace(cache=self.cache, sampler=None, prepare=lambda prepared: None))  # type: ignore[arg-type]
        prepared = runner.prepare(steps)
        packed = pack(prepared, (case.window,), case.block_size, tokens_per_tile(case.heads, case.kv_heads))
        memory = torch.from_numpy(packed.numbers).to(DEVICE)
        tables = tuple(t.to(DEVICE) for t in self.rope.tables())
        fixed = Fixed([CacheView.of(self.cache, 0)], case.block_size, tables, programs, Alone())  # type: ignore[arg-type]
        partials = Partials.of(packed.items, case.heads, case.dim, DEVICE)
        order = [int(s.request_id) for s in prepared.sequences]
        rows = torch.cat([self.qkv[i][case.parts[i][0] :] for i in order])
        out = CudaOps(fixed, Step.of(memory, packed.shape), partials).attend(self.attention, rows)
        return dict(zip(order, out.split([case.parts[i][1] for i in order]), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(case: Case) -> None:
    layer = Layer(case)
    for index, rows in layer.found(programs=2).items():
        torch.testing.assert_close(rows.double().cpu(), layer.expected(index), atol=case.atol, rtol=0)


def test_a_decode_does_not_depend_on_the_batch_nor_on_who_computes_it() -> None:
    """Bit for bit: alone, among others, and however many programs share the work."""
    case = Case(8, 2, 64, decodes(300, 17, 530))
    together = Layer(case).found(programs=2)
    assert torch.equal(Layer(case).found(programs=7)[2], together[2])
    layer = Layer(case)
    alone = Layer(replace(case, parts=case.parts[2:]))
    alone.qkv, alone.blocks, alone.cache = layer.qkv[2:], layer.blocks[2:], layer.cache
    assert torch.equal(alone.found(programs=1)[0], together[2])
