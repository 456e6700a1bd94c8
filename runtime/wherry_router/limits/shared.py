"""Limits that several routers count together, in Redis or Valkey; and what holds while it is lost."""

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence
from typing import Any, Literal

import msgspec

from wherry_protocol.openai.errors import ApiError
from wherry_router.limits.bounds import GRANTED, WINDOW_S, Bound, Outcome, Standing
from wherry_router.limits.local import LocalStore
from wherry_router.limits.scripts import RENEW, RESERVE, SETTLE
from wherry_router.redis_client import FAILURES, TIMEOUT_S, connect

log = logging.getLogger("wherry.router")

Fallback = Literal["local", "open", "closed"]
PROBE_S = 0.5
CONNECTIONS = 32
# For so long a router vouches for what it has running. One that dies frees its places then.
LEASE_S = 30
_RENEW_S = 10
_RENEW_AT_ONCE = 500


class _Held(msgspec.Struct):
    keys: list[str]
    second: int  # Redis' time
    needs: list[int]
    concurrent: bool


class SharedStore:
    """Counts in Redis. While that is lost, by `fallback`: its own part of each limit (`local`), nothing (`open`), or no
    request at all (`closed`)."""

    def __init__(self, url: str, prefix: str, fallback: Fallback, local: LocalStore) -> None:
        self._redis = connect(url, CONNECTIONS)
        self._reserve = self._redis.register_script(RESERVE)
        self._settle = self._redis.register_script(SETTLE)
        self._renew = self._redis.register_script(RENEW)
        # In braces, so that a cluster keeps all of it in one place: a script sees one place only.
        self._prefix = "{" + prefix + "}"
        self._fallback = fallback
        self._local = local
        self._held: dict[str, _Held] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.lost = False

    async def reserve(self, request_id: str, bounds: Sequence[Bound], tokens: int) -> Outcome:
        """See `LocalStore.reserve`.

        Raises:
            ApiError: 503, Redis is lost and nothing may pass without it.
        """
        if self.lost:
            return self._alone(request_id, bounds, tokens)
        keys = [key for bound in bounds for key in self._keys(bound)]
        needs = [min(tokens, bound.limits.tokens_per_minute or tokens) for bound in bounds]
        arguments: list[str | int] = [request_id, LEASE_S * 1000, WINDOW_S]
        for bound, need in zip(bounds, needs, strict=True):
            limits = bound.limits
            arguments += [limits.requests_per_minute, limits.tokens_per_minute, limits.concurrent, need]
        try:
            async with asyncio.timeout(2 * TIMEOUT_S):
                answer = await self._reserve(keys, arguments)
        except FAILURES as error:
            self._lose(error)
            return self._alone(request_id, bounds, tokens)
        refused, what, wait_s, now, *rest = answer
        standings = [_standing(now, *rest[i : i + 4]) for i in range(0, len(rest), 4)]
        if refused >= 0:
            return Outcome(standings, refused, what.decode(), wait_s)
        concurrent = any(bound.limits.concurrent for bound in bounds)
        self._held[request_id] = _Held(keys, now, needs, concurrent)
        # So that the router knows what it let through, should it have to count alone from the next one on.
        self._local.reserve(request_id, bounds, tokens, force=True)
        return Outcome(standings)

    def add(self, request_id: str, tokens: int) -> None:
        """See `LocalStore.add`."""
        self._local.add(request_id, tokens)
        if (held := self._held.get(request_id)) is not None:
            held.needs = [need + tokens for need in held.needs]
            self._start(self._put_right(held.keys, "", 0, [tokens] * len(held.needs)))

    def settle(self, request_id: str, tokens: int) -> None:
        """See `LocalStore.settle`. Redis is told after this returns."""
        self._local.settle(request_id, tokens)
        if (held := self._held.pop(request_id, None)) is not None:
            changes = [tokens - need for need in held.needs]
            self._start(self._put_right(held.keys, request_id, held.second, changes))

    async def run(self) -> None:
        """Vouches for what runs and, while Redis is lost, asks for it. Never ends."""
        renewed = time.monotonic()
        while True:
            await asyncio.sleep(PROBE_S)
            if self.lost:
                await self._probe()
            elif time.monotonic() - renewed >= _RENEW_S:
                renewed = time.monotonic()
                await self._vouch()

    async def close(self) -> None:
        """Lets what is on its way arrive, then leaves."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._redis.aclose()

    def _alone(self, request_id: str, bounds: Sequence[Bound], tokens: int) -> Outcome:
        if self._fallback == "closed":
            raise ApiError(503, "limits_unavailable", "Limits cannot be counted now; try again.", retry_after_s=1)
        if self._fallback == "open":
            return GRANTED
        return self._local.reserve(request_id, bounds, tokens)

    def _keys(self, bound: Bound) -> tuple[str, str]:
        base = f"{self._prefix}:{bound.scope}:{bound.name}"
        return base + ":counts", base + ":running"

    async def _put_right(self, keys: list[str], request_id: str, second: int, changes: list[int]) -> None:
        if self.lost:
            return
        try:
            async with asyncio.timeout(2 * TIMEOUT_S):
                await self._settle(keys, [request_id, WINDOW_S, second, *changes])
        except FAILURES as error:
            self._lose(error)

    async def _vouch(self) -> None:
        pairs = [(key, name) for name, held in self._held.items() if held.concurrent for key in held.keys[1::2]]
        for start in range(0, len(pairs), _RENEW_AT_ONCE):
            part = pairs[start : start + _RENEW_AT_ONCE]
            try:
                async with asyncio.timeout(2 * TIMEOUT_S):
                    await self._renew([key for key, _ in part], [LEASE_S * 1000, *(name for _, name in part)])
            except FAILURES as error:
                self._lose(error)
                return

    async def _probe(self) -> None:
        try:
            async with asyncio.timeout(2 * TIMEOUT_S):
                # A write, as a replica or a server without memory left would answer a ping.
                await self._renew([f"{self._prefix}:probe"], [1000, "probe"])
        except FAILURES:
            return
        self.lost = False
        log.info("Redis answers again; limits are counted together")
        await self._vouch()

    def _lose(self, error: BaseException) -> None:
        if not self.lost:
            self.lost = True
            fields = {"why": type(error).__name__, "fallback": self._fallback}
            log.error("Redis is lost; limits are kept by the fallback", extra={"fields": fields})

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _standing(now: int, requests: int, requests_newest: int, tokens: int, tokens_newest: int) -> Standing:
    def reset(newest: int) -> int:
        return max(newest + WINDOW_S + 1 - now, 0)

    return Standing(requests, reset(requests_newest), tokens, reset(tokens_newest))
