"""Sequences with guesses as rows of a step.

Each guess is a row of its own, a decode like any other: it writes its key and value, and sees those of the rows before
it, which all of a layer's rows write before any of them attends. So a row's numbers are those that it would have had as
the only row of a later step, and answers with guesses are the same as those without.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch

from wherry_runtime.engine.live import Live
from wherry_runtime.engine.sampling import BadLogitsError, Drawn, Place, Sampled, Sampler, accept, sample
from wherry_runtime.scheduling.plan import SequenceStep

Outcome = Sampled | Drawn | BadLogitsError


def one_by_one(sequences: list[SequenceStep]) -> list[SequenceStep]:
    """The same step with a sequence of one token for the newest token and for each guess of those that have guesses.

    Sequences of one request then come in the order of their positions, each of them sampling.
    """
    if not any(s.num_drafts for s in sequences):
        return sequences
    rows = []
    for step in sequences:
        first = len(step.tokens) - 1 - step.num_drafts
        if not step.num_drafts:
            rows.append(step)
            continue
        if first:  # known tokens before the newest
            rows.append(SequenceStep(step.request_id, step.tokens[:first], step.start, step.blocks, False))
        rows += [
            SequenceStep(step.request_id, [step.tokens[i]], step.start + i, step.blocks, True)
            for i in range(first, len(step.tokens))
        ]
    return rows


def draw(
    parts: Iterable[torch.Tensor], sequences: Sequence[SequenceStep], live: Mapping[str, Live], sampler: Sampler
) -> dict[str, Outcome]:
    """Draws the next tokens of a step.

    Args:
        parts: [S, vocab_size] float32 after each of `sequences` that samples, some rows at a time; each part is
            overwritten, and done with when the next is asked for.
        sequences: what `one_by_one` made, in row order; those of a request by position.

    Returns:
        By request id: `Drawn` for those with guesses.
    """
    tokens: dict[str, list[int]] = {}  # of each request: its newest, and guesses
    places = []
    for sequence in sequences:
        if sequence.samples:
            known = tokens.setdefault(sequence.request_id, [])
            known.append(sequence.tokens[-1])
            places.append(Place(live[sequence.request_id], known[1:]))
    results: list[Sampled | BadLogitsError] = []
    for logits in parts:
        results += sample(logits, places[len(results) : len(results) + len(logits)], sampler)
    if len(tokens) == len(places):
        return dict(zip(tokens, results, strict=True))
    by_request: dict[str, list[Sampled | BadLogitsError]] = {i: [] for i in tokens}
    for place, result in zip(places, results, strict=True):
        by_request[place.live.id].append(result)
    return {i: own[0] if len(own) == 1 else accept(own, live[i], tokens[i][1:]) for i, own in by_request.items()}
