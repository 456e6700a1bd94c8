"""The step loop: one thread that schedules and reports, one step ahead of another thread that computes.

While step N computes, this thread plans step N+1 (its tokens UNKNOWN where N draws them), prepares its arrays and hands
it over; the device's thread starts it the moment N is done. Booking N, telling its clients, prefix hashing and planning
N+2 all happen while N+1 computes. A request that ends in N, which only a stop token does unforeseen, has a row in N+1
whose result is dropped.

A step with guesses (see `speculative`) is not planned ahead, and nothing is planned on top of it: guesses need the last
token, and how many of them hold is known at the end. Nothing overlaps then, which is part of what such steps are
measured to cost; steps without guesses go on as above.

Requests come in through an inbox; what happens to them goes out through `report`, once a step, on the loop's own
thread. A step that runs out of memory is planned again, smaller. One that raises anything else is retried one sequence
at a time, so that only the requests that cannot be computed fail.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from wherry_protocol.worker import ErrorEvent
from wherry_runtime.engine.device import DeviceThread, Job, Runner
from wherry_runtime.engine.failures import event_of, is_out_of_memory, release_memory
from wherry_runtime.engine.live import Live, Progress
from wherry_runtime.engine.sampling import Drawn, Sampled
from wherry_runtime.engine.speculative.policy import Mode
from wherry_runtime.engine.speculative.rows import Outcome as RunnerOutcome
from wherry_runtime.engine.speculative.speculator import Speculator
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.scheduling.blocks import BlockManager
from wherry_runtime.scheduling.plan import SequenceStep, StepPlan
from wherry_runtime.scheduling.scheduler import QueueFullError, Scheduler

log = logging.getLogger(__name__)

IDLE_BEAT_S = 0.25  # how often an idle loop comes round to show that it is alive
DEPTH = 2  # steps with the device: the one that computes and the one that follows
LEAD = 0.25  # share of a step's expected duration before its end at which the next one is planned
MIN_LEAD_S = 0.008

Outcome = RunnerOutcome | Exception


class EngineClosedError(Exception):
    """The engine is shutting down or was never started."""


@dataclass(slots=True, frozen=True)
class Flight:
    """A plan that the device has."""

    plan: StepPlan
    job: Job
    mode: Mode


class EngineCore:
    """The loop's thread, and the ways to talk to it. All public methods may be called from any thread."""

    def __init__(
        self,
        runner: Runner,
        new_scheduler: Callable[[], Scheduler],
        report: Callable[[list[Progress]], None],
        clock: Callable[[], float] = time.monotonic,
        speculator: Speculator | None = None,
    ) -> None:
        self.runner = runner
        self.speculator = speculator
        self.scheduler = new_scheduler()
        self.heartbeat = clock()
        self.steps = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self._past = (0, 0, 0)  # what schedulers before this one counted
        self._new_scheduler = new_scheduler
        self._report = report
        self._clock = clock
        self._wake = threading.Condition()
        self._added: deque[Live] = deque()
        self._cancelled: set[str] = set()
        self._closing = False
        self._live: dict[str, Live] = {}
        self._flights: deque[Flight] = deque()  # oldest first
        self._next_mode: Mode | None = None  # of the step to be planned next, once that was asked
        self._device = DeviceThread(runner, clock)
        self._thread = threading.Thread(target=self._loop, name="wherry-step-loop", daemon=True)

    def start(self) -> None:
        self._device.start()
        self._thread.start()

    def add(self, live: Live) -> None:
        """Queues a request.

        Raises:
            QueueFullError: as many are live as may run and wait.
            EngineClosedError: the engine is closing.
        """
        with self._wake:
            if self._closing:
                raise EngineClosedError("the engine is shutting down")
            limit = self.scheduler.max_running + self.scheduler.max_queued
            if len(self._live) + len(self._added) >= limit:
                raise QueueFullError(f"{limit} requests are running or waiting already")
            self._added.append(live)
            self._wake.notify()

    def cancel(self, request_id: str) -> None:
        """Ends a request; its last progress says `cancelled`. Unknown ids are ignored."""
        with self._wake:
            self._cancelled.add(request_id)
            self._wake.notify()

    def close(self, timeout_s: float = 60.0) -> None:
        """Ends every request with an error that asks to retry elsewhere, and the thread. Blocks until it is gone."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    @property
    def num_waiting(self) -> int:
        return len(self.scheduler.waiting) + len(self._added)

    @property
    def num_running(self) -> int:
        return len(self.scheduler.running)

    @property
    def preemptions(self) -> int:
        return self._past[0] + self.scheduler.preemptions

    @property
    def prefix_queried_tokens(self) -> int:
        return self._past[1] + self.scheduler.prefix_queried_tokens

    @property
    def prefix_hit_tokens(self) -> int:
        return self._past[2] + self.scheduler.prefix_hit_tokens

    @property
    def draft_tokens(self) -> int:
        """Guesses that were checked."""
        return self.speculator.counts.drafted if self.speculator is not None else 0

    @property
    def accepted_tokens(self) -> int:
        """Guesses that held."""
        return self.speculator.counts.accepted if self.speculator is not None else 0

    def _loop(self) -> None:
        while True:
            self.heartbeat = self._clock()
            added, cancelled, closing = self._receive()
            try:
                if closing:
                    break
                self._round(added, cancelled)
            except Exception:
                # A bug outside of any one request. The books may be wrong, so everybody starts again with new ones.
                log.exception("the step loop failed; all its requests end")
                self._ground()
                self._fail_all(ErrorEvent(code="engine_error", message="the engine failed", retryable=True))
                self._past = (self.preemptions, self.prefix_queried_tokens, self.prefix_hit_tokens)
                self.scheduler = self._new_scheduler()
        self._ground()
        self._device.close()
        self._fail_all(ErrorEvent(code="shutting_down", message="the engine shuts down", retryable=True))

    def _receive(self) -> tuple[deque[Live], set[str], bool]:
        """What has come in; waits for something if there is nothing else to do."""
        with self._wake:
            busy = self._closing or self._added or self._cancelled or self._live or self._flights
            if not busy:
                if self.speculator is not None:
                    self.speculator.pause()
                self._wake.wait(IDLE_BEAT_S)
            added, self._added = self._added, deque()
            cancelled, self._cancelled = self._cancelled, set()
            # Counted as live before the lock is gone, so that the queue's bound holds.
            self._live.update((live.id, live) for live in added)
            return added, cancelled, self._closing

    def _ground(self) -> None:
        """Waits until the device has nothing any more; what it has not begun is dropped."""
        for flight in self._flights:
            flight.job.dropped = True
        while self._flights:
            self._device.collect()
            self._flights.popleft()

    def _fail_all(self, error: ErrorEvent) -> None:
        ended = list(self._live.values())
        for live in ended:
            self._forget(live)
        self._report([Progress(live.id, error=error) for live in ended])

    def _forget(self, live: Live) -> None:
        """Lets go of a request that has ended, except for what the scheduler has of it."""
        del self._live[live.id]
        if self.speculator is not None:
            self.speculator.forget(live.id, live.request.num_new)

    def _round(self, added: deque[Live], cancelled: set[str]) -> None:
        """Takes in what came, hands the device its next step, and books the one that is done."""
        progress = self._take_in(added, cancelled)
        if self._live and not self._flights:
            self._launch(progress)
        wait = self._slack()
        if wait == 0.0:
            self._launch(progress)
            wait = None
        if progress:  # before the step's end, which may be far
            self._report(progress)
        if self._flights and self._device.collect(wait) is not None:
            progress = []
            self._land(progress)
            if progress:
                self._report(progress)

    def _take_in(self, added: deque[Live], cancelled: set[str]) -> list[Progress]:
        progress = []
        for live in added:
            try:
                self.scheduler.add(live.request)
            except Exception as e:
                log.exception("request %s cannot be queued", live.id)
                del self._live[live.id]
                progress.append(Progress(live.id, error=event_of(e)))
        for request_id in cancelled:
            if (ended := self._live.get(request_id)) is not None:
                self._forget(ended)
                self.scheduler.remove(request_id)
                progress.append(Progress(request_id, finish="cancelled"))
        return progress

    def _slack(self) -> float | None:
        """Seconds until the next step should be planned: late, so that whoever comes meanwhile is in it, but surely
        before the device is done. None: it has its next step, or that cannot be planned yet."""
        # After a step with drafts, nobody knows where the next one starts.
        if len(self._flights) != 1 or self._flights[0].plan.has_drafts or self._mode() is not Mode.PLAIN:
            return None
        flight = self._flights[0]
        now = self._clock()
        expected = self.scheduler.pacer.seconds(flight.plan.work)
        elapsed = now - (flight.job.started or now)
        return max(expected - elapsed - max(LEAD * expected, MIN_LEAD_S), 0.0)

    def _mode(self) -> Mode:
        """Whether the next step is to have guesses. The answer stays until that step is planned."""
        if self._next_mode is None:
            decoding = 0
            if self.speculator is not None and not self.speculator.dozes(len(self.scheduler.running)):
                decoding = self.scheduler.num_decoding
            # Prompts make a step long anyway, and nobody has measured what guesses cost in it.
            self._next_mode = self.speculator.next_mode(decoding) if self.speculator and decoding else Mode.PLAIN
        return self._next_mode

    def _guess(self) -> tuple[Mode, dict[str, list[int]]]:
        """Guesses for the next step, if it is to have any and still can."""
        mode, self._next_mode = self._mode(), None
        if self.speculator is None or mode is Mode.PLAIN or self._flights or not self.scheduler.num_decoding:
            return Mode.PLAIN, {}
        return mode, self.speculator.propose([self._live[r.id] for r in self.scheduler.running])

    def _launch(self, progress: list[Progress]) -> None:
        """Plans a step and hands it to the device, if there is anything to do."""
        mode, guesses = self._guess()
        plan = self.scheduler.schedule(guesses)
        now = self._clock()
        for request_id in plan.admitted:
            live = self._live[request_id]
            if live.admitted is None:
                live.admitted = now
                self.prompt_tokens += live.request.num_prompt
                progress.append(Progress(request_id, admitted=True, cached_tokens=live.request.cached_tokens))
        if plan.sequences:
            sampling = {s.request_id: self._live[s.request_id] for s in plan.sequences if s.samples}
            before = self._flights[-1].job if self._flights else None
            job = self._submit(plan.sequences, sampling, before, here=mode is not Mode.PLAIN)
            self._flights.append(Flight(plan, job, mode))

    def _submit(
        self, sequences: list[SequenceStep], live: Mapping[str, Live], after: Job | None = None, *, here: bool = False
    ) -> Job:
        """Prepares a step and hands it to the device; `here`: with nothing to overlap, computes it right away."""
        job = Job(sequences, live, after)
        try:
            job.prepared = self.runner.prepare(sequences)
        except Exception as e:
            log.exception("a step with %d sequences cannot be prepared", len(sequences))
            job.error = e
        if here:
            self._device.run(job)
        else:
            self._device.submit(job)
        return job

    def _land(self, progress: list[Progress]) -> None:
        """Books the oldest flight, which is done."""
        flight = self._flights.popleft()
        job = flight.job
        self.steps += 1
        if job.error is None:
            if not flight.plan.has_drafts:  # guesses are neither prompts nor answers
                self.scheduler.pacer.observe(flight.plan.work, job.seconds)
            self._settle(flight, job.outcomes, progress)
        else:
            self._recover(flight, job.error, progress)
        if tainted := self.scheduler.take_tainted():
            self.runner.cache.scrub(tainted)

    def _recover(self, failed: Flight, error: Exception, progress: list[Progress]) -> None:
        """After a step that raised."""
        plan = failed.plan
        # What was planned on top of it cannot stand, and the device has not computed it.
        while self._flights:
            self._device.collect()
            self.scheduler.abandon(self._flights.popleft().plan)
        if is_out_of_memory(error):
            log.warning("a step of %d tokens ran out of memory", plan.num_tokens)
            release_memory()
            self.scheduler.abandon(plan)
            if not self.scheduler.shrink(plan):
                self._fail(plan.sequences[0].request_id, error, progress)
            return
        outcomes: dict[str, Outcome] = {}
        if len(plan.sequences) == 1:
            outcomes[plan.sequences[0].request_id] = error
        else:
            for sequence in plan.sequences:
                outcomes.update(self._run_alone(sequence, failed.job.live))
        self._settle(failed, outcomes, progress)

    def _run_alone(self, sequence: SequenceStep, live: Mapping[str, Live]) -> Mapping[str, Outcome]:
        self.heartbeat = self._clock()
        job = self._submit([sequence], live)
        self._device.collect()
        return job.outcomes if job.error is None else {sequence.request_id: job.error}

    def _settle(self, flight: Flight, outcomes: Mapping[str, Outcome], progress: list[Progress]) -> None:
        """Books a computed plan: its tokens, and the requests that ended with it."""
        plan = flight.plan
        drawn: dict[str, list[int]] = {}
        ended: list[Live] = []
        tainted: list[str] = []
        for step in plan.sequences:
            request_id = step.request_id
            live = self._live.get(request_id)
            outcome = outcomes.get(request_id)
            if live is None or outcome is None:
                continue  # it ended while it was being computed, or its prompt goes on
            if isinstance(outcome, Exception):
                self._fail(request_id, outcome, progress)
                continue
            run = outcome.tokens if isinstance(outcome, Drawn) else [outcome]
            drawn[request_id] = self._book(live, run, progress)
            if run and progress[-1].finish is not None:
                ended.append(live)
            elif isinstance(outcome, Drawn) and outcome.tainted:
                tainted.append(request_id)
        self.scheduler.commit(plan, drawn)
        if self.speculator is not None:
            self.speculator.observe(flight.mode, plan, drawn)
            for request_id in tainted:
                self.runner.cache.scrub(self.scheduler.rewind(request_id))
                self.speculator.exclude(request_id)
        for live in ended:
            self._forget(live)
            self.scheduler.remove(live.id)

    def _fail(self, request_id: str, error: Exception, progress: list[Progress]) -> None:
        if (live := self._live.get(request_id)) is None:
            return
        self._forget(live)
        log.error("request %s failed: %s: %s", request_id, type(error).__name__, error)
        self.scheduler.remove(request_id, suspect=True)
        progress.append(Progress(request_id, error=event_of(error)))

    def _book(self, live: Live, sampled: list[Sampled], progress: list[Progress]) -> list[int]:
        """Reports tokens up to the one that ends the answer; these tokens."""
        if live.first_token is None and sampled:
            live.first_token = self._clock()
        tokens: list[int] = []
        request = live.request
        num_new = request.num_new
        for item in sampled:
            token = item.token
            tokens.append(token)
            finish = live.finish_after(token, num_new + len(tokens))
            if finish is None:
                progress.append(Progress(request.id, token=token, logprobs=item.logprobs))
                continue
            stop_id = token if finish == "stop" else None
            progress.append(Progress(request.id, token=token, logprobs=item.logprobs, finish=finish, stop_id=stop_id))
            break
        self.completion_tokens += len(tokens)
        return tokens


def new_scheduler_factory(
    num_blocks: int,
    block_size: int,
    prefix_cache: bool,
    max_running: int,
    max_batched_tokens: int,
    max_queued: int,
    max_itl_ratio: float = 0.0,
) -> Callable[[], Scheduler]:
    """Makes fresh schedulers with the same settings.

    Raises:
        ModelError: bad_setting.
    """
    if max_itl_ratio and not max_itl_ratio >= 1:
        raise ModelError("bad_setting", f"max_itl_ratio is {max_itl_ratio:g}; it is at least 1, or 0 for no limit")

    def make() -> Scheduler:
        return Scheduler(
            BlockManager(num_blocks, block_size, prefix_cache),
            max_running=max_running,
            max_batched_tokens=max_batched_tokens,
            max_queued=max_queued,
            max_itl_ratio=max_itl_ratio,
        )

    return make
