"""Answers that several routers keep together, in Redis or Valkey; and what holds while it is lost."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from wherry_router.redis_client import FAILURES, TIMEOUT_S, connect
from wherry_router.response_cache.circuit import LEAST_S, Circuit
from wherry_router.response_cache.memory import OVERHEAD
from wherry_router.response_cache.scripts import GET, PUT
from wherry_router.response_cache.seal import Seal

log = logging.getLogger("wherry.router")

CONNECTIONS = 16
# Answers on their way to Redis at a time; over it they are not kept.
_MOST_PENDING = 64
# A larger answer is not kept: it might take longer than `TIMEOUT_S`, and then Redis would count as lost.
LARGEST = 1 << 20
# Answers that may go for a new one: a script holds up all of Redis.
_MOST_EVICTED = 500
NEWS_S = 0.5
_NEWS = b"news"
_FIELD = b"v"
_AT_ONCE = 100


class RedisStore:
    """A `Store` of `max_bytes` in Redis for all routers with the same `prefix` and the same seal, shared by tenants as
    `Fair` does it; all go after `ttl_s`.

    While Redis is lost (one operation failed, or took longer than `TIMEOUT_S`), nothing is found and nothing is kept.
    """

    def __init__(
        self, url: str, prefix: str, max_bytes: int, ttl_s: float, seal: Seal, clock: Callable[[], float]
    ) -> None:
        self._redis = connect(url, CONNECTIONS)
        self._get = self._redis.register_script(GET)
        self._put = self._redis.register_script(PUT)
        # In braces, so that a cluster keeps all of it in one place: a script sees one place only.
        self._prefix = "{" + prefix + "}"
        self._max_bytes = max_bytes
        self._ttl_ms = int(ttl_s * 1000)
        self._seal = seal
        self._circuit = Circuit(1, clock, most_s=2 * LEAST_S)
        self._tasks: set[asyncio.Task[None]] = set()
        self._used = 0

    @property
    def used(self) -> int:
        """Bytes that all routers keep, as this one was told last."""
        return self._used

    @property
    def lost(self) -> bool:
        """Whether Redis is not asked now."""
        return self._circuit.open

    async def get(self, tenant: str, key: bytes) -> bytes | None:
        """See `Store.get`."""
        if self._circuit.open:
            return None
        of, name = self._seal.name(tenant.encode()), self._seal.name(key)
        keys = [f"{self._prefix}:answer:{of}:{name}", f"{self._prefix}:order:{of}"]
        try:
            async with asyncio.timeout(TIMEOUT_S):
                sealed = await self._get(keys, [name])
        except FAILURES as error:
            self._lose(error)
            return None
        return None if sealed is None else self._seal.open(key, sealed)

    def put(self, tenant: str, key: bytes, value: bytes) -> None:
        """See `Store.put`. Redis is told after this returns; not of more than `LARGEST` bytes."""
        if len(value) <= LARGEST:
            self._soon(lambda: self._keep(tenant, key, value))

    async def _keep(self, tenant: str, key: bytes, value: bytes) -> None:
        of, name, sealed = self._seal.name(tenant.encode()), self._seal.name(key), self._seal.close(key, value)
        size = len(sealed) + OVERHEAD
        bounds = (size, self._max_bytes, self._ttl_ms, _MOST_EVICTED)
        arguments: list[str | bytes | int] = [self._prefix, of, name, sealed, *bounds]
        keys = [f"{self._prefix}:tenants", f"{self._prefix}:bytes"]
        self._used = int(await self._put(keys, arguments))

    def tell(self, plain: bytes, most: int) -> None:
        """Tells all routers (see `told`), and the latest `most` things also those that start later; or nobody, where
        Redis is lost."""
        self._soon(lambda: self._tell(self._seal.close(_NEWS, plain), most))

    async def _tell(self, sealed: bytes, most: int) -> None:
        name = f"{self._prefix}:news"
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.xadd(name, {_FIELD: sealed}, maxlen=most, approximate=True)
            pipe.pexpire(name, self._ttl_ms)
            await pipe.execute()

    async def told(self) -> AsyncGenerator[tuple[bytes, float], None]:
        """What routers told, this one too, and for how many seconds more it is of use: first what is there, then what
        comes, `NEWS_S` late at most. Ends only with the task that it is in: while Redis is lost it waits."""
        last = b"-"
        while True:
            now, entries = await self._news(last)
            for entry, fields in entries:
                last = b"(" + entry
                left_s = (int(entry.split(b"-")[0]) + self._ttl_ms) / 1000 - now
                plain = self._seal.open(_NEWS, fields.get(_FIELD, b""))
                if plain is not None and left_s > 0:
                    yield plain, left_s
            if len(entries) < _AT_ONCE:
                await asyncio.sleep(NEWS_S)

    async def _news(self, after: bytes) -> tuple[float, list[tuple[bytes, dict[bytes, bytes]]]]:
        if self._circuit.open:
            return 0.0, []
        try:
            async with asyncio.timeout(TIMEOUT_S):
                async with self._redis.pipeline(transaction=False) as pipe:
                    pipe.time()
                    pipe.xrange(f"{self._prefix}:news", min=after, count=_AT_ONCE)
                    (seconds, micros), entries = await pipe.execute()
        except FAILURES as error:
            self._lose(error)
            return 0.0, []
        return seconds + micros / 1e6, entries

    async def run(self) -> None:
        """While Redis is lost, asks whether it is there. Never ends."""
        while True:
            await asyncio.sleep(LEAST_S / 2)
            if self._circuit.due():
                await self._probe()

    async def close(self) -> None:
        """Lets what is on its way arrive, then leaves."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._redis.aclose()

    async def _probe(self) -> None:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                # A write, as a replica or a server without memory left would answer a ping.
                await self._redis.set(f"{self._prefix}:probe", b"", px=1000)
        except FAILURES:
            self._circuit.failed()
            return
        self._circuit.succeeded()
        log.info("Redis answers again; answers are kept")

    def _lose(self, error: BaseException) -> None:
        if self._circuit.failed():
            fields = {"why": type(error).__name__}
            log.error("Redis is lost; no answer is found or kept", extra={"fields": fields})

    def _soon(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Does `work` with Redis after this returns, unless that is lost or too much is waiting for it."""
        if self._circuit.open or len(self._tasks) >= _MOST_PENDING:
            return
        task = asyncio.get_running_loop().create_task(self._within(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _within(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await work()
        except FAILURES as error:
            self._lose(error)
