"""How much of a prompt goes into a step beside answers: what steps cost, and whole runs on a virtual clock."""

import itertools
import math
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from wherry_runtime.scheduling.blocks import BlockManager
from wherry_runtime.scheduling.pacing import AIM, GROWTH, MIN_CHUNK, PROBE_EVERY, Pacer
from wherry_runtime.scheduling.plan import StepPlan, Work
from wherry_runtime.scheduling.request import Request
from wherry_runtime.scheduling.scheduler import Scheduler

Machine = Callable[[Work], float]


def linear(base: float, decode: float, context: float, token: float) -> Machine:
    """Milliseconds per step, per decode, per 1,000 tokens of context, per prompt token."""

    def seconds(w: Work) -> float:
        return (base + decode * w.decodes + context * w.decode_context / 1e3 + token * w.prefill_tokens) / 1e3

    return seconds


def roofline(read: float, row: float) -> Machine:
    """As memory and arithmetic really share a step: whichever takes longer, and a little for each row."""

    def seconds(w: Work) -> float:
        rows = w.decodes + w.prefill_tokens
        return (max(read, row * rows) + 0.1 * rows) / 1e3

    return seconds


MACHINES: dict[str, Machine] = {
    "a CPU, 1.1B int8": linear(16, 0.7, 0.05, 1.6),
    "a CPU with long contexts": linear(16, 0.7, 1.5, 3),
    "a GPU": linear(6, 0.01, 0.002, 0.012),
    "memory or arithmetic, whichever is slower": roofline(16, 1.5),
    "a tiny model": linear(0.4, 0.02, 0.002, 0.05),
}
BUSY = Work(8, 4000)


def taught(machine: Machine, pacer: Pacer, rng: random.Random, steps: int = 200) -> Pacer:
    for _ in range(steps):
        decodes = rng.choice([1, 4, 16, 64])
        work = Work(decodes, decodes * rng.randint(10, 2000))
        pacer.observe(work, machine(work) * rng.gauss(1, 0.02))
    return pacer


class TestCosts:
    @pytest.mark.parametrize("name", MACHINES)
    def test_it_finds_what_steps_without_prompts_take(self, name: str) -> None:
        rng = random.Random(1)
        pacer = taught(MACHINES[name], Pacer(), rng)
        for decodes, each in itertools.product((4, 16, 64), (100, 1000)):
            work = Work(decodes, decodes * each)
            assert pacer.seconds(work) == pytest.approx(MACHINES[name](work), rel=0.25)

    def test_it_follows_a_machine_that_slows_down(self) -> None:
        machine = MACHINES["a CPU, 1.1B int8"]
        rng = random.Random(4)
        pacer = taught(machine, Pacer(), rng)
        taught(lambda w: 2.5 * machine(w), pacer, rng, steps=60)
        assert pacer.seconds(BUSY) == pytest.approx(2.5 * machine(BUSY), rel=0.2)

    def test_one_odd_duration_changes_little(self) -> None:
        machine = MACHINES["a CPU, 1.1B int8"]
        pacer = taught(machine, Pacer(), random.Random(5))
        before = pacer.seconds(BUSY)
        pacer.observe(BUSY, 50 * machine(BUSY))
        assert pacer.seconds(BUSY) == pytest.approx(before, rel=0.25)

    def test_steps_of_prompts_alone_are_known_apart(self) -> None:
        pacer = taught(MACHINES["a GPU"], Pacer(), random.Random(5))
        assert pacer.seconds(Work(0, 0, 512)) == 0
        pacer.observe(Work(0, 0, 512), 0.05)
        assert pacer.seconds(Work(0, 0, 1024)) == pytest.approx(0.1)
        assert pacer.seconds(Work(8, 4000, 512)) == pacer.seconds(BUSY)


class TestAllowance:
    def test_without_decodes_or_without_a_limit_only_tokens_count(self) -> None:
        for allowance in (Pacer(2.0).allowance(2048, 0, 0), Pacer(0.0).allowance(2048, 8, 1000)):
            assert allowance.take(5000) == 2048
            assert allowance.exhausted

    def test_an_unknown_machine_gets_the_smallest_chunk(self) -> None:
        allowance = Pacer(2.0).allowance(2048, 8, 1000)
        assert allowance.take(4096) == MIN_CHUNK
        assert allowance.exhausted

    @pytest.mark.parametrize("ratio", [1.5, 2.0, 4.0])
    def test_chunks_grow_until_the_step_takes_what_it_may(self, ratio: float) -> None:
        machine = MACHINES["a GPU"]
        pacer = taught(machine, Pacer(ratio), random.Random(6))
        sizes = [0]
        for _ in range(30):
            count = pacer.allowance(10_000, BUSY.decodes, BUSY.decode_context).take(10_000)
            assert count <= max(GROWTH * sizes[-1], MIN_CHUNK)
            pacer.observe(work := Work(*_two(BUSY), count), machine(work))
            sizes.append(count)
        assert machine(Work(*_two(BUSY), sizes[-1])) == pytest.approx(AIM * ratio * machine(BUSY), rel=0.06)

    def test_prompts_share_it(self) -> None:
        allowance = Pacer(0.0).allowance(100, 8, 1000)
        assert [allowance.take(30), allowance.take(30), allowance.take(900), allowance.take(5)] == [30, 30, 40, 0]

    def test_now_and_then_a_step_goes_without_prompts(self) -> None:
        """Or a machine that slowed down would be taken for prompts that cost more and more."""
        pacer = Pacer(2.0)
        counts = [pacer.allowance(100, 8, 1000).tokens for _ in range(3 * PROBE_EVERY)]
        assert counts.count(0) == 2

    def test_a_ratio_under_one_is_refused(self) -> None:
        for ratio in (0.5, -1.0, math.nan):
            with pytest.raises(ValueError, match="at least 1"):
                Pacer(ratio)


def _two(work: Work) -> tuple[int, int]:
    return work.decodes, work.decode_context


@dataclass
class Stream:
    """When a request's tokens came."""

    arrived: float
    times: list[float] = field(default_factory=list)


class Simulation:
    """The scheduler on a virtual clock, one step ahead as the step loop is."""

    def __init__(self, machine: Machine, ratio: float, noise: float = 0.03) -> None:
        self.scheduler = Scheduler(
            BlockManager(4000, 16), max_running=64, max_batched_tokens=2048, max_queued=100, max_itl_ratio=ratio
        )
        self.now = 0.0
        self.streams: dict[str, Stream] = {}
        self.slowdowns: list[tuple[float, float]] = []  # when a step ended, its duration against one without prompts
        self._machine = machine
        self._noise = noise
        self._rng = random.Random(7)
        self._flights: list[StepPlan] = []

    def add(self, name: str, prompt: int, new: int) -> None:
        tokens = [self._rng.randrange(1 << 30) for _ in range(prompt)]
        self.scheduler.add(Request(name, tokens, new))
        self.streams[name] = Stream(self.now)

    def step(self) -> None:
        """One step; the next one is planned before this one's duration is known."""
        while len(self._flights) < 2 and (plan := self.scheduler.schedule()).sequences:
            self._flights.append(plan)
        plan = self._flights.pop(0)
        seconds = self._machine(plan.work) * max(self._rng.gauss(1, self._noise), 0.5)
        self.now += seconds
        calm = self._machine(Work(plan.work.decodes, plan.work.decode_context))
        self.slowdowns.append((self.now, seconds / calm))
        self.scheduler.pacer.observe(plan.work, seconds)
        self.scheduler.commit(plan, {s.request_id: [1] for s in plan.sequences if s.samples})
        for s in plan.sequences:
            if s.samples:
                self.streams[s.request_id].times.append(self.now)
                request = self.scheduler.get(s.request_id)
                if request.num_new >= request.max_new_tokens:
                    self.scheduler.remove(request.id)


@pytest.mark.parametrize("streams", [1, 16])
@pytest.mark.parametrize("name", MACHINES)
def test_running_answers_keep_their_pace_while_a_4k_prompt_comes_in(name: str, streams: int) -> None:
    """p99 of the time between tokens is within twice what it is without; the prompt takes about twice as long as alone
    would, as half of the time is the answers'."""
    machine = MACHINES[name]
    alone = Simulation(machine, ratio=2.0)
    alone.add("long", 4096, 2)
    while not alone.streams["long"].times:
        alone.step()
    run = Simulation(machine, ratio=2.0)
    for i in range(streams):
        run.add(f"s{i}", 200 + 10 * i, 20_000)
    while not all(s.times for s in run.streams.values()):
        run.step()
    for _ in range(30):
        run.step()
    came, steps = run.now, len(run.slowdowns)
    tokens = {name: len(stream.times) for name, stream in run.streams.items()}
    run.add("long", 4096, 2)
    while not run.streams["long"].times:
        run.step()
    during = [slowdown for when, slowdown in run.slowdowns if when > came]
    assert statistics.quantiles(during, n=100)[98] <= 2.0
    assert {n: len(run.streams[n].times) - before for n, before in tokens.items()} == dict.fromkeys(
        tokens, len(run.slowdowns) - steps
    )  # every answer got a token from every step
    calm = machine(Work(streams, streams * 300))
    assert run.streams["long"].times[0] - came <= 2.6 * alone.streams["long"].times[0] + 30 * calm


def test_without_a_limit_the_prompt_comes_first() -> None:
    run = Simulation(MACHINES["a CPU, 1.1B int8"], ratio=0.0)
    run.add("s", 200, 20_000)
    for _ in range(100):
        run.step()
    run.add("long", 4096, 2)
    while not run.streams["long"].times:
        run.step()
    assert max(slowdown for _, slowdown in run.slowdowns) > 50


def test_requests_that_begin_together_are_not_paced_by_the_first_of_them() -> None:
    """Sixteen prompts of 500, the first one a step ahead: all have begun after the steps that their tokens need."""
    run = Simulation(MACHINES["a CPU, 1.1B int8"], ratio=2.0)
    run.add("first", 500, 100)
    run.step()
    for i in range(15):
        run.add(f"s{i}", 500, 100)
    for _ in range(6):
        run.step()
    assert all(s.times for s in run.streams.values())
