"""Round-robin: each replica in its turn. Fair where requests cost alike, and blind to everything else."""

from collections.abc import Sequence

from wherry_router.policies.base import Ask, Candidate, Choice


class RoundRobin:
    """See above. A replica that comes back is next: its turn was longest ago."""

    reads_prefixes = False

    def choose(self, candidates: Sequence[Candidate], ask: Ask) -> Choice:
        return Choice(min(range(len(candidates)), key=lambda i: candidates[i].last_chosen), "turn")
