"""From logits to tokens.

In order: repetition, frequency and presence penalties, logit bias, minimum length; then temperature 0 takes the
argmax, and others draw after temperature, top-k, top-p and min-p, in this order, as transformers does. Each row is
computed from itself alone, so a request's tokens do not depend on the rest of its batch. Work that no request asked
for is not done.
"""

from dataclasses import dataclass

import torch

from wherry_runtime.engine.live import Live, RawLogprobs
from wherry_runtime.engine.rng import gumbel_noise

MINUS_INFINITY = float("-inf")
NUCLEUS = 256  # likeliest tokens that top-p looks at before it sorts the whole vocabulary


class BadLogitsError(Exception):
    """The model's output for a request is not finite."""


@dataclass(slots=True, frozen=True)
class Sampled:
    """A drawn token, with log-probabilities if they were asked for."""

    token: int
    logprobs: RawLogprobs | None = None


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
        if live.adjusted:
            _adjust(logits[index], live)
    greedy = logits.argmax(dim=-1)
    drawn = greedy.tolist()
    for index, live in enumerate(rows):
        if live.params.temperature > 0 and finite[index]:
            drawn[index] = _draw(logits[index], live)
    results: list[Sampled | BadLogitsError] = []
    for index, live in enumerate(rows):
        if not finite[index]:
            results.append(BadLogitsError("the model's output is not finite (NaN or infinity)"))
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


def _adjust(row: torch.Tensor, live: Live) -> None:
    """Changes one row of logits [vocab_size] in place: penalties, bias, minimum length."""
    params = live.params
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(live.seen), dtype=torch.int64, device=row.device)
        values = row[seen]
        penalty = params.repetition_penalty
        row[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if (params.presence_penalty or params.frequency_penalty) and live.answer_counts:
        ids = torch.tensor(list(live.answer_counts.keys()), dtype=torch.int64, device=row.device)
        counts = torch.tensor(list(live.answer_counts.values()), dtype=row.dtype, device=row.device)
        row[ids] -= counts * params.frequency_penalty + params.presence_penalty
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias.keys()), dtype=torch.int64, device=row.device)
        row[ids] += torch.tensor(list(params.logit_bias.values()), dtype=row.dtype, device=row.device)
    if live.too_short_to_end and live.stop_ids:
        row[torch.tensor(sorted(live.stop_ids), dtype=torch.int64, device=row.device)] = MINUS_INFINITY


def _draw(row: torch.Tensor, live: Live) -> int:
    """Draws from one row of adjusted logits [vocab_size] by the Gumbel-max trick."""
    scores = row / live.params.temperature
    if live.filtered:
        scores = keep_likely(scores, live.params.top_k, live.params.top_p, live.params.min_p)
    noise = gumbel_noise(live.seed, live.num_tokens, scores.shape[0])
    return int((scores + noise.to(scores.device)).argmax())


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
