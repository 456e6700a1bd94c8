"""Asks replicas whose breaker is not closed whether they are ready. The I/O beside the pure files."""

import asyncio
from collections.abc import Awaitable, Callable

from wherry_router.pool import Pool, Replica
from wherry_router.resilience.breaker import State

_EVERY_S = 0.5

Ask = Callable[[str, str], Awaitable[bool]]


class Prober:
    """`ask(url, path)` says whether a GET answers 200. One task for each replica that is not well."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._tasks: dict[Replica, asyncio.Task[None]] = {}

    def watch(self, pool: Pool, replica: Replica) -> None:
        """Probes `replica` until its breaker is closed or discovery drops it."""
        running = self._tasks.get(replica)
        if running is None or running.done():
            task = asyncio.get_running_loop().create_task(self._until_well(pool, replica))
            self._tasks[replica] = task
            task.add_done_callback(lambda ended: self._forget(replica, ended))

    async def close(self) -> None:
        """Ends all probes."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _forget(self, replica: Replica, ended: asyncio.Task[None]) -> None:
        if self._tasks.get(replica) is ended:
            del self._tasks[replica]

    async def _until_well(self, pool: Pool, replica: Replica) -> None:
        while pool.has(replica) and replica.breaker.state is not State.CLOSED:
            well = await self._ask(replica.endpoint.url, "/ready")
            pool.probed(replica, well=well)
            await asyncio.sleep(_EVERY_S)
