"""From logits to tokens.

In order: repetition, frequency and presence penalties, logit bias, minimum length; then temperature 0 takes the
argmax, and others draw after temperature, top-k, top-p and min-p, in this order, as transformers does. Each row is
computed from itself alone, so a request's tokens do not depend on the rest of its batch. Work that no request asked
for is not done.

What changes logits is done here, on PyTorch. The rest is a backend's `Sampler`: `TorchSampler` is the reference, and
`kernels.cpu.sampling.NativeSampler` does the same on the native kernels.

Guesses are checked by drawing as if there were none: the noise of a draw depends on seed and position alone, so what
the model draws after a guess that came true is what it would have drawn there anyway. Answers are therefore the same
token by token with and without guesses, whoever made them (drafter-invariant speculative decoding: Daliri et al., 2025,
https://arxiv.org/abs/2408.07978).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from wherry_runtime.engine.live import Live, RawLogprobs
from wherry_runtime.engine.rng import gumbel_noise

Noise = Callable[[int, int, int], torch.Tensor]  # seed, position, vocab_size → [vocab_size] float32

MINUS_INFINITY = float("-inf")
NUCLEUS = 256  # likeliest tokens that top-p looks at before it sorts the whole vocabulary


class BadLogitsError(Exception):
    """The model's output for a request is not finite."""


@dataclass(slots=True, frozen=True)
class Sampled:
    """A drawn token, with log-probabilities if they were asked for."""

    token: int
    logprobs: RawLogprobs | None = None


@dataclass(slots=True, frozen=True)
class Drawn:
    """What was drawn in a step with guesses: the guesses that came true, and the token after them.

    `tainted`: a guess gave numbers that are not finite, and so are its key and value. There may be no tokens then:
    where attention multiplies masked values by zero, those of a guess reach the rows before it.
    """

    tokens: list[Sampled]
    tainted: bool = False


@dataclass(slots=True, frozen=True)
class Place:
    """Where a token is drawn: after a request's tokens and `ahead`, guesses at what follows them."""

    live: Live
    ahead: Sequence[int] = ()


class Sampler(Protocol):
    """Draws from a step's logits on some backend."""

    def finite(self, logits: torch.Tensor) -> list[bool]:
        """Which rows can be drawn from: with no NaN nor +infinity, and not only -infinity.

        Args:
            logits: [S, vocab_size] float32, what the model computed last, untouched.
        """

    def draw(self, logits: torch.Tensor, places: Sequence[Place], *, changed: bool) -> list[int]:
        """A token for each row; any where that is not finite, or where an earlier guess did not come true.

        Args:
            logits: what `finite` was asked about last, now with penalties, biases and minimum lengths. Overwritten.
            places: of each row; those of a request in the order of their positions.
            changed: whether there were any.
        """


class TorchSampler:
    """The reference. `noise` may remember what it computed."""

    def __init__(self, noise: Noise = gumbel_noise) -> None:
        self._noise = noise

    def finite(self, logits: torch.Tensor) -> list[bool]:
        flags: list[bool] = torch.isfinite(logits.amax(dim=-1)).tolist()
        return flags

    def draw(self, logits: torch.Tensor, places: Sequence[Place], *, changed: bool) -> list[int]:
        drawn = argmax(logits)
        latest: dict[str, int] = {}  # request → the token after the last guess that came true
        for index, place in enumerate(places):
            live = place.live
            if place.ahead and latest.get(live.id) != place.ahead[-1]:
                latest.pop(live.id, None)
                continue
            if not live.greedy:
                (drawn[index],) = argmax(_perturbed(logits[index], live, len(place.ahead), self._noise)[None])
            latest[live.id] = drawn[index]
        return drawn


def sample(logits: torch.Tensor, places: Sequence[Place], sampler: Sampler) -> list[Sampled | BadLogitsError]:
    """Draws one token for each row.

    Args:
        logits: [S, vocab_size] float32, what the model computed last; overwritten.
        places: of each row; those of a request in the order of their positions.

    Returns:
        For each row a token, or the error to fail its request with. What comes after a guess that did not come true
        means nothing.
    """
    finite = sampler.finite(logits)
    logprobs = _logprobs(logits, places)
    changed = False
    for index, place in enumerate(places):
        if _adjusted(place.live, len(place.ahead)):
            _adjust(logits[index], place.live, place.ahead)
            changed = True
    drawn = sampler.draw(logits, places, changed=changed)
    results: list[Sampled | BadLogitsError] = []
    for index, (place, token) in enumerate(zip(places, drawn, strict=True)):
        if not finite[index]:
            results.append(BadLogitsError("the model's output is not finite (NaN or infinity)"))
            continue
        raw = logprobs.get(index)
        results.append(Sampled(token, None if raw is None else _pick(raw, token, place.live)))
    return results


def accept(results: Sequence[Sampled | BadLogitsError], live: Live, guesses: Sequence[int]) -> Drawn:
    """Takes a request's tokens until one differs from its guess, or ends the answer, or no guess is left.

    Args:
        results: what was drawn after the request's newest token, and after each of its guesses.
        guesses: at least one; they must fit into what the answer may have left, less one.

    Returns:
        A run that ends before numbers that are not finite, even if that is at once: a step without guesses then tells
        whether they are the request's own.
    """
    run: list[Sampled] = []
    for index, result in enumerate(results):
        if isinstance(result, BadLogitsError):
            break
        run.append(result)
        ends = result.token in live.stop_ids and not _too_short(live, index)
        if index == len(guesses) or result.token != guesses[index] or ends:
            break
    return Drawn(run, tainted=any(isinstance(r, BadLogitsError) for r in results[len(run) :]))


def _logprobs(logits: torch.Tensor, places: Sequence[Place]) -> dict[int, torch.Tensor]:
    """Row index → [vocab_size] log-softmax of the untouched logits, for rows that want it."""
    wanted = [i for i, place in enumerate(places) if place.live.params.logprobs is not None]
    if not wanted:
        return {}
    return dict(zip(wanted, logits[wanted].log_softmax(dim=-1), strict=True))


def _pick(raw: torch.Tensor, token: int, live: Live) -> RawLogprobs:
    count = min(live.params.logprobs or 0, raw.shape[0])
    top, ids = raw.topk(count)
    return RawLogprobs(float(raw[token]), ids.tolist(), top.tolist())


def argmax(scores: torch.Tensor) -> list[int]:
    """scores [S, vocab_size] → the first of the highest of each row. On CPU by NumPy: five times as fast as PyTorch."""
    if scores.device.type == "cpu":
        tokens: list[int] = scores.numpy().argmax(axis=-1).tolist()
        return tokens
    return scores.argmax(dim=-1).tolist()


def _too_short(live: Live, ahead: int) -> bool:
    """Whether a token that comes `ahead` tokens after the next one must not end the answer."""
    return live.num_tokens + ahead - live.request.num_prompt < live.params.min_tokens


def _adjusted(live: Live, ahead: int) -> bool:
    """Whether its logits change before temperature."""
    return live.penalized or bool(live.params.logit_bias) or _too_short(live, ahead)


def _adjust(row: torch.Tensor, live: Live, ahead: Sequence[int] = ()) -> None:
    """Changes one row of logits [vocab_size] in place: penalties, bias, minimum length."""
    params = live.params
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(live.seen.union(ahead)), dtype=torch.int64, device=row.device)
        values = row[seen]
        penalty = params.repetition_penalty
        row[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if params.presence_penalty or params.frequency_penalty:
        answer = live.answer_counts + Counter(ahead) if ahead else live.answer_counts
        ids = torch.tensor(list(answer.keys()), dtype=torch.int64, device=row.device)
        counts = torch.tensor(list(answer.values()), dtype=row.dtype, device=row.device)
        row[ids] -= counts * params.frequency_penalty + params.presence_penalty
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias.keys()), dtype=torch.int64, device=row.device)
        row[ids] += torch.tensor(list(params.logit_bias.values()), dtype=row.dtype, device=row.device)
    if _too_short(live, len(ahead)) and live.stop_ids:
        row[torch.tensor(sorted(live.stop_ids), dtype=torch.int64, device=row.device)] = MINUS_INFINITY


def scores_of(row: torch.Tensor, live: Live, ahead: Sequence[int] = (), noise: Noise = gumbel_noise) -> torch.Tensor:
    """The scores whose argmax is the token drawn after a request's tokens and `ahead`, guesses at what follows them.

    Args:
        row: [vocab_size] float32 logits; overwritten.

    Returns:
        [vocab_size] float32; `row` itself if the argmax of the logits is what counts. Others by the Gumbel-max trick.
    """
    if _adjusted(live, len(ahead)):
        _adjust(row, live, ahead)
    return row if live.greedy else _perturbed(row, live, len(ahead), noise)


def _perturbed(row: torch.Tensor, live: Live, ahead: int, noise: Noise) -> torch.Tensor:
    """Adjusted logits [vocab_size] → scores [vocab_size] whose argmax is a draw: temperature, filters, Gumbel noise."""
    scores = row / live.params.temperature
    if live.filtered:
        scores = keep_likely(scores, live.params.top_k, live.params.top_p, live.params.min_p)
    return scores.add_(noise(live.seed, live.num_tokens + ahead, scores.shape[0]).to(scores.device))


def keep_likely(scores: torch.Tensor, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """Sets the scores [vocab_size] of unlikely tokens to -inf.

    Top-k keeps the k highest (ties with the k-th stay). Top-p keeps the fewest tokens that together reach probability p
    (Holtzman et al., 2019, https://arxiv.org/abs/1904.09751), min-p those with at least p times the highest one's
    (Nguyen et al., 2024, https://arxiv.org/abs/2407.01082). The likeliest token always stays.
    """
    if 0 < top_k < scores.shape[0]:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[-1], MINUS_INFINITY)
    if top_p < 1.0:
        scores = scores.masked_fill(scores < _nucleus_floor(scores, top_p), MINUS_INFINITY)
    if min_p > 0.0:
        # In logarithms: p ≥ min_p · p_max.
        floor = scores.max() + torch.tensor(min_p, dtype=torch.float64).log().to(scores.dtype)
        scores = scores.masked_fill(scores < floor, MINUS_INFINITY)
    return scores


def _nucleus_floor(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """The score of the last token of the nucleus."""
    total = scores.logsumexp(dim=-1)
    for count in (min(NUCLEUS, scores.shape[0]), scores.shape[0]):
        values = scores.topk(count).values
        reached = (values - total).exp_().cumsum(dim=-1)
        if float(reached[-1]) >= top_p:
            return values[int((reached < top_p).sum())]
    return values[-1]
