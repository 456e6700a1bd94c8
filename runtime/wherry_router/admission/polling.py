"""Asks workers for their load, several times a second while requests run."""

import asyncio

from wherry_router.pool import Pool, Replica
from wherry_router.upstream import Upstream

_EVERY_S = 0.1
_IDLE_S = 1.0


class LoadPoll:
    """Keeps `load` of every replica of `pool` up to date."""

    def __init__(self, pool: Pool, upstream: Upstream) -> None:
        self._pool = pool
        self._upstream = upstream
        self._task: asyncio.Task[None] | None = None

    def start(self) -> "LoadPoll":
        """Begins to ask."""
        self._task = asyncio.create_task(self._run())
        return self

    async def stop(self) -> None:
        """Asks no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        idle_s = 0.0
        while True:
            unknown = any(replica.load is None for replica in self._pool.replicas())
            if unknown or idle_s >= _IDLE_S or self._pool.requests():
                idle_s = 0.0
                await asyncio.gather(*(self._ask(replica) for replica in self._pool.replicas()))
            await asyncio.sleep(_EVERY_S)
            idle_s += _EVERY_S

    async def _ask(self, replica: Replica) -> None:
        replica.load = await self._upstream.load(replica.endpoint.url)
