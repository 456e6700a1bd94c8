"""Sequences with guesses as rows of a step.

Each guess is a row of its own, a decode like any other: it writes its key and value, and sees those of the rows before
it, which all of a layer's rows write before any of them attends. So a row's numbers are those that it would have had as
the only row of a later step, and answers with guesses are the same as those without.
"""

from collections.abc import Mapping, Sequence

import torch

from wherry_runtime.engine.live import Live
from wherry_runtime.engine.rng import gumbel_noise
from wherry_runtime.engine.sampling import BadLogitsError, Drawn, Noise, Sampled, sample, verify
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
    logits: torch.Tensor, sequences: Sequence[SequenceStep], live: Mapping[str, Live], noise: Noise = gumbel_noise
) -> dict[str, Outcome]:
    """Draws the next tokens of a step.

    Args:
        logits: [S, vocab_size] float32 after each of `sequences` that samples. Overwritten.
        sequences: what `one_by_one` made, in row order; those of a request by position.

    Returns:
        By request id: `Drawn` for those with guesses.
    """
    rows: dict[str, list[int]] = {}
    tokens: dict[str, list[int]] = {}
    count = 0
    for sequence in sequences:
        if sequence.samples:
            rows.setdefault(sequence.request_id, []).append(count)
            tokens.setdefault(sequence.request_id, []).append(sequence.tokens[-1])
            count += 1
    if len(rows) == count:
        return dict(zip(rows, sample(logits, [live[i] for i in rows]), strict=True))
    order = [row for own in rows.values() for row in own]
    if order != list(range(count)):
        logits = logits[torch.tensor(order, device=logits.device)]
    results = verify(logits, [live[i] for i in rows], [tokens[i][1:] for i in rows], noise)
    return dict(zip(rows, results, strict=True))
