"""Sampling on the native kernels against engine/sampling.py on PyTorch."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from wherry_protocol.worker import SamplingParams
from wherry_runtime.engine.live import Live
from wherry_runtime.engine.rng import gumbel_noise
from wherry_runtime.engine.sampling import (
    BadLogitsError,
    Place,
    Sampled,
    TorchSampler,
    accept,
    keep_likely,
    sample,
)
from wherry_runtime.kernels.cpu import library
from wherry_runtime.kernels.cpu.library import Pool, Program, Step
from wherry_runtime.kernels.cpu.sampling import NativeSampler
from wherry_runtime.scheduling.request import Request

pytestmark = pytest.mark.skipif(not library.available(), reason="the native library is not built")

# Noise of up to 23 is computed to about 2 units in the last place.
NEAR_TIE = 1e-5


class Native:
    """A head that only looks for the likeliest, and the sampler behind it."""

    def __init__(self, rows: int, vocab_size: int, threads: int = 2) -> None:
        self.buffer = torch.full((rows, -(-vocab_size // 64) * 64), 1e9)  # columns beyond must not count
        self.vocab_size = vocab_size
        self.head = Program(Pool(threads))
        self.sampler = NativeSampler(self.head, self.buffer, vocab_size)

    def sample(self, logits: torch.Tensor, places: list[Place]) -> list[Sampled | BadLogitsError]:
        rows = len(logits)
        view = self.buffer[:rows, : self.vocab_size]
        view.copy_(logits)
        self.head.run(Step(rows, sampled_rows=np.arange(rows)))
        return sample(view, places, self.sampler)

    def tokens(self, logits: torch.Tensor, places: list[Place]) -> list[int]:
        return tokens_of(self.sample(logits, places))


def tokens_of(results: list[Sampled | BadLogitsError]) -> list[int]:
    assert all(isinstance(r, Sampled) for r in results)
    return [r.token for r in results if isinstance(r, Sampled)]


def new_live(seed: int = 5, tokens: int = 4, answer: int = 0, **params: Any) -> Live:
    """A request with a prompt of `tokens`, and an answer so far."""
    stop_ids = params.pop("stop_ids", frozenset())
    live = Live(Request(f"r{seed}", [*range(tokens)], 1000), SamplingParams(**params), seed, stop_ids)
    for token in range(answer):
        live.note_token(token)
    return live


def places(count: int, seed: int, **params: Any) -> list[Place]:
    generator = np.random.default_rng(seed)
    seeds = generator.integers(-(1 << 62), 1 << 62, count).tolist()
    return [Place(new_live(s, t, **params)) for s, t in zip(seeds, generator.integers(1, 3000, count), strict=True)]


def check(tokens: list[int], logits: torch.Tensor, where: list[Place]) -> int:
    """How many rows differ from the reference, each by a near tie only."""
    different = 0
    expected = tokens_of(sample(logits.clone(), where, TorchSampler()))
    for token, wanted, row, place in zip(tokens, expected, logits, where, strict=True):
        if token != wanted:
            different += 1
            params = place.live.params
            scores = keep_likely(row / params.temperature, params.top_k, params.top_p, params.min_p)
            sums = scores + gumbel_noise(place.live.seed, place.live.num_tokens, len(row))
            assert sums[wanted] - sums[token] < NEAR_TIE, (token, wanted, params)
    return different


class TestArgmax:
    @pytest.mark.parametrize("vocab_size", [1, 15, 16, 320, 4096, 4097, 8192, 32000, 151936])
    @pytest.mark.parametrize("rows", [1, 3, 64])
    def test_first_of_the_highest(self, vocab_size: int, rows: int) -> None:
        if rows * vocab_size > 3_000_000:
            rows = 16
        native = Native(rows, vocab_size)
        where = places(rows, 1, temperature=0.0)
        for _ in range(2):
            logits = torch.randint(-50, 50, (rows, vocab_size)).float()  # many ties
            highest = logits.amax(dim=-1, keepdim=True)
            assert native.tokens(logits, where) == (logits == highest).int().argmax(dim=-1).tolist()

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_what_is_not_finite(self, temperature: float) -> None:
        native = Native(6, 5000)
        logits = torch.randn(6, 5000)
        logits[0, 4999] = math.nan
        logits[1, 17] = math.inf
        logits[2] = -math.inf
        logits[3, 5:] = -math.inf
        logits[4, :] = math.nan
        where = places(6, 1, temperature=temperature)
        results = native.sample(logits, where)
        expected = sample(logits.clone(), where, TorchSampler())
        assert [isinstance(r, BadLogitsError) for r in results] == [True, True, True, False, True, False]
        assert [str(r) for r in results] == [str(r) for r in expected]


SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 1e-300},
    {"temperature": 1e-19},
    {"temperature": 0.3},
    {"temperature": 2.0},
    {"temperature": 100.0},
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 5000, "temperature": 1.5},
    {"top_k": 8191},
    {"top_k": 8192},
    {"top_p": 0.9},
    {"top_p": 0.1},
    {"top_p": 0.999, "temperature": 3.0},
    {"min_p": 0.05},
    {"top_k": 40, "top_p": 0.95, "min_p": 0.02, "temperature": 0.7},
    {"top_k": 1 << 31, "top_p": 1e-9, "min_p": 1.0},
]


class TestDraw:
    @pytest.mark.parametrize("settings", SETTINGS, ids=str)
    @pytest.mark.parametrize("spread", [0.5, 3.0])
    def test_tokens_are_the_references(self, settings: dict[str, Any], spread: float) -> None:
        native = Native(64, 8192)
        where = places(64, 1, **settings)
        logits = torch.randn(64, 8192, generator=torch.Generator().manual_seed(2)) * spread
        tokens = native.tokens(logits, where)
        assert check(tokens, logits, where) <= 1
        if settings.get("temperature", 1) >= 0.3 and not {"top_k", "top_p"} & set(settings):
            assert len(set(tokens)) > 1

    @pytest.mark.parametrize("vocab_size", [1, 9, 320, 4097, 151936])
    @pytest.mark.parametrize("settings", [{"top_p": 0.95}, {"top_k": 7}, {}], ids=str)
    def test_sizes(self, vocab_size: int, settings: dict[str, Any]) -> None:
        native = Native(4, vocab_size, threads=3)
        where = places(4, 3, **settings)
        logits = torch.randn(4, vocab_size) * 2
        check(native.tokens(logits, where), logits, where)

    @pytest.mark.parametrize("settings", [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 1.0}, {}], ids=str)
    def test_ties(self, settings: dict[str, Any]) -> None:
        """Those with the k-th stay, and so do those at the edge of the nucleus."""
        native = Native(64, 5000)
        logits = torch.full((64, 5000), -8.0)
        logits[:, 100:4900:100] = 2.0
        where = places(64, 3, **settings)
        tokens = native.tokens(logits, where)
        assert check(tokens, logits, where) <= 1
        assert len(set(tokens)) > 20

    def test_many_rows(self) -> None:
        """Near ties are rare: none or so in thousands of draws."""
        native = Native(64, 1000)
        different = 0
        for seed in range(40):
            where = places(64, seed)
            logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(seed)) * 2
            different += check(native.tokens(logits, where), logits, where)
        assert different <= 2

    def test_a_row_never_depends_on_the_others(self) -> None:
        rows = 20
        logits = torch.randn(rows, 5000) * 2
        where = places(rows, 7, top_p=0.9)
        where[::3] = places(len(where[::3]), 8, temperature=0.0)
        where[1] = Place(new_live(9, 30, 4, presence_penalty=1.5))
        tokens = Native(rows, 5000, threads=3).tokens(logits, where)
        one = Native(1, 5000, threads=1)
        for row in range(rows):
            assert one.tokens(logits[row : row + 1], where[row : row + 1]) == [tokens[row]]

    def test_masked_tokens_are_never_drawn(self) -> None:
        logits = torch.zeros(32, 300)
        logits[:, 3:] = -math.inf
        assert set(Native(32, 300).tokens(logits, places(32, 9, temperature=5.0))) == {0, 1, 2}


ADJUSTED: list[dict[str, Any]] = [
    {"temperature": 0.0, "repetition_penalty": 1.5, "answer": 6},
    {"temperature": 0.0, "logit_bias": {17: 100.0}, "logprobs": 3},
    {"temperature": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.7, "answer": 9, "logprobs": 0},
    {"temperature": 0.7, "top_k": 9, "repetition_penalty": 1.3, "min_tokens": 5, "stop_ids": frozenset([3, 4, 5])},
    {"temperature": 0.0, "min_tokens": 5, "stop_ids": frozenset([2, 9])},
    {"temperature": 1.0, "logit_bias": {5: 9.0, 6: 9.0}, "top_p": 0.8, "logprobs": 20},
    {"temperature": 0.0, "logprobs": 2},
    {"temperature": 0.0},
    {},
]


def test_penalties_biases_and_log_probabilities() -> None:
    where = [Place(new_live(seed, **params)) for seed, params in enumerate(ADJUSTED)]
    native = Native(len(where), 400)
    for step in range(20):
        logits = torch.randn(len(where), 400, generator=torch.Generator().manual_seed(step)) * 3
        results = native.sample(logits, where)
        assert results == sample(logits.clone(), where, TorchSampler())
        for place, token in zip(where, tokens_of(results), strict=True):
            place.live.note_token(token)


def test_everything_forbidden_still_draws_a_token() -> None:
    stop_ids = frozenset([0, 1])
    for temperature in (0.0, 1.0):
        live = new_live(1, min_tokens=50, stop_ids=stop_ids, temperature=temperature, top_p=0.5, top_k=1)
        assert Native(1, 2).tokens(torch.zeros(1, 2), [Place(live)])[0] in (0, 1)


@pytest.mark.parametrize(
    "params",
    [{"temperature": 0.0}, {}, {"temperature": 0.8, "presence_penalty": 0.4, "frequency_penalty": 0.9, "logprobs": 2}],
    ids=str,
)
def test_checking_guesses_draws_what_steps_without_them_draw(params: dict[str, Any]) -> None:
    native = Native(8, 60)
    table = torch.randn(60, 60, generator=torch.Generator().manual_seed(4)) * 2
    drafted, plain = new_live(3, **params), new_live(3, **params)
    newest, answer = 3, []
    for _ in range(40):
        (drawn,) = native.sample(table[newest][None], [Place(plain)])
        assert isinstance(drawn, Sampled)
        answer.append(drawn)
        newest = drawn.token
        plain.note_token(newest)
    newest, left = 3, list(answer)
    for step in range(100):
        if not left:
            break
        guesses = [(d.token + (i == step % 4)) % 60 for i, d in enumerate(left[: min(5, len(left) - 1)])]
        rows = torch.stack([table[t] for t in [newest, *guesses]])
        results = native.sample(rows, [Place(drafted, guesses[:i]) for i in range(len(guesses) + 1)])
        run = accept(results, drafted, guesses).tokens if guesses else tokens_and(results)
        assert run == left[: len(run)]
        assert run
        for item in run:
            drafted.note_token(item.token)
        newest, left = run[-1].token, left[len(run) :]
    assert not left


def tokens_and(results: list[Sampled | BadLogitsError]) -> list[Sampled]:
    return [r for r in results if isinstance(r, Sampled)]
