"""The step loop and the device's thread, with a runner that computes nothing but checks what it is given."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from wherry_protocol.worker import SamplingParams
from wherry_runtime.engine.core import EngineCore, new_scheduler_factory
from wherry_runtime.engine.live import Live, Progress
from wherry_runtime.engine.sampling import BadLogitsError, Sampled
from wherry_runtime.scheduling.plan import SequenceStep
from wherry_runtime.scheduling.request import Request

DEADLINE_S = 120.0  # on a machine where others compute, too
STOP = 999


def token_at(position: int) -> int:
    """Every prompt and answer has this token there."""
    return 10 + position % 50


@dataclass
class FakePrepared:
    sequences: list[SequenceStep]


class FakeRunner:
    """Draws `token_at` each position, or whatever `draws` says; `before_run` may block or raise."""

    def __init__(self) -> None:
        self.cache = self
        self.prepared: list[list[str]] = []
        self.ran: list[list[str]] = []
        self.scrubbed: list[tuple[int, list[int]]] = []  # after how many steps, and the blocks
        self.draws: dict[tuple[str, int], Any] = {}
        self.before_run: Callable[[list[SequenceStep]], None] = lambda sequences: None
        self.threads: set[str] = set()
        self.wrong: list[str] = []

    def scrub(self, blocks: list[int]) -> None:
        self.scrubbed.append((len(self.ran), sorted(blocks)))

    def prepare(self, sequences: list[SequenceStep]) -> FakePrepared:
        self.prepared.append([s.request_id for s in sequences])
        return FakePrepared(sequences)

    def run(self, prepared: FakePrepared, live: Mapping[str, Live]) -> dict[str, Sampled | BadLogitsError]:
        self.threads.add(threading.current_thread().name)
        self.before_run(prepared.sequences)
        drawn: dict[str, Sampled | BadLogitsError] = {}
        for s in prepared.sequences:
            expected = [token_at(p) for p in range(s.start, s.end)]
            if s.tokens != expected and (s.request_id, s.end - 1) not in self.draws:
                self.wrong.append(f"{s.request_id} at {s.start}: {s.tokens}, not {expected}")
            if s.samples:
                failed = isinstance(self.draws.get((s.request_id, s.end - 1)), Exception)
                if live[s.request_id].num_tokens != s.end and not failed:
                    self.wrong.append(f"{s.request_id}: sampling knows {live[s.request_id].num_tokens} of {s.end}")
                outcome = self.draws.get((s.request_id, s.end), token_at(s.end))
                drawn[s.request_id] = outcome if isinstance(outcome, Exception) else Sampled(outcome)
        self.ran.append([s.request_id for s in prepared.sequences])
        return drawn


class Loop:
    """A step loop and what it reports."""

    def __init__(self, **settings: Any) -> None:
        self.runner = FakeRunner()
        self.tokens: dict[str, list[int]] = defaultdict(list)
        self.last: dict[str, Progress] = {}
        self._changed = threading.Condition()
        self.on_report: Callable[[list[Progress]], None] = lambda progress: None
        options = {"num_blocks": 100, "block_size": 4, "prefix_cache": True, "max_running": 8}
        options |= {"max_batched_tokens": 64, "max_queued": 100}
        self.core = EngineCore(self.runner, new_scheduler_factory(**(options | settings)), self._report)

    def _report(self, progress: list[Progress]) -> None:
        self.on_report(progress)
        with self._changed:
            for item in progress:
                if item.token is not None:
                    self.tokens[item.request_id].append(item.token)
                if item.finish is not None or item.error is not None:
                    self.last[item.request_id] = item
            self._changed.notify_all()

    def add(self, name: str, prompt: int = 5, new: int = 10) -> None:
        request = Request(name, [token_at(p) for p in range(prompt)], new)
        self.core.add(Live(request, SamplingParams(), seed=0, stop_ids=frozenset({STOP})))

    def until(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, DEADLINE_S)

    def ended(self, *names: str) -> None:
        self.until(lambda: all(name in self.last for name in names))

    def settled(self) -> None:
        until(lambda: self.core.scheduler.in_flight == 0 and self.core.scheduler.idle)
        self.core.scheduler.check_integrity()
        assert self.core.scheduler.blocks.num_free == self.core.scheduler.blocks.num_blocks
        assert self.runner.wrong == []


def until(condition: Callable[[], bool]) -> None:
    """Waits for what nobody tells about."""
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, "deadline"
        threading.Event().wait(0.001)


def wait(event: threading.Event) -> None:
    assert event.wait(DEADLINE_S)


def answer(prompt: int, new: int) -> list[int]:
    return [token_at(prompt + i) for i in range(new)]


@contextmanager
def running(**settings: Any) -> Iterator[Loop]:
    loop = Loop(**settings)
    loop.core.start()
    try:
        yield loop
        loop.settled()
    finally:
        loop.core.close()


def test_the_next_step_is_prepared_while_one_computes_and_started_without_the_loop() -> None:
    with running() as loop:
        second_ran = threading.Event()

        def before_run(sequences: list[SequenceStep]) -> None:
            if not loop.runner.ran:
                until(lambda: len(loop.runner.prepared) >= 2)  # by the loop, while this step computes
            else:
                second_ran.set()

        def on_report(progress: list[Progress]) -> None:
            if any(item.token is not None for item in progress):
                assert second_ran.wait(DEADLINE_S)  # the loop is held up, the device is not

        loop.runner.before_run, loop.on_report = before_run, on_report
        loop.add("a")
        loop.ended("a")
        assert loop.tokens["a"] == answer(5, 10)
        assert loop.runner.threads == {"wherry-device"}


def test_who_comes_while_a_step_computes_is_in_the_next_one_or_the_one_after() -> None:
    with running() as loop:
        gate = threading.Event()
        loop.runner.before_run = lambda sequences: wait(gate)
        loop.add("a")
        until(lambda: len(loop.runner.prepared) == 2)
        loop.add("b")
        gate.set()
        loop.ended("a", "b")
        assert loop.runner.ran[2] == ["a", "b"]
        assert (loop.tokens["a"], loop.tokens["b"]) == (answer(5, 10), answer(5, 10))


def test_a_stop_token_ends_an_answer_whose_next_step_is_under_way() -> None:
    with running() as loop:
        loop.runner.draws["a", 7] = STOP
        loop.add("a")
        loop.add("b")
        loop.ended("a", "b")
        assert loop.tokens["a"] == [*answer(5, 2), STOP]
        assert loop.last["a"].finish == "stop"
        assert loop.tokens["b"] == answer(5, 10)
        assert sum("a" in step for step in loop.runner.ran) <= 4  # three, and one whose result is dropped


def test_cancelling_while_two_steps_have_the_request() -> None:
    with running() as loop:
        gate = threading.Event()
        loop.runner.before_run = lambda sequences: wait(gate)
        loop.add("a", new=300)
        until(lambda: len(loop.runner.prepared) == 2)
        loop.core.cancel("a")
        gate.set()
        loop.ended("a")
        assert loop.last["a"].finish == "cancelled"


@pytest.mark.parametrize("broken", ["run", "prepare"])
def test_a_step_that_fails_takes_the_next_one_back_and_is_taken_apart(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(sequences: list[SequenceStep]) -> None:
        if any(s.request_id == "bad" and s.end > 8 for s in sequences):
            raise ValueError("bad state")

    with running() as loop:
        if broken == "run":
            loop.runner.before_run = refuse
        else:
            prepare = loop.runner.prepare

            def odd(sequences: list[SequenceStep]) -> FakePrepared:
                refuse(sequences)
                return prepare(sequences)

            monkeypatch.setattr(loop.runner, "prepare", odd)
        for name in ("a", "bad", "c"):
            loop.add(name)
        loop.ended("a", "bad", "c")
        error = loop.last["bad"].error
        assert error is not None
        assert (error.code, error.retryable) == ("engine_error", True)
        assert loop.tokens["bad"] == answer(5, 4)
        assert loop.tokens["a"] == loop.tokens["c"] == answer(5, 10)


def test_output_that_is_not_finite_is_scrubbed_after_the_last_step_that_writes_it() -> None:
    with running() as loop:
        loop.runner.draws["bad", 8] = BadLogitsError("NaN")
        loop.add("bad")
        loop.add("b")
        loop.ended("bad", "b")
        error = loop.last["bad"].error
        assert error is not None
        assert error.code == "bad_logits"
        assert loop.tokens["b"] == answer(5, 10)
        ((steps, blocks),) = loop.runner.scrubbed
        assert len(blocks) >= 2
        assert not any("bad" in step for step in loop.runner.ran[steps:])


@pytest.mark.parametrize("room", [1, 3, 9])
def test_steps_that_run_out_of_memory_are_made_smaller_and_nothing_is_lost(room: int) -> None:
    def allocate(sequences: list[SequenceStep]) -> None:
        if sum(len(s.tokens) for s in sequences) > room:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: ...")

    with running() as loop:
        loop.runner.before_run = allocate
        names = [f"r{i}" for i in range(8)]
        for i, name in enumerate(names):
            loop.add(name, prompt=3 + 5 * i)
        loop.ended(*names)
        for i, name in enumerate(names):
            assert loop.last[name].finish == "length"
            assert loop.tokens[name] == answer(3 + 5 * i, 10)


def test_a_request_that_does_not_fit_into_memory_alone_fails_alone() -> None:
    def allocate(sequences: list[SequenceStep]) -> None:
        if any(s.request_id == "bad" and s.end > 7 for s in sequences):
            raise MemoryError

    with running() as loop:
        loop.runner.before_run = allocate
        for name in ("a", "bad", "c"):
            loop.add(name)
        loop.ended("a", "bad", "c")
        error = loop.last["bad"].error
        assert error is not None
        assert (error.code, error.retryable) == ("out_of_memory", True)
        assert loop.tokens["bad"] == answer(5, 3)
        assert loop.tokens["a"] == loop.tokens["c"] == answer(5, 10)


def test_closing_drops_the_step_that_has_not_begun() -> None:
    loop = Loop()
    loop.core.start()
    gate = threading.Event()
    loop.runner.before_run = lambda sequences: wait(gate)
    loop.add("a")
    until(lambda: len(loop.runner.prepared) == 2)
    closing = threading.Thread(target=loop.core.close)
    closing.start()
    until(lambda: loop.core._closing)
    gate.set()
    closing.join(DEADLINE_S)
    assert not closing.is_alive()
    error = loop.last["a"].error
    assert error is not None
    assert error.code == "shutting_down"
    assert len(loop.runner.ran) <= 2
    until(lambda: not any(t.name == "wherry-device" and t.is_alive() for t in threading.enumerate()))
