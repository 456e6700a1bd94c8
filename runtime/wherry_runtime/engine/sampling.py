"""From logits to tokens.

In order: repetition, frequency and presence penalties, logit bias, minimum length; then temperature 0 takes the
argmax, and others draw after temperature, top-k, top-p and min-p, in this order, as transformers does. Each row is
computed from itself alone, so a request's tokens do not depend on the rest of its batch. Work that no request asked
for is not done.

Guesses are checked by drawing as if there were none: the noise of a draw depends on seed and position alone, so what
the model draws after a guess that came true is what it would have drawn there anyway. Answers are therefore the same
token by token with and without guesses, whoever made them (drafter-invariant speculative decoding: Daliri et al., 2025,
https://arxiv.org/abs/2408.07978).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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


def verify(
    logits: torch.Tensor, rows: Sequence[Live], guesses: Sequence[Sequence[int]], noise: Noise = gumbel_noise
) -> list[Drawn | BadLogitsError]:
    """Draws tokens for each request until one differs from its guess, or ends the answer, or no guess is left.

    Args:
        logits: [S + all guesses, vocab_size] float32: for each request the row after its newest token, then those after
            each of its guesses. Overwritten.
        rows: the S requests.
        guesses: of each request; they must fit into what its answer may have left, less one.

    Returns:
        For each request at least one token, or the error to fail it with. A run ends before numbers that are not
        finite, even if that is at once: a step without guesses then tells whether they are the request's own.
    """
    finite = torch.isfinite(logits.amax(dim=-1)).tolist()
    likeliest = argmax(logits)
    results: list[Drawn | BadLogitsError] = []
    first = 0
    for live, run in zip(rows, guesses, strict=True):
        end = first + len(run) + 1
        if finite[first] or len(run):
            drawn = _draw_run(logits[first:end], finite[first:end], likeliest[first:end], live, run, noise)
            results.append(Drawn(drawn, tainted=not all(finite[first + len(drawn) : end])))
        else:
            results.append(_not_finite())
        first = end
    return results


def _draw_run(
    logits: torch.Tensor, finite: list[bool], likeliest: list[int], live: Live, run: Sequence[int], noise: Noise
) -> list[Sampled]:
    """`verify` for one request: logits [len(run) + 1, vocab_size]."""
    drawn: list[Sampled] = []
    plain = live.params.temperature == 0
    for index in range(len(run) + 1):
        if not finite[index]:
            break
        raw = logits[index].log_softmax(dim=-1) if live.params.logprobs is not None else None
        if plain and not _adjusted(live, index):
            token = likeliest[index]
        else:
            (token,) = argmax(scores_of(logits[index], live, run[:index], noise)[None])
        drawn.append(Sampled(token, None if raw is None else _pick(raw, token, live)))
        ends = token in live.stop_ids and not _too_short(live, index)
        if index == len(run) or token != run[index] or ends:
            break
    return drawn


def sample(logits: torch.Tensor, rows: list[Live]) -> list[Sampled | BadLogitsError]:
    """Draws one token for each row.

    Args:
        logits: [S, vocab_size] float32; overwritten.
        rows: the request of each row.

    Returns:
        For each row a token, or the error to fail its request with.
    """
    finite = torch.isfinite(logits.amax(dim=-1)).tolist()
    logprobs = _logprobs(logits, rows)
    for index, live in enumerate(rows):
        if _adjusted(live, 0):
            _adjust(logits[index], live)
    drawn = argmax(logits)
    for index, live in enumerate(rows):
        if live.params.temperature > 0 and finite[index]:
            (drawn[index],) = argmax(_perturbed(logits[index], live, 0, gumbel_noise)[None])
    results: list[Sampled | BadLogitsError] = []
    for index, live in enumerate(rows):
        if not finite[index]:
            results.append(_not_finite())
            continue
        raw = logprobs.get(index)
        results.append(Sampled(drawn[index], None if raw is None else _pick(raw, drawn[index], live)))
    return results


def _logprobs(logits: torch.Tensor, rows: list[Live]) -> dict[int, torch.Tensor]:
    """Row index → [vocab_size] log-softmax of the untouched logits, for rows that want it."""
    wanted = [i for i, live in enumerate(rows) if live.params.logprobs is not None]
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


def _not_finite() -> BadLogitsError:
    return BadLogitsError("the model's output is not finite (NaN or infinity)")


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
    return row if live.params.temperature == 0 else _perturbed(row, live, len(ahead), noise)


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
