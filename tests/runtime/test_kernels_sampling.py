"""Native argmax and sampling against engine/sampling.py."""

import numpy as np
import pytest
import torch

from wherry_runtime.engine.rng import gumbel_noise
from wherry_runtime.engine.sampling import keep_likely
from wherry_runtime.kernels.cpu import library, sampling
from wherry_runtime.kernels.cpu.library import Pool, Program, Step

pytestmark = pytest.mark.skipif(not library.available(), reason="the native library is not built")

# Noise of up to 23 is computed to about 2 units in the last place.
NEAR_TIE = 1e-5


class Sampler:
    """The three calls over rows of `vocab_size` logits."""

    def __init__(self, rows: int, vocab_size: int, threads: int = 2) -> None:
        self.logits = torch.full((rows, -(-vocab_size // 64) * 64), 1e9)  # columns beyond must not count
        self.vocab_size = vocab_size
        self.tokens = torch.zeros(rows, dtype=torch.int64)
        self.finite = torch.zeros(rows, dtype=torch.uint8)
        tensor = sampling.params_tensor(rows)
        self.params = sampling.params_of(tensor)
        scratch, work = sampling.scratch(rows, vocab_size), sampling.work(threads, vocab_size)
        stride = self.logits.shape[1]
        numbers = [vocab_size, stride]
        self.program = Program(Pool(threads))
        self.program.add("argmax", [self.logits, scratch, self.tokens, self.finite], numbers)
        self.program.add("sample_filter", [self.logits, tensor, scratch, work], [*numbers, work.shape[1]])
        self.program.add("sample_draw", [self.logits, tensor, scratch, self.tokens], numbers)

    def run(self, logits: torch.Tensor) -> list[int]:
        rows = len(logits)
        self.logits[:rows, : self.vocab_size] = logits
        self.program.run(Step(rows, sampled_rows=np.arange(rows)))
        return self.tokens[:rows].tolist()


def expected(row: torch.Tensor, params: "np.void") -> tuple[int, torch.Tensor]:
    """The reference's token, and what it is the highest of."""
    temperature = float(params["temperature"])
    if not temperature:
        return int(row.argmax()), row
    scores = keep_likely(row / temperature, int(params["top_k"]), float(params["top_p"]), float(params["min_p"]))
    sums = scores + gumbel_noise(int(params["seed"]), int(params["position"]), len(row))
    return int(sums.argmax()), sums


def check(tokens: list[int], logits: torch.Tensor, params: "np.ndarray[tuple[int], np.dtype[np.void]]") -> int:
    """How many rows differ, each by a near tie only."""
    different = 0
    for token, row, setting in zip(tokens, logits, params, strict=False):
        wanted, sums = expected(row, setting)
        if token != wanted:
            different += 1
            assert sums[wanted] - sums[token] < NEAR_TIE, (token, wanted, setting)
    return different


def fill(params: "np.ndarray[tuple[int], np.dtype[np.void]]", seed: int, **settings: float) -> None:
    generator = np.random.default_rng(seed)
    params["top_p"] = 1.0
    params["seed"] = generator.integers(0, 1 << 64, len(params), dtype=np.uint64)
    params["position"] = generator.integers(0, 100_000, len(params))
    for name, value in {"temperature": 1.0, "top_k": 0, "min_p": 0.0, **settings}.items():
        params[name] = value


class TestArgmax:
    @pytest.mark.parametrize("vocab_size", [1, 15, 16, 320, 4096, 4097, 8192, 32000, 151936])
    @pytest.mark.parametrize("rows", [1, 3, 64])
    def test_first_of_the_highest(self, vocab_size: int, rows: int) -> None:
        if rows * vocab_size > 3_000_000:
            rows = 16
        sampler = Sampler(rows, vocab_size)
        for _ in range(2):
            logits = torch.randint(-50, 50, (rows, vocab_size)).float()  # many ties
            highest = logits.amax(dim=-1, keepdim=True)
            assert sampler.run(logits) == (logits == highest).int().argmax(dim=-1).tolist()
            assert sampler.finite.all()

    def test_what_is_not_finite(self) -> None:
        sampler = Sampler(6, 5000)
        logits = torch.randn(6, 5000)
        logits[0, 4999] = float("nan")
        logits[1, 17] = float("inf")
        logits[2] = float("-inf")
        logits[3, 5:] = float("-inf")
        logits[4, :] = float("nan")
        sampler.params["temperature"] = 1.0
        sampler.run(logits)
        assert sampler.finite.tolist() == [0, 0, 0, 1, 0, 1]
        assert all(0 <= t < 5000 for t in sampler.tokens.tolist())


SETTINGS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.3},
    {"temperature": 2.0},
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 5000, "temperature": 1.5},
    {"top_p": 0.9},
    {"top_p": 0.1},
    {"top_p": 0.999, "temperature": 3.0},
    {"min_p": 0.05},
    {"top_k": 40, "top_p": 0.95, "min_p": 0.02, "temperature": 0.7},
    {"top_k": 1 << 40, "top_p": 0.0, "min_p": 1.0},
]


class TestDraw:
    @pytest.mark.parametrize("settings", SETTINGS, ids=str)
    @pytest.mark.parametrize("spread", [0.5, 3.0])
    def test_tokens_are_the_references(self, settings: dict[str, float], spread: float) -> None:
        rows = 64
        sampler = Sampler(rows, 8192)
        fill(sampler.params, 1, **settings)
        logits = torch.randn(rows, 8192, generator=torch.Generator().manual_seed(2)) * spread
        tokens = sampler.run(logits)
        assert sampler.finite.all()
        assert check(tokens, logits, sampler.params) <= 1
        if settings.get("temperature") != 0.0 and not {"top_k", "top_p"} & set(settings):
            assert len(set(tokens)) > 1

    @pytest.mark.parametrize("vocab_size", [1, 9, 320, 4097, 151936])
    def test_sizes(self, vocab_size: int) -> None:
        sampler = Sampler(4, vocab_size, threads=3)
        fill(sampler.params, 3, top_p=0.95)
        logits = torch.randn(4, vocab_size) * 2
        check(sampler.run(logits), logits, sampler.params)

    def test_many_rows(self) -> None:
        """Near ties are rare: none or so in thousands of draws."""
        sampler = Sampler(64, 1000)
        different = 0
        for seed in range(40):
            fill(sampler.params, seed)
            logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(seed)) * 2
            different += check(sampler.run(logits), logits, sampler.params)
        assert different <= 2

    def test_a_row_never_depends_on_the_others(self) -> None:
        rows = 20
        logits = torch.randn(rows, 5000) * 2
        many = Sampler(rows, 5000, threads=3)
        fill(many.params, 7, top_p=0.9)
        many.params["temperature"][::3] = 0.0
        tokens = many.run(logits)
        one = Sampler(1, 5000, threads=1)
        for row in range(rows):
            one.params[0] = many.params[row]
            assert one.run(logits[row : row + 1]) == [tokens[row]]

    def test_masked_tokens_are_never_drawn(self) -> None:
        sampler = Sampler(32, 300)
        fill(sampler.params, 9, temperature=5.0)
        logits = torch.zeros(32, 300)
        logits[:, 3:] = float("-inf")
        assert set(sampler.run(logits)) == {0, 1, 2}
