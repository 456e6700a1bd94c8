"""Follows the load reports that replicas push: one stream each, opened again for as long as discovery names it."""

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import aiohttp
import msgspec

from wherry_protocol.worker import LoadUpdate
from wherry_router.pool import Pool, Replica

log = logging.getLogger("wherry.router")

_BACKOFF_S = (0.1, 2.0)

Watch = Callable[[str], AsyncGenerator[LoadUpdate, None]]


class NoFeedError(Exception):
    """The worker does not tell its load now."""


class LoadFeed:
    """`watch(url)` yields a worker's updates, and raises or ends when there are no more."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._tasks: dict[Replica, asyncio.Task[None]] = {}

    def follow(self, pool: Pool) -> None:
        """Follows all replicas of `pool`, and nobody else any more."""
        named = set(pool.replicas())
        for replica in self._tasks.keys() - named:
            self._tasks.pop(replica).cancel()
        for replica in named - self._tasks.keys():
            self._tasks[replica] = asyncio.get_running_loop().create_task(self._follow(pool, replica))

    async def close(self) -> None:
        """Ends all streams."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(self, pool: Pool, replica: Replica) -> None:
        failures = 0
        while True:
            problem = "the worker ended the stream"
            try:
                async with aclosing(self._watch(replica.endpoint.url)) as updates:
                    async for update in updates:
                        failures = 0
                        pool.reported(replica, update)
            except (aiohttp.ClientError, OSError, TimeoutError, msgspec.DecodeError, ValueError, NoFeedError) as error:
                problem = str(error) or type(error).__name__
            # What it has cached it probably has still; how busy it is, nobody knows.
            pool.reported(replica, None)
            if not failures:
                fields = {"replica": replica.endpoint.name, "problem": problem[:300]}
                log.info("no load reports", extra={"fields": fields})
            low, high = _BACKOFF_S
            await asyncio.sleep(min(low * 2 ** min(failures, 10), high) * random.uniform(0.5, 1.0))  # noqa: S311
            failures += 1
