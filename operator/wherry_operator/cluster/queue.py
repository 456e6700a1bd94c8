"""A work queue after client-go's: each key at most once, one worker per key, exponential backoff for what fails."""

import asyncio
from collections.abc import Hashable
from typing import Generic, TypeVar

from wherry_operator.metrics import QUEUE_LENGTH

K = TypeVar("K", bound=Hashable)

BACKOFF_FIRST_S = 0.2
BACKOFF_MAX_S = 30.0


class WorkQueue(Generic[K]):
    """Keys to look at. A key added while it is being worked on is handed out once more afterwards."""

    def __init__(self) -> None:
        self._ready: dict[K, None] = {}  # ordered
        self._working: set[K] = set()
        self._dirty: set[K] = set()
        self._failures: dict[K, int] = {}
        self._timers: dict[K, asyncio.TimerHandle] = {}
        self._wake = asyncio.Event()

    def __len__(self) -> int:
        return len(self._ready)

    def add(self, key: K) -> None:
        """Look at `key` soon."""
        if timer := self._timers.pop(key, None):
            timer.cancel()
        if key in self._working:
            self._dirty.add(key)
            return
        self._ready[key] = None
        QUEUE_LENGTH.set(len(self._ready))
        self._wake.set()

    def add_after(self, key: K, seconds: float) -> None:
        """Look at `key` after a while, or earlier if something asks for it earlier."""
        loop = asyncio.get_running_loop()
        timer = self._timers.get(key)
        if timer is not None:
            if timer.when() <= loop.time() + seconds:
                return
            timer.cancel()
        self._timers[key] = loop.call_later(seconds, self.add, key)

    async def get(self) -> K:
        """The next key; `done` or `failed` has to follow."""
        while not self._ready:
            self._wake.clear()
            await self._wake.wait()
        key = next(iter(self._ready))
        del self._ready[key]
        QUEUE_LENGTH.set(len(self._ready))
        self._working.add(key)
        return key

    def done(self, key: K) -> None:
        """The look at `key` succeeded."""
        self._failures.pop(key, None)
        self._release(key)

    def failed(self, key: K) -> float:
        """It failed: look again after a backoff, which is returned. News about the key do not cut it short."""
        count = self._failures[key] = self._failures.get(key, 0) + 1
        delay = min(BACKOFF_FIRST_S * 2.0 ** (count - 1), BACKOFF_MAX_S)
        self._dirty.discard(key)
        self._release(key)
        self.add_after(key, delay)
        return delay

    def _release(self, key: K) -> None:
        self._working.discard(key)
        if key in self._dirty:
            self._dirty.discard(key)
            self.add(key)
