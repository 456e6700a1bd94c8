"""Least outstanding tokens: the replica that owes the fewest tokens, of prompts to read and answers to write.

Requests differ by orders of magnitude in cost, so counting them would send a short question behind long documents.
"""

from collections.abc import Iterable
from typing import Protocol, TypeVar


class Candidate(Protocol):
    """What the choice looks at."""

    outstanding_tokens: int
    requests: int
    last_chosen: int  # number of the last choice that fell on it


C = TypeVar("C", bound=Candidate)


def choose(candidates: Iterable[C]) -> C | None:
    """The best of `candidates`; ties go to fewer requests, then to who waited longest for its turn."""
    return min(candidates, key=lambda c: (c.outstanding_tokens, c.requests, c.last_chosen), default=None)
