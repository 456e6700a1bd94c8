"""Session affinity: a session's requests go to one replica, the same from every router, unless that has too many.

A session is what the client says: the header `x-session-id`, or `prompt_cache_key` or `user` in the body.
"""

import math
from collections.abc import Sequence

from wherry_router.policies.base import Ask, Candidate, Choice
from wherry_router.policies.hashing import affinity, home, identity_of
from wherry_router.policies.least_tokens import LeastTokens

# How many times its even share of the requests a replica may have before sessions move on from it.
BOUND = 1.25


class SessionAffinity:
    """Requests without a session go to who owes the fewest tokens."""

    reads_prefixes = False

    def __init__(self) -> None:
        self._without = LeastTokens()

    def choose(self, candidates: Sequence[Candidate], ask: Ask) -> Choice:
        if not ask.session:
            return self._without.choose(candidates, ask)
        key = identity_of(ask.session)
        identities = [one.identity for one in candidates]
        loads = [one.load_requests for one in candidates]
        # Each may have its share of all requests with this one among them, so less than that is no reason to move.
        share = math.ceil(BOUND * (sum(loads) + 1) / len(loads))
        index = home(identities, loads, share - 1, key)
        first = max(range(len(identities)), key=lambda i: affinity(identities[i], key))
        return Choice(index, "session" if index == first else "hot")
