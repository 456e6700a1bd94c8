"""Power of two choices: of two replicas at random, the one that owes fewer tokens.

Nearly as even as looking at all of them (Mitzenmacher, 2001, https://doi.org/10.1109/71.963420), and where many routers
go by the same reports they do not all run to the same replica.
"""

from collections.abc import Sequence
from random import Random

from wherry_router.policies.base import Ask, Candidate, Choice


class PowerOfTwo:
    """See above. `draw`: where its random numbers come from."""

    reads_prefixes = False

    def __init__(self, draw: Random | None = None) -> None:
        self._draw = draw or Random()  # noqa: S311 - not a secret

    def choose(self, candidates: Sequence[Candidate], ask: Ask) -> Choice:
        if len(candidates) == 1:
            return Choice(0, "load")
        one, other = self._draw.sample(range(len(candidates)), 2)
        return Choice(min(one, other, key=lambda i: candidates[i].load_tokens), "load")
