"""Least requests: the replica with the fewest requests. Good where they cost alike."""

from collections.abc import Sequence

from wherry_router.policies.base import Ask, Candidate, Choice


class LeastRequests:
    """Ties go to fewer tokens, then to who waited longest for its turn."""

    reads_prefixes = False

    def choose(self, candidates: Sequence[Candidate], ask: Ask) -> Choice:
        def rank(index: int) -> tuple[int, int, int]:
            one = candidates[index]
            return one.load_requests, one.load_tokens, one.last_chosen

        return Choice(min(range(len(candidates)), key=rank), "load")
