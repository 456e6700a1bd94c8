"""Sampling: distributions, filters and penalties against plain references, and the generator's pinned values."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wherry_protocol.worker import SamplingParams
from wherry_runtime.engine.live import Live
from wherry_runtime.engine.rng import gumbel, gumbel_noise, words
from wherry_runtime.engine.sampling import BadLogitsError, Place, Sampled, TorchSampler, keep_likely, sample
from wherry_runtime.scheduling.request import Request


def live(
    prompt: list[int] | None = None,
    answer: list[int] | None = None,
    stop_ids: frozenset[int] = frozenset(),
    **params: Any,
) -> Live:
    """A request that has answered `answer` so far."""
    request = Request("r", list(prompt or [0]), 100)
    made = Live(request, SamplingParams(**params), seed=params.get("seed") or 0, stop_ids=stop_ids)
    for token in answer or []:
        request.tokens.append(token)
        made.note_token(token)
    return made


def draw(logits: torch.Tensor, row: Live) -> Sampled:
    (result,) = sample_rows(logits.clone()[None], [row])
    assert isinstance(result, Sampled)
    return result


def sample_rows(logits: torch.Tensor, rows: list[Live]) -> list[Sampled | BadLogitsError]:
    return sample(logits, [Place(row) for row in rows], TorchSampler())


PINNED = [149215387, 49592932, 2628306354, 1037445899, 1569730169]
PINNED_LARGE = [190703723, 443238197, 828969709]
PINNED_NOISE = [3.34218, 4.45555, 0.054856, 1.285626, 0.787703]


class TestGenerator:
    def test_pinned_values(self) -> None:
        """A seeded answer must stay the same between releases and machines."""
        assert words(0, 0, 5).tolist() == PINNED
        assert words(1234567890123, 77, 3).tolist() == PINNED_LARGE
        assert words(-1, 3, 3).tolist() == words((1 << 64) - 1, 3, 3).tolist()
        assert gumbel_noise(0, 0, 5).tolist() == pytest.approx(PINNED_NOISE, abs=1e-5)

    def test_longer_vocabularies_only_add(self) -> None:
        assert words(5, 6, 7).tolist() == words(5, 6, 100)[:7].tolist()

    def test_seed_and_position_both_matter(self) -> None:
        draws = [tuple(words(s, p, 4).tolist()) for s in range(10) for p in range(10)]
        assert len(set(draws)) == 100

    def test_noise_is_gumbel(self) -> None:
        """Back to a uniform by the distribution function: chi-square over 64 bins, the 0.1 % point of 63 degrees."""
        values = torch.exp(-torch.exp(-torch.cat([gumbel_noise(9, p, 1000) for p in range(64)])))
        counts = torch.histc(values, 64, 0, 1)
        assert float(((counts - 1000) ** 2 / 1000).sum()) < 103.4

    def test_noise_is_finite_at_the_extremes(self) -> None:
        extremes = np.array([0, 1, 2**31, 2**32 - 2**8, 2**32 - 2, 2**32 - 1], dtype=np.uint32)
        noise = gumbel(extremes)
        assert bool(torch.isfinite(noise).all())
        assert (noise.diff() <= 0).all()
        assert len(set(gumbel(np.arange(1000, dtype=np.uint32)).tolist())) == 1000


def reference_filter(scores: np.ndarray, top_k: int, top_p: float, min_p: float) -> set[int]:
    """Which tokens may be drawn, by definition: one loop a filter."""
    allowed = sorted(range(len(scores)), key=lambda i: -scores[i])
    if top_k:
        allowed = [i for i in allowed if scores[i] >= scores[allowed[min(top_k, len(allowed)) - 1]]]
    if top_p < 1:
        weights = np.exp(scores[allowed] - scores.max())
        weights /= weights.sum()
        kept, total = [], 0.0
        for token, weight in zip(allowed, weights, strict=True):
            kept.append(token)
            total += weight
            if total >= top_p:
                break
        allowed = kept
    if min_p > 0:
        allowed = [i for i in allowed if math.exp(scores[i] - scores.max()) >= min_p * (1 - 1e-6)]
    return set(allowed)


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(2, 600),
    st.floats(0.3, 5),
    st.sampled_from([0, 1, 2, 7, 50, 10**6]),
    st.sampled_from([1.0, 0.95, 0.5, 0.1, 1e-6]),
    st.sampled_from([0.0, 0.01, 0.3, 1.0]),
)
def test_filters_equal_their_definition(
    seed: int, size: int, spread: float, top_k: int, top_p: float, min_p: float
) -> None:
    scores = np.random.default_rng(seed).normal(0, spread, size).astype(np.float32)
    kept = keep_likely(torch.from_numpy(scores), top_k, top_p, min_p)
    allowed = set(torch.isfinite(kept).nonzero()[:, 0].tolist())
    expected = reference_filter(scores.astype(np.float64), top_k, top_p, min_p)
    # A token exactly at the edge of the nucleus may fall on either side of rounding.
    assert len(allowed ^ expected) <= (1 if top_p < 1 else 0)
    assert int(scores.argmax()) in allowed


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(params: dict[str, Any]) -> None:
    """Chi-square of 3000 draws against softmax over the allowed tokens; fixed seeds, so it cannot flake."""
    logits = torch.linspace(3, -2, 20)
    scores = (logits / params["temperature"]).double().numpy()
    allowed = reference_filter(scores, params.get("top_k", 0), params.get("top_p", 1.0), params.get("min_p", 0.0))
    weights = {i: math.exp(scores[i]) for i in allowed}
    draws = 3000
    counts = Counter(draw(logits, live(seed=s, **params)).token for s in range(draws))
    assert set(counts) <= allowed
    statistic = 0.0
    for i, weight in weights.items():
        expected = draws * weight / sum(weights.values())
        statistic += (counts[i] - expected) ** 2 / expected
    freedom = max(1, len(weights) - 1)
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


def test_greedy_takes_the_likeliest_whatever_the_seed() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1))
    for seed in range(20):
        assert draw(logits, live(seed=seed, temperature=0)).token == int(logits.argmax())


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-21, 1e-20, 1e-6])
def test_tiny_temperatures_take_the_likeliest(temperature: float) -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1)) * 100
    for filters in ({}, {"top_p": 0.5}, {"top_k": 3, "min_p": 0.1}):
        assert draw(logits, live(temperature=temperature, **filters)).token == int(logits.argmax())


def test_a_row_does_not_depend_on_its_batch() -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(6, 300, generator=generator)
    rows = [
        live(seed=1),
        live(seed=2, temperature=0),
        live(seed=3, top_p=0.7, logprobs=5),
        live(seed=4, top_k=3, presence_penalty=1.0, answer=[4, 5]),
        live(seed=5, logit_bias={9: 50.0}, repetition_penalty=1.5),
        live(seed=6, min_tokens=5, stop_ids=frozenset([0])),
    ]
    together = sample_rows(logits.clone(), rows)
    alone = [sample_rows(logits[i : i + 1].clone(), [row])[0] for i, row in enumerate(rows)]
    assert together == alone
    backwards = sample_rows(logits.flip(0).clone(), rows[::-1])
    assert backwards[::-1] == alone


def reference_adjust(logits: list[float], prompt: list[int], answer: list[int], params: SamplingParams) -> list[float]:
    """Penalties, token by token, as their definitions say."""
    out = list(logits)
    for token in range(len(out)):
        if token in prompt or token in answer:
            r = params.repetition_penalty
            out[token] = out[token] / r if out[token] > 0 else out[token] * r
        if count := answer.count(token):
            out[token] -= params.presence_penalty + count * params.frequency_penalty
        out[token] += params.logit_bias.get(token, 0.0)
    return out


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-5, 5, width=32), min_size=8, max_size=8),
    st.lists(st.integers(0, 7), min_size=1, max_size=6),
    st.lists(st.integers(0, 7), max_size=12),
    st.floats(-2, 2),
    st.floats(-2, 2),
    st.floats(0.5, 2),
    st.dictionaries(st.integers(0, 7), st.floats(-20, 20), max_size=3),
)
def test_penalties_equal_their_definition(
    logits: list[float],
    prompt: list[int],
    answer: list[int],
    presence: float,
    frequency: float,
    repetition: float,
    bias: dict[int, float],
) -> None:
    row = live(
        prompt,
        answer,
        temperature=0,
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=repetition,
        logit_bias=bias,
    )
    buffer = torch.tensor([logits])
    sample_rows(buffer, [row])  # adjusts in place
    assert buffer[0].tolist() == pytest.approx(reference_adjust(logits, prompt, answer, row.params), abs=1e-4)


def test_stop_tokens_wait_for_min_tokens() -> None:
    logits = torch.tensor([9.0, 1.0, 5.0])
    stop = frozenset([0, 2])
    assert draw(logits, live(answer=[1], stop_ids=stop, temperature=0, min_tokens=2)).token == 1
    assert draw(logits, live(answer=[1, 1], stop_ids=stop, temperature=0, min_tokens=2)).token == 0


def test_logprobs_are_of_the_untouched_logits() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    expected = torch.log_softmax(logits.double(), -1)
    row = live(temperature=0.1, top_k=1, logit_bias={3: 100.0}, logprobs=2)
    result = draw(logits, row)
    assert result.token == 3
    assert result.logprobs is not None
    assert result.logprobs.sampled == pytest.approx(float(expected[3]), abs=1e-6)
    assert result.logprobs.top_ids == [0, 1]
    assert result.logprobs.top == pytest.approx(expected[:2].tolist(), abs=1e-6)
    assert draw(logits, live(logprobs=None)).logprobs is None
    none = draw(logits, live(logprobs=0)).logprobs
    assert none is not None
    assert none.top_ids == []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_output_that_is_not_finite_fails_its_request_only(bad: float) -> None:
    logits = torch.zeros(3, 8)
    logits[1, 4] = bad
    results = sample_rows(logits, [live(), live(logprobs=3), live(temperature=0)])
    assert isinstance(results[1], BadLogitsError)
    assert isinstance(results[0], Sampled)
    assert isinstance(results[2], Sampled)


def test_everything_forbidden_still_draws_a_token() -> None:
    logits = torch.zeros(2)
    row = live(min_tokens=5, stop_ids=frozenset([0, 1]), top_p=0.5, min_p=0.5, top_k=1)
    assert draw(logits, row).token in (0, 1)
