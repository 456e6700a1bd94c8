"""Random: any replica. What others are measured against, and hard to beat where many routers know nothing."""

from collections.abc import Sequence
from random import Random

from wherry_router.policies.base import Ask, Candidate, Choice


class RandomChoice:
    """See above. `draw`: where its random numbers come from."""

    reads_prefixes = False

    def __init__(self, draw: Random | None = None) -> None:
        self._draw = draw or Random()  # noqa: S311 - not a secret

    def choose(self, candidates: Sequence[Candidate], ask: Ask) -> Choice:
        return Choice(self._draw.randrange(len(candidates)), "random")
