"""Admission as the hot path sees it: `async with admission.place(…)` around what a request does on the workers."""

import asyncio
import functools
import time
from collections.abc import Callable

from wherry_protocol.http.asgi import Scope
from wherry_protocol.openai.errors import ApiError, invalid
from wherry_protocol.worker import EXPECTED_OUTPUT
from wherry_router.admission.capacity import OPEN, Capacity, Meter
from wherry_router.admission.classes import HEADER, Classes
from wherry_router.admission.metrics import AdmissionMetrics
from wherry_router.admission.queues import Queues, Turned
from wherry_router.admission.settings import QueueSettings
from wherry_router.admission.ticket import State, Ticket
from wherry_router.caller import Caller
from wherry_router.pool import Pool

TIMEOUT_HEADER = b"x-wherry-queue-timeout-ms"
_MAX_TIMEOUT_MS = 3_600_000
BYTES_PER_TOKEN = 4
# How often the queue looks at load reports and deadlines while something waits; every answer that ends looks, too.
_LOOK_S = 0.02
# For so long one look at the replicas serves all requests.
_FRESH_S = 0.005
_LEAST_WEIGHT = 1e-3


class Admission:
    """All of admission. Without a pool everything passes: what is behind has bounds of its own."""

    def __init__(
        self,
        settings: QueueSettings,
        metrics: AdmissionMetrics,
        pool: Pool | None = None,
        max_per_replica: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._pool = pool
        self._clock = clock
        self.classes = Classes(settings.classes)
        self._queues = Queues(self.classes, settings.bounds, clock())
        self._meter = Meter(max_per_replica)
        self._capacity: Capacity = OPEN
        self._measured = float("-inf")
        self._runner: asyncio.Task[None] | None = None
        self._waits = [metrics.wait.labels(one.name) for one in self.classes.all]
        for one, queue in zip(self.classes.all, self._queues.queues, strict=True):
            metrics.requests.labels(one.name).set_function(functools.partial(getattr, queue, "requests"))
            metrics.tokens.labels(one.name).set_function(functools.partial(getattr, queue, "tokens"))

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return self._queues.requests

    def place(self, scope: Scope, caller: Caller, prompt: int, output: int | None, choices: int) -> "Place":
        """A request's place, to be entered before it goes to a worker.

        Args:
            prompt: tokens of its prompts, estimated.
            output: tokens of each answer at most; None: not bounded.
            choices: answers to be generated.

        Raises:
            ApiError: 400 or 403, for a header that is wrong or asks for too much.
        """
        asked = timeout = None
        for name, value in scope["headers"]:
            if name == HEADER:
                asked = value
            elif name == TIMEOUT_HEADER:
                timeout = value
        now = self._clock()
        ticket = Ticket(
            rank=self.classes.of(asked, caller),
            tenant=caller.tenant,
            weight=max(caller.weight, _LEAST_WEIGHT),
            prompt=prompt,
            cost=prompt + choices * min(output or EXPECTED_OUTPUT, EXPECTED_OUTPUT),
            slots=choices,
            arrived=now,
            deadline=now + (self._settings.timeout_s if timeout is None else _milliseconds(timeout) / 1e3),
        )
        return Place(self, ticket)

    def enter(self, ticket: Ticket) -> None:
        """Lets a request through, or queues it: then `woken` is set.

        Raises:
            ApiError: it is refused.
        """
        now = ticket.arrived
        passed, turned = self._queues.offer(ticket, now, self._measure(now))
        if ticket.state is State.QUEUED:
            ticket.woken = asyncio.get_running_loop().create_future()
            if self._runner is None or self._runner.done():
                self._runner = asyncio.create_task(self._run())
        elif ticket.state is State.RUNNING:
            self._waits[ticket.rank].observe(0.0)
        refused = [one for one in turned if one.ticket is ticket]
        self._tell(passed, [one for one in turned if one.ticket is not ticket], now)
        if refused:
            raise self._refusal(refused[0])

    def leave(self, ticket: Ticket, tokens: int) -> None:
        """A request is over; `tokens` is what it took."""
        now = self._clock()
        self._queues.leave(ticket, now, tokens)
        self._pump(now)

    def freed(self, ticket: Ticket) -> None:
        """One of a request's answers is whole, others are not."""
        if ticket.state is State.RUNNING:
            self._queues.freed(ticket)

    async def _run(self) -> None:
        """Looks again and again while something waits."""
        while self._queues.requests:
            now = self._clock()
            await asyncio.sleep(min(max(self._queues.next_deadline() - now, 0.0), _LOOK_S))
            now = self._clock()
            self._tell([], self._queues.expire(now), now)
            self._pump(now)

    def _pump(self, now: float) -> None:
        if self._queues.requests:
            self._tell(self._queues.pump(now, self._measure(now)), [], now)

    def _measure(self, now: float) -> Capacity:
        pool = self._pool
        if pool is None or now - self._measured < _FRESH_S:
            return self._capacity
        usable = pool.usable()
        elsewhere = pool.requests() - sum(replica.requests for replica in usable)
        self._capacity = self._meter.measure(usable, elsewhere, now)
        self._measured = now
        return self._capacity

    def _tell(self, passed: list[Ticket], turned: list[Turned], now: float) -> None:
        for ticket in passed:
            self._waits[ticket.rank].observe(now - ticket.arrived)
            if ticket.woken is not None and not ticket.woken.done():
                ticket.woken.set_result(None)
        for one in turned:
            error = self._refusal(one)
            if one.ticket.woken is not None and not one.ticket.woken.done():
                one.ticket.woken.set_exception(error)

    def _refusal(self, turned: Turned) -> ApiError:
        name = self.classes.all[turned.ticket.rank].name
        self._metrics.refused(name, turned.reason)
        after = turned.retry_after_s
        match turned.reason:
            case "timeout":
                return ApiError(504, "queue_timeout", "No worker had room for the request in time.")
            case "no_replica":
                return ApiError(503, "no_replica", "No replica of the model is ready.", retry_after_s=2)
            case "too_slow":
                message = "The request could not begin in the time that it may wait."
                return ApiError(429, "queue_too_slow", message, retry_after_s=after)
            case "shed":
                return ApiError(429, "queue_full", "Other requests took this one's place.", retry_after_s=after)
            case _:
                return ApiError(429, "queue_full", f"The queue of class `{name}` is full.", retry_after_s=after)


class Place:
    """One request's turn. `tokens`: what it has taken so far, to be kept up by whoever generates."""

    __slots__ = ("_admission", "_ticket", "tokens")

    def __init__(self, admission: Admission, ticket: Ticket) -> None:
        self._admission = admission
        self._ticket = ticket
        self.tokens = 0

    @property
    def priority(self) -> int:
        """For the engine."""
        return self._admission.classes.all[self._ticket.rank].priority

    @property
    def prompt(self) -> int:
        """Tokens of the prompts, estimated."""
        return self._ticket.prompt

    def freed(self) -> None:
        """One of several answers is whole."""
        self._admission.freed(self._ticket)

    async def __aenter__(self) -> "Place":
        """Waits for its turn; without a switch of tasks where there is room.

        Raises:
            ApiError: it is refused.
        """
        self._admission.enter(self._ticket)
        if self._ticket.woken is not None:
            try:
                await self._ticket.woken
            except BaseException:
                # The client has left, or it is refused. Its turn may have come in the same moment.
                self._admission.leave(self._ticket, 0)
                raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._admission.leave(self._ticket, self.tokens)


def _milliseconds(value: bytes) -> int:
    if not value.isdigit() or len(value) > 7 or int(value) > _MAX_TIMEOUT_MS:
        name = TIMEOUT_HEADER.decode()
        raise invalid(f"`{name}` is a whole number of milliseconds, {_MAX_TIMEOUT_MS} at most.", name)
    return int(value)
