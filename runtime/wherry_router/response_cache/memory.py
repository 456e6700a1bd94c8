"""Where answers are kept, and the store in this process."""

from collections.abc import Callable
from typing import Protocol

from wherry_router.response_cache.fair import Fair

# What an entry takes beside its own bytes: key, dictionary slots, bytes object.
OVERHEAD = 400


class Store(Protocol):
    """Where answers are kept, by tenant and key. Losing one costs time and nothing else."""

    @property
    def used(self) -> int:
        """Bytes that all of them take, as far as is known here."""

    async def get(self, tenant: str, key: bytes) -> bytes | None:
        """What was put there, if it is still there and can be had at once."""

    def put(self, tenant: str, key: bytes, value: bytes) -> None:
        """Keeps it for a while; it may be there only after this returns, or never."""


class Memory:
    """A `Store` of `max_bytes` in this process, shared by `Fair`; all go after `ttl_s`."""

    def __init__(self, max_bytes: int, ttl_s: float, clock: Callable[[], float]) -> None:
        self._ttl = ttl_s
        self._clock = clock
        self._fair: Fair[bytes] = Fair(max_bytes)
        self._entries: dict[tuple[str, bytes], tuple[float, bytes]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def used(self) -> int:
        """Bytes of all entries, with what they take beside their own."""
        return self._fair.used

    async def get(self, tenant: str, key: bytes) -> bytes | None:
        """See `Store.get`."""
        entry = self._entries.get((tenant, key))
        if entry is None:
            return None
        until, value = entry
        if until <= self._clock():
            self._fair.drop(tenant, key)
            del self._entries[tenant, key]
            return None
        self._fair.touch(tenant, key)
        return value

    def put(self, tenant: str, key: bytes, value: bytes) -> None:
        """See `Store.put`."""
        self._entries.pop((tenant, key), None)
        gone = self._fair.put(tenant, key, len(value) + OVERHEAD)
        if gone is not None:
            self._entries[tenant, key] = (self._clock() + self._ttl, value)
            for entry in gone:
                del self._entries[entry]
