"""Who goes where there is no room: the least recently used of the tenant that takes the most, the new one counted in.

So a tenant alone has all of the room, and one that fills it pushes out its own and nobody else's.
"""

import heapq
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Fair(Generic[K]):
    """The sizes of things that tenants keep; at most `room` of them together. Sizes are of any unit, and positive."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._kept: dict[str, OrderedDict[K, int]] = {}
        self._taken: dict[str, int] = {}
        # Each tenant is in here at least once with no less than it takes: what is too much is put right when it is met.
        self._most: list[tuple[int, str]] = []
        self.used = 0

    def put(self, tenant: str, key: K, size: int) -> list[tuple[str, K]] | None:
        """Notes that `tenant` keeps `key`, instead of what it kept by that name; returns who has to go for it. None: it
        is larger than all the room, and is not kept."""
        self.drop(tenant, key)
        if size > self._room:
            return None
        gone = []
        while self.used + size > self._room:
            heaviest = self._heaviest()
            mine = self._taken.get(tenant, 0)
            if mine and mine + size > self._taken[heaviest]:
                heaviest = tenant  # with this one it is
            oldest = next(iter(self._kept[heaviest]))
            gone.append((heaviest, oldest))
            self.drop(heaviest, oldest)
        self._kept.setdefault(tenant, OrderedDict())[key] = size
        self.used += size
        self._taken[tenant] = self._taken.get(tenant, 0) + size
        heapq.heappush(self._most, (-self._taken[tenant], tenant))
        if len(self._most) > 2 * len(self._taken) + 64:
            self._most = [(-taken, name) for name, taken in self._taken.items()]
            heapq.heapify(self._most)
        return gone

    def touch(self, tenant: str, key: K) -> None:
        """Notes that `key` was used."""
        if (kept := self._kept.get(tenant)) is not None and key in kept:
            kept.move_to_end(key)

    def drop(self, tenant: str, key: K) -> None:
        """Forgets `key`, if it is there."""
        kept = self._kept.get(tenant)
        if kept is None or key not in kept:
            return
        size = kept.pop(key)
        self.used -= size
        self._taken[tenant] -= size
        if not self._taken[tenant]:
            del self._taken[tenant], self._kept[tenant]

    def _heaviest(self) -> str:
        while True:
            taken, tenant = self._most[0]
            now = self._taken.get(tenant, 0)
            if -taken == now:
                return tenant
            heapq.heappop(self._most)
            if now:
                heapq.heappush(self._most, (-now, tenant))
