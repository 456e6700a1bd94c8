"""Tells a worker that is slow from one that is gone or frozen.

Silence alone proves nothing: a request may wait long in a full queue, and a large model takes long for a token. So
silence leads to a question, `GET /health`, and only a worker that does not answer it either is given up.

A connection may be dead though its worker is well. A worker begins its answer when it takes the request into its queue,
and says from then on when it has nothing to say (`sse.HEARTBEAT`), so one that is well and not heard at all is given up
on this connection.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from wherry_protocol.sse import HEARTBEAT_S

# How many times as long as usual a worker may take to say that it is well, and at most in shares of the usual bound:
# what a frozen worker's clients wait is bounded by it, on the busiest machine too.
_PATIENCE = 8.0
_MOST = 2.5
_WEIGHT = 0.2
_MAX_KNOWN = 4096
_FRESH_S = 0.1
# A worker's time to answer is counted in turns of the event loop, each as long as this at most: a router that is short
# of processor itself, or was stopped, reads late what has come in time.
_TURN_S = 0.05


class Health:
    """Asks workers whether they are well; many streams of one worker share a question.

    A worker on a busy machine takes longer to answer, and longer is then no sign of death: what each has usually taken
    lengthens the time that it gets.
    """

    def __init__(self, well: Callable[[str], Coroutine[Any, Any, bool]], timeout_s: float) -> None:
        """`well(url)` asks once, for as long as it takes."""
        self._well = well
        self._timeout = timeout_s
        self._usual: dict[str, float] = {}
        self._asked: dict[str, asyncio.Task[bool]] = {}
        self._well_at: dict[str, float] = {}  # when the last question was asked that it answered well

    def is_well(self, url: str) -> bool:
        """Whether a moment ago it said that it is well: thousands of silent streams need not ask, each for itself."""
        return self._well_at.get(url, -math.inf) >= asyncio.get_running_loop().time() - _FRESH_S

    def timeout(self, url: str) -> float:
        """Seconds that this worker gets."""
        return min(max(self._timeout, _PATIENCE * self._usual.get(url, 0.0)), _MOST * self._timeout)

    async def ask(self, url: str) -> bool:
        """Whether it says that it is well."""
        task = self._asked.get(url)
        if task is None:
            task = self._asked[url] = asyncio.get_running_loop().create_task(self._ask(url))
            task.add_done_callback(lambda _: self._asked.pop(url, None))
        return await asyncio.shield(task)

    def close(self) -> None:
        """Ends all questions."""
        for task in self._asked.values():
            task.cancel()

    async def _ask(self, url: str) -> bool:
        loop = asyncio.get_running_loop()
        began = loop.time()
        well = await self._answer(url)
        if well:
            if len(self._usual) >= _MAX_KNOWN:  # most of them of workers that went long ago
                self._usual.clear()
                self._well_at.clear()
            self._well_at[url] = began
            took = loop.time() - began
            before = self._usual.get(url, took)
            self._usual[url] = before + _WEIGHT * (took - before)
        return well

    async def _answer(self, url: str) -> bool:
        asking = asyncio.get_running_loop().create_task(self._well(url))
        try:
            for _ in range(math.ceil(self.timeout(url) / _TURN_S)):
                await asyncio.wait({asking}, timeout=_TURN_S)
                if asking.done():
                    return asking.result()
            return False
        finally:
            asking.cancel()


# How long not even a sign of life came before a connection is given up.
_MUTE_S = 2.5 * HEARTBEAT_S
_LOOK_AGAIN_S = 0.05
# How long a worker may take to refuse a request or to begin its answer, over the time in which it says that it is well,
# and how fast it does at least what comes before that: it reads the request, renders its template, makes tokens of it.
_BEGIN_S = 1.0
_READS_BYTES_PER_S = 250_000


def begins_within(well_s: float, num_bytes: int) -> float:
    """Seconds in which a worker refuses a request of `num_bytes` or begins to answer; `well_s`: `Health.timeout`."""
    return _BEGIN_S + well_s + num_bytes / _READS_BYTES_PER_S


class Watchdog:
    """Calls `abort` when the worker was silent for `stall_s` and `alive` says no; when `alive` says yes, but no answer
    has `begun` after `begin_s`, or one that promised signs of life gives none; when `deadline` passes before a token;
    or when `leaves` says so.

    `touch` is called for every event; it only notes the time, so that a token costs no timer. `hold` and `reads` stand
    around the time in which nobody reads from the worker, since the client is slow: then silence says nothing of the
    connection.
    """

    __slots__ = (
        "_alive",
        "_asking",
        "_begins",
        "_deadline",
        "_is_well",
        "_leaves",
        "_loop",
        "_pulse",
        "_reads",
        "_stall",
        "_timer",
        "abort",
        "expired",
        "heard",
        "left",
        "lost",
        "mute",
    )

    def __init__(
        self,
        stall_s: float,
        begin_s: float,
        deadline: float,
        alive: Callable[[], Awaitable[bool]],
        abort: Callable[[], None],
        leaves: Callable[[], bool] = lambda: False,
        is_well: Callable[[], bool] = lambda: False,
    ) -> None:
        """`is_well`: whether `alive` would say yes, as far as that is known without asking."""
        self._loop = asyncio.get_running_loop()
        self._stall = stall_s
        self._deadline: float | None = deadline
        self._alive = alive
        self._leaves = leaves
        self._is_well = is_well
        self._asking: asyncio.Task[None] | None = None
        self.heard = self._loop.time()
        self._begins: float | None = self.heard + begin_s
        self.abort = abort
        self._pulse: float | None = None  # last sign of life that is no event; None: none is promised
        self._reads: float | None = self.heard  # since when somebody reads from the worker
        self.lost = False
        self.mute = False  # it is lost though the worker is well
        self.expired = False
        self.left = False
        self._timer = self._arm(stall_s)

    def _arm(self, delay: float) -> asyncio.TimerHandle:
        if self._deadline is not None:
            delay = min(delay, max(self._deadline - self._loop.time(), 0))
        return self._loop.call_later(delay, self._tick)

    def touch(self) -> None:
        """The worker sent something."""
        self.heard = self._loop.time()

    def begun(self, *, promises: bool) -> None:
        """The worker answers. `promises`: there will be signs of life."""
        self._begins = None
        if promises:
            self.beat()

    def beat(self) -> None:
        """The worker gave a sign of life."""
        self._pulse = self._loop.time()

    def hold(self) -> None:
        """An event is on its way to the client; nobody reads from the worker meanwhile."""
        self._reads = None

    def reads(self) -> None:
        """Somebody reads again."""
        self._reads = self._loop.time()

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
        elif self._leaves():
            self.left = True
            self.abort()
        elif now - self.heard >= self._stall:
            if self._is_well():
                self._judge(alive=True)
            else:
                self._asking = self._loop.create_task(self._ask())
        else:
            self._timer = self._arm(self.heard + self._stall - now)

    def _until_mute(self) -> float:
        """Seconds until a connection without any sign of life is given up."""
        if self._begins is not None:
            return self._begins - self._loop.time()
        if self._pulse is None or self._reads is None:
            return self._stall
        last = max(self.heard, self._pulse, self._reads)
        return last + _MUTE_S - self._loop.time()

    async def _ask(self) -> None:
        asked = self.heard
        alive = await self._alive()
        self._judge(alive=alive or self.heard != asked)

    def _judge(self, *, alive: bool) -> None:
        left = self._until_mute()
        if alive and (left > 0 or self._loop.time() - self.heard < self._stall):
            self._timer = self._arm(min(self._stall, max(left, _LOOK_AGAIN_S)))
            return
        self.lost = True
        self.mute = alive
        self.abort()
