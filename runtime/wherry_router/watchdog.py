"""Tells a worker that is slow from one that is gone or frozen.

Silence alone proves nothing: a request may wait long in a full queue. So silence leads to a question, `GET /health`,
and only a worker that does not answer it either is given up.
"""

import asyncio
from collections.abc import Awaitable, Callable


class Watchdog:
    """Calls `abort` when the worker was silent for `stall_s` and `alive` says no, or `deadline` passes before a token.

    `touch` is called for every sign of life; it only notes the time, so that a token costs no timer.
    """

    __slots__ = ("_alive", "_asking", "_deadline", "_last", "_loop", "_stall", "_timer", "abort", "expired", "lost")

    def __init__(
        self, stall_s: float, deadline: float, alive: Callable[[], Awaitable[bool]], abort: Callable[[], None]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._stall = stall_s
        self._deadline: float | None = deadline
        self._alive = alive
        self._asking: asyncio.Task[None] | None = None
        self._last = self._loop.time()
        self.abort = abort
        self.lost = False
        self.expired = False
        self._timer = self._arm(stall_s)

    def _arm(self, delay: float) -> asyncio.TimerHandle:
        if self._deadline is not None:
            delay = min(delay, max(self._deadline - self._loop.time(), 0))
        return self._loop.call_later(delay, self._tick)

    def touch(self) -> None:
        """The worker sent something."""
        self._last = self._loop.time()

    def first_token(self) -> None:
        """From now on only silence counts."""
        self._deadline = None

    def stop(self) -> None:
        """The answer is over."""
        self._timer.cancel()
        if self._asking is not None:
            self._asking.cancel()

    def _tick(self) -> None:
        now = self._loop.time()
        if self._deadline is not None and now >= self._deadline:
            self.expired = True
            self.abort()
        elif now - self._last >= self._stall:
            self._asking = self._loop.create_task(self._ask())
        else:
            self._timer = self._arm(self._last + self._stall - now)

    async def _ask(self) -> None:
        asked = self._last
        if await self._alive() or self._last != asked:
            self._timer = self._arm(self._stall)
        else:
            self.lost = True
            self.abort()
