"""Prefix-aware: the replica that has the longest beginning of the prompt cached, weighed against its load.

A prefix that is computed again costs the whole pool work, a replica that is busier than others costs the request time.
Both are counted in tokens. While little is owed, a replica is worth its queue: it is chosen if it saves half as many
tokens of the prompt as it owes more than others. (Not as many: whoever has to compute a prefix is busy with it for a
while, and would lose its own prompts to others, who would have to compute them, and so on.) Under load, queues are long
beside any prompt and differ by chance; then a replica may be busier than the least busy one by as large a share of the
mean as it saves of the prompt. Above `BOUND` times the mean and `PATIENCE` times what it saves it is not chosen at all.
Whoever is over that loses its prompts to the next best, which has the prefix from then on: a prefix that everybody asks
for spreads over as many replicas as it needs.

A prompt that nobody has cached goes to the least busy replica, and of those that are as good as that where its first
chunks hash to: so routers agree on it before any report tells them of one another.
"""

from collections.abc import Sequence
from typing import NamedTuple

from wherry_router.policies.base import Ask, Candidate, Choice
from wherry_router.policies.hashing import home
from wherry_router.policies.least_tokens import LeastTokens

# How many times the mean load a replica may have and still be sent prompts for what it has cached.
BOUND = 1.25
# How many tokens of queue a token of the prompt is worth that need not be computed again.
PATIENCE = 2
# Prefixes that save less than this, or this share of the prompt, are no reason to go anywhere.
LEAST_SAVED = 32
LEAST_SHARE = 0.05
# By how much of what a cold prompt costs a replica may owe more than the least busy one and be as good.
AS_GOOD = 0.1
# The key that a cold prompt goes by: that of its first KiB, or all of it.
COLD_KEY = 3


class View(NamedTuple):
    """A candidate: what it owes, how much of the prompt it has cached, and who it is. `load` and `cached` in tokens."""

    load: int
    cached: int
    identity: int
    last_chosen: int = 0


def decide(views: Sequence[View], prompt: int, output: int, key: int) -> Choice:
    """The replica for a prompt of `prompt` tokens, with `output` expected, that begins with what `key` stands for."""
    loads = [view.load for view in views]
    mean, least = sum(loads) / len(loads), min(loads)
    most = max(view.cached for view in views)
    if most < max(LEAST_SAVED, LEAST_SHARE * prompt):
        bound = least + AS_GOOD * (prompt + output)
        return Choice(home([view.identity for view in views], loads, bound, key), "cold")

    def cost(index: int) -> tuple[float, int, int]:
        view = views[index]
        behind = view.load - least
        waits = min(behind / PATIENCE, prompt * behind / mean) if mean else 0.0
        return prompt - view.cached + waits, view.load, view.last_chosen

    within = [index for index, view in enumerate(views) if view.load <= BOUND * mean + PATIENCE * view.cached]
    index = min(within, key=cost)
    return Choice(index, "prefix" if views[index].cached == most else "hot")


class PrefixAware:
    """See above. A prompt too short for a key goes to who owes the fewest tokens."""

    reads_prefixes = True

    def __init__(self) -> None:
        self._without = LeastTokens()

    def choose(self, candidates: Sequence[Candidate], ask: Ask) -> Choice:
        if not ask.keys:
            return self._without.choose(candidates, ask)
        views = [View(c.load_tokens, c.cached_tokens(ask), c.identity, c.last_chosen) for c in candidates]
        key = ask.keys[min(COLD_KEY, len(ask.keys) - 1)]
        return decide(views, ask.prompt_tokens, ask.output_tokens, key)
