"""Least tokens: the replica that owes the fewest tokens, of prompts to read and answers to write.

Requests differ by orders of magnitude in cost, so counting them would send a short question behind long documents.
"""

from collections.abc import Sequence

from wherry_router.policies.base import Ask, Candidate, Choice


class LeastTokens:
    """Ties go to fewer requests, then to who waited longest for its turn."""

    reads_prefixes = False

    def choose(self, candidates: Sequence[Candidate], ask: Ask) -> Choice:
        def rank(index: int) -> tuple[int, int, int]:
            one = candidates[index]
            return one.load_tokens, one.load_requests, one.last_chosen

        return Choice(min(range(len(candidates)), key=rank), "load")
