"""Sends a workload to a server at the times it is due, whatever the server does about it (an open loop)."""

import asyncio
import contextlib
import resource
import signal
import zlib
from collections.abc import AsyncIterator, Iterable
from itertools import count
from typing import Any

import msgspec
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from wherry_cli.bench_client import BenchClient, Clock
from wherry_cli.bench_flags import Api
from wherry_cli.bench_stats import Outcome, spread
from wherry_cli.bench_workloads import Conversation
from wherry_cli.progress import console

_TELL_S = 0.5
_TELL_PLAIN_S = 10.0


class Plan(msgspec.Struct, kw_only=True):
    """A load test: where to, what, when, and for how long."""

    url: str
    model: str
    api: Api
    api_key: str | None
    arrivals: Iterable[float]
    conversations: Iterable[Conversation]
    total: int | None  # requests, if that is known before
    duration_s: float | None
    timeout_s: float
    seed: int
    options: dict[str, Any]


class Test:
    """One run. `outcomes` has what ended; `in_flight` counts what has not."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.outcomes: list[Outcome] = []
        self.in_flight = 0
        self.unfinished = 0
        self.interrupted = False

    async def run(self) -> None:
        """Returns when every request has ended, or after Ctrl-C, which cuts off those that run."""
        plan = self._plan
        _many_sockets()
        clock = Clock()
        client = BenchClient(
            plan.url,
            plan.model,
            plan.api,
            api_key=plan.api_key,
            timeout_s=plan.timeout_s,
            options=plan.options,
            clock=clock,
        )
        with contextlib.closing(_Teller(self, plan.total)) as teller:
            telling = asyncio.create_task(teller.run())
            sending = asyncio.create_task(self._send(client, clock))
            try:
                async with _interruptible(sending):
                    await sending
            except asyncio.CancelledError:
                self.interrupted = True
            finally:
                telling.cancel()
                self.unfinished = self.in_flight
                await client.close()

    async def _send(self, client: BenchClient, clock: Clock) -> None:
        plan = self._plan
        numbers = count()
        async with asyncio.TaskGroup() as group:
            for at, conversation in zip(plan.arrivals, plan.conversations, strict=False):
                if plan.duration_s is not None and at > plan.duration_s:
                    break
                await asyncio.sleep(max(at - clock(), 0.0))
                group.create_task(self._play(client, clock, conversation, at, next(numbers)))

    async def _play(
        self, client: BenchClient, clock: Clock, conversation: Conversation, at: float, number: int
    ) -> None:
        messages = list(conversation.before)
        for index, turn in enumerate(conversation.turns):
            if index:
                at = clock() + turn.think_s
                if self._plan.duration_s is not None and at > self._plan.duration_s:
                    return
                await asyncio.sleep(turn.think_s)
            messages.append(("user", turn.text))
            seed = zlib.crc32(f"{self._plan.seed} {number} {index}".encode())
            self.in_flight += 1
            outcome, text = await client.ask(messages, turn.output_tokens, seed, at, index)
            self.in_flight -= 1
            self.outcomes.append(outcome)
            if outcome.failure:
                return
            messages.append(("assistant", text))


@contextlib.asynccontextmanager
async def _interruptible(task: "asyncio.Task[None]") -> AsyncIterator[None]:
    """Ctrl-C cancels the task; what it measured is kept."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def _many_sockets() -> None:
    """As many open files as the system lets this process have: each running request is one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class _Teller:
    """Shows how it goes: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, test: Test, total: int | None) -> None:
        self._test = test
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task("", total=total)
            self._bar.start()

    async def run(self) -> None:
        while True:
            await asyncio.sleep(_TELL_S if self._bar else _TELL_PLAIN_S)
            if self._bar:
                self._bar.update(self._task, completed=len(self._test.outcomes), description=self._words())
            else:
                console.print(f"{len(self._test.outcomes)} ended, {self._words()}", soft_wrap=True)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()

    def _words(self) -> str:
        test = self._test
        lately = test.outcomes[-200:]
        median = spread([o.ttft for o in lately if o.ttft is not None]).percentiles["p50"]
        failed = sum(bool(outcome.failure) for outcome in test.outcomes)
        first = "–" if median is None else f"{median * 1e3:.0f} ms"
        return f"{test.in_flight} running, {failed} failed, time to first token {first}"
