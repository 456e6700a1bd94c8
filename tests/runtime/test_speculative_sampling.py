"""Checking guesses: the same tokens as one by one, whatever the parameters, and the right distribution."""

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wherry_protocol.worker import SamplingParams
from wherry_runtime.engine.live import Live
from wherry_runtime.engine.rng import NoiseCache, gumbel_noise
from wherry_runtime.engine.sampling import (
    Drawn,
    Noise,
    Place,
    Sampled,
    TorchSampler,
    accept,
    sample,
    scores_of,
)
from wherry_runtime.scheduling.request import Request

VOCAB = 40


class Toy:
    """A language model: logits from the last three tokens, the same every time."""

    def __init__(self, seed: int, spread: float = 2.0) -> None:
        self._table = torch.randn(64, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread

    def logits(self, tokens: list[int]) -> torch.Tensor:
        a, b, c = ([0, 0, 0, *tokens])[-3:]
        return self._table[(a * 7 + b * 3 + c * 11) % 64].clone()


def new_live(prompt: list[int], max_new_tokens: int, stop_ids: frozenset[int] = frozenset(), **params: Any) -> Live:
    return Live(Request("r", list(prompt), max_new_tokens), SamplingParams(**params), params.get("seed", 5), stop_ids)


def book(live: Live, token: int) -> bool:
    """Takes in a token as the engine does; whether the answer ends."""
    live.note_token(token)
    live.request.tokens.append(token)
    return live.finish_after(token, live.request.num_new) is not None


def verify(
    logits: torch.Tensor, lives: list[Live], guesses: list[list[int]], noise: Noise = gumbel_noise
) -> list[Drawn]:
    """Rows of logits for each request: after its newest token, and after each guess."""
    places = [Place(live, run[:i]) for live, run in zip(lives, guesses, strict=True) for i in range(len(run) + 1)]
    results = sample(logits, places, TorchSampler(noise))
    accepted, first = [], 0
    for live, run in zip(lives, guesses, strict=True):
        accepted.append(accept(results[first : first + len(run) + 1], live, run))
        first += len(run) + 1
    return accepted


def one_by_one(model: Toy, live: Live) -> list[Sampled]:
    answer = []
    while True:
        (drawn,) = sample(model.logits(live.request.tokens)[None], [Place(live)], TorchSampler())
        assert isinstance(drawn, Sampled)
        answer.append(drawn)
        if book(live, drawn.token):
            return answer


def speculating(model: Toy, live: Live, guess: Any) -> tuple[list[Sampled], int]:
    """The answer, and how many steps it took."""
    answer: list[Sampled] = []
    noise = NoiseCache(VOCAB * 4 * 3)
    for steps in range(1, 1000):
        tokens = live.request.tokens
        guesses = guess(tokens)[: live.request.max_new_tokens - live.request.num_new - 1]
        rows = torch.stack([model.logits(tokens + guesses[:i]) for i in range(len(guesses) + 1)])
        (drawn,) = verify(rows, [live], [guesses], noise)
        assert not drawn.tainted
        assert 1 <= len(drawn.tokens) <= len(guesses) + 1
        answer += drawn.tokens
        ended = [book(live, t.token) for t in drawn.tokens]
        assert not any(ended[:-1])  # nothing after the end
        if ended[-1]:
            return answer, steps
    raise AssertionError("no end")


PARAMS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.4},
    {"temperature": 0, "frequency_penalty": 0.7, "presence_penalty": 0.3, "min_tokens": 12},
    {"temperature": 0, "logit_bias": {3: 1.5, 7: -5.0}, "logprobs": 3},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 6, "logprobs": 0},
    {"temperature": 1.2, "top_p": 0.8, "min_p": 0.02, "presence_penalty": -0.4},
    {"temperature": 0.9, "repetition_penalty": 0.8, "frequency_penalty": 1.1, "min_tokens": 9, "logprobs": 5},
]


@pytest.mark.parametrize("params", PARAMS, ids=lambda p: ",".join(p))
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1), st.integers(0, 6))
def test_the_answer_is_the_same(params: dict[str, Any], seed: int, quality: float, depth: int) -> None:
    """Whoever guesses, well or badly: tokens, log-probabilities and the end are those without guesses."""
    model = Toy(seed)
    stop = frozenset({seed % VOCAB, (seed + 9) % VOCAB})
    expected = one_by_one(model, new_live([1, 2, 3], 24, stop, seed=seed, **params))
    truth = [1, 2, 3, *(s.token for s in expected)]
    dice = torch.Generator().manual_seed(seed)

    def guess(tokens: list[int]) -> list[int]:
        run = truth[len(tokens) : len(tokens) + depth]
        wrong = torch.rand(len(run), generator=dice) >= quality
        return [(t + 1) % VOCAB if w else t for t, w in zip(run, wrong.tolist(), strict=True)]

    answer, _ = speculating(model, new_live([1, 2, 3], 24, stop, seed=seed, **params), guess)
    assert [s.token for s in answer] == [s.token for s in expected]
    assert [s.logprobs for s in answer] == [s.logprobs for s in expected]


def test_right_guesses_save_steps() -> None:
    model = Toy(3)
    truth = [1, 2, 3, *(s.token for s in one_by_one(model, new_live([1, 2, 3], 24, temperature=0.8)))]
    live = new_live([1, 2, 3], 24, temperature=0.8)
    _, steps = speculating(model, live, lambda tokens: truth[len(tokens) : len(tokens) + 5])
    assert steps == 4  # 6 + 6 + 6 + 6


def test_several_requests_in_one_step() -> None:
    model = Toy(1)
    lives = [new_live([i], 9, temperature=t, seed=i) for i, t in enumerate((0.0, 1.0, 0.5))]
    guesses = [[1, 2], [], [3, 4, 5]]
    rows = torch.stack(
        [
            model.logits(live.request.tokens + run[:i])
            for live, run in zip(lives, guesses, strict=True)
            for i in range(len(run) + 1)
        ]
    )
    together = verify(rows.clone(), lives, guesses)
    first = 0
    for live, run, result in zip(lives, guesses, together, strict=True):
        (alone,) = verify(rows[first : first + len(run) + 1].clone(), [live], [run])
        assert alone == result
        first += len(run) + 1


class TestNotFinite:
    def rows(self, bad: int, count: int = 4) -> torch.Tensor:
        rows = torch.full((count, VOCAB), -1.0)
        for i in range(count):
            rows[i, 10 + i] = 5.0
        rows[bad, 3] = float("nan")
        return rows

    def test_with_guesses_it_is_not_clear_who_is_to_blame(self) -> None:
        (result,) = verify(self.rows(0), [new_live([1], 9, temperature=0)], [[10, 11, 12]])
        assert result == Drawn([], tainted=True)

    def test_after_a_right_guess_the_run_ends_before(self) -> None:
        (result,) = verify(self.rows(2), [new_live([1], 9, temperature=0)], [[10, 11, 12]])
        assert [s.token for s in result.tokens] == [10, 11]
        assert result.tainted

    def test_after_a_wrong_guess_the_run_is_what_it_is_but_tainted(self) -> None:
        (result,) = verify(self.rows(3), [new_live([1], 9, temperature=0)], [[10, 30, 12]])
        assert [s.token for s in result.tokens] == [10, 11]
        assert result.tainted


def draft_guess(draft: Toy, live: Live, tokens: list[int], depth: int, coupled: bool) -> list[int]:
    """A draft model's run, with the target's noise or with noise of its own."""
    run: list[int] = []
    other = live if coupled else new_live(tokens, 99, seed=live.seed + 10_000, temperature=live.params.temperature)
    for _ in range(depth):
        run.append(int(scores_of(draft.logits(tokens + run), other, run).argmax()))
    return run


class Mixed(Toy):
    """Close to `model`, not equal."""

    def __init__(self, model: Toy, other: Toy, share: float) -> None:
        self._table = model._table * (1 - share) + other._table * share


@pytest.mark.parametrize(
    "params", [{"temperature": 1.0}, {"temperature": 0.8, "top_k": 8}, {"temperature": 1.0, "top_p": 0.9}]
)
def test_distribution(params: dict[str, Any]) -> None:
    """Chi-square of three-token answers over many seeds against the model's own probabilities.

    The guesses come from a draft model with the same noise, which must not show. Limits: the 0.1 % point.
    """
    model = Toy(11, spread=1.2)
    draft = Mixed(model, Toy(12), 0.3)
    draws = 4000
    first: Counter[int] = Counter()
    third: Counter[int] = Counter()
    accepted = 0
    for seed in range(draws):
        live = new_live([4, 9, 2], 4, seed=seed, **params)
        guesses = draft_guess(draft, live, live.request.tokens, 2, coupled=True)
        answer, _ = speculating(model, live, lambda tokens, run=guesses: run if len(tokens) == 3 else [])
        tokens = [s.token for s in answer]
        accepted += tokens[: len(guesses)] == guesses
        first[tokens[0]] += 1
        third[tokens[2]] += 1
    assert 0.05 * draws < accepted < 0.95 * draws  # both what was accepted and what was refused is in the sample
    expect_first = probabilities(model, [4, 9, 2], params)
    expect_third = torch.zeros(VOCAB, dtype=torch.float64)
    for a in range(VOCAB):
        for b in range(VOCAB):
            weight = float(expect_first[a])
            if weight > 0:
                weight *= float(probabilities(model, [4, 9, 2, a], params)[b])
            if weight > 1e-9:
                expect_third += weight * probabilities(model, [4, 9, 2, a, b], params)
    for counts, expected in ((first, expect_first), (third, expect_third)):
        chi_square, degrees = statistic(counts, expected, draws)
        # Wilson and Hilferty's approximation of the 0.1 % point.
        limit = degrees * (1 - 2 / (9 * degrees) + 3.09 * (2 / (9 * degrees)) ** 0.5) ** 3
        assert chi_square < limit, (chi_square, degrees)


_known: dict[tuple[int, ...], torch.Tensor] = {}


def probabilities(model: Toy, tokens: list[int], params: dict[str, Any]) -> torch.Tensor:
    """[VOCAB] float64: the model's distribution after filters, by definition."""
    scores = model.logits(tokens).double() / params["temperature"]
    if k := params.get("top_k"):
        scores[scores < scores.topk(k).values[-1]] = -torch.inf
    chances = scores.softmax(-1)
    if p := params.get("top_p"):
        order = chances.sort(descending=True)
        kept = order.values.cumsum(-1) - order.values < p
        allowed = torch.zeros_like(kept)
        allowed[order.indices[kept]] = True
        chances = torch.where(allowed, chances, 0.0)
        chances /= chances.sum()
    return chances


def statistic(counts: Counter[int], expected: torch.Tensor, draws: int) -> tuple[float, int]:
    """Chi-square and degrees of freedom; rare tokens count as one."""
    often = [t for t in range(VOCAB) if float(expected[t]) * draws >= 5]
    cells = [(counts[t], float(expected[t]) * draws) for t in often]
    rest = (draws - sum(c for c, _ in cells), draws - sum(e for _, e in cells))
    if rest[1] >= 5:
        cells.append(rest)
    else:
        assert rest[0] <= 25
    return sum((c - e) ** 2 / e for c, e in cells), len(cells) - 1


def test_coupled_guesses_agree_more_often() -> None:
    """And by at least (1 - D) / (1 + D), D the total variation distance: the bound of the coupling."""
    model, draft = Toy(21, spread=1.0), Mixed(Toy(21, spread=1.0), Toy(22, spread=1.0), 0.35)
    hits = {True: 0, False: 0}
    for seed in range(1500):
        live = new_live([5, 6, 7], 9, seed=seed, temperature=1.0)
        token = int(scores_of(model.logits([5, 6, 7]), live).argmax())
        for coupled in hits:
            hits[coupled] += draft_guess(draft, live, [5, 6, 7], 1, coupled)[0] == token
    p = model.logits([5, 6, 7]).softmax(-1)
    q = draft.logits([5, 6, 7]).softmax(-1)
    distance = float((p - q).abs().sum() / 2)
    assert hits[True] / 1500 > (1 - distance) / (1 + distance) - 0.04
    assert hits[True] > 2 * hits[False]


def test_the_noise_cache_is_the_noise() -> None:
    cache = NoiseCache(3 * 4 * 16)
    for position in (0, 1, 2, 3, 0, 3, 2):
        assert torch.equal(cache(7, position, 16), gumbel_noise(7, position, 16))
    assert len(cache._known) == 3
