"""What the workers can take now, from their load reports: slots and room in the KV cache together.

A worker is kept full and has a few requests more, so that it never waits for the router; the others queue in the
router, where order and fairness are decided. Reports count the requests of all routers, so several of them share the
workers without knowing of each other.
"""

import math
from collections.abc import Iterable
from typing import Protocol

import msgspec

from wherry_protocol.worker import LoadReport

# Requests that may wait in a worker, as a share of those that run there, and at least.
QUEUE_SHARE = 0.125
QUEUE_LEAST = 2
# Share of a KV cache that new prompts may fill; the rest is for answers that grow.
KV_SHARE = 0.9
# A replica that has just come gets so many requests until it tells its load; one that never does is taken for a worker
# that tells nothing.
NEW_LIMIT = 4
NEW_S = 1.0


class Replica(Protocol):
    """What is read of a replica. `requests`: those of this router. `load`: None where it is not known."""

    @property
    def requests(self) -> int: ...

    @property
    def load(self) -> LoadReport | None: ...


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """Of all replicas that requests may go to now, together.

    Attributes:
        replicas: how many.
        limit: requests that they take, waiting ones included.
        others: requests there that are not this router's; negative where its own run on replicas that get none.
        queue: how many of `limit` are to wait.
        waiting: requests that wait there, as last reported.
        kv_free: tokens that new prompts may take.
        since: when the oldest of the reports came; what was sent later is not in them.
    """

    replicas: int
    limit: float
    others: int = 0
    queue: int = 0
    waiting: int = 0
    kv_free: float = math.inf
    since: float = 0.0


OPEN = Capacity(replicas=1, limit=math.inf)
"""Takes everything: what is behind has bounds of its own."""


def queue_of(max_running: int) -> int:
    """Requests that may wait in a worker."""
    return max(QUEUE_LEAST, math.ceil(max_running * QUEUE_SHARE))


class Meter:
    """Turns reports into a capacity. It remembers what this router had on a replica when its last report came, and
    since when a replica has told nothing."""

    def __init__(self, max_per_replica: int) -> None:
        self._max_per_replica = max_per_replica
        self._seen: dict[Replica, tuple[LoadReport | None, int, float]] = {}

    def measure(self, replicas: Iterable[Replica], elsewhere: int, now: float) -> Capacity:
        """The capacity of `replicas`. Of one that tells no load only the bound of requests (bulkhead) is known.

        Args:
            elsewhere: this router's requests on replicas that get no new ones.
        """
        seen: dict[Replica, tuple[LoadReport | None, int, float]] = {}
        limit = others = queue = waiting = 0
        kv_free, since = 0.0, now
        for replica in replicas:
            load = replica.load
            before = self._seen.get(replica)
            if before is None or before[0] is not load:
                before = (load, replica.requests, now)
            seen[replica] = before
            if load is None:
                limit += min(NEW_LIMIT if now - before[2] < NEW_S else self._max_per_replica, self._max_per_replica)
                kv_free = math.inf
                continue
            extra = queue_of(load.max_running)
            limit += min(load.max_running + extra, self._max_per_replica)
            others += max(load.running + load.waiting - before[1], 0)
            queue += extra
            waiting += load.waiting
            kv_free += max(KV_SHARE * (load.kv_tokens_total or math.inf) - load.kv_tokens_used, 0.0)
            since = min(since, before[2])
        self._seen = seen
        return Capacity(
            replicas=len(seen),
            limit=limit,
            others=others - elsewhere,
            queue=queue,
            waiting=waiting,
            kv_free=kv_free,
            since=since,
        )
