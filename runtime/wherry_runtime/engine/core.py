"""The step loop: one thread that schedules, runs and reports, and never waits for anyone while there is work.

Requests come in through an inbox; what happens to them goes out through `report`, once a step, on the loop's own
thread. A step that raises is retried one sequence at a time, so that only the requests that cannot be computed fail.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from wherry_protocol.worker import ErrorEvent
from wherry_runtime.engine.live import Live, Progress
from wherry_runtime.engine.runner import ModelRunner
from wherry_runtime.engine.sampling import BadLogitsError, Sampled
from wherry_runtime.scheduling.blocks import BlockManager
from wherry_runtime.scheduling.plan import SequenceStep, StepPlan
from wherry_runtime.scheduling.scheduler import QueueFullError, Scheduler

log = logging.getLogger(__name__)

IDLE_BEAT_S = 0.25  # how often an idle loop comes round to show that it is alive

Outcome = Sampled | BadLogitsError | Exception | None


class EngineClosedError(Exception):
    """The engine is shutting down or was never started."""


class EngineCore:
    """The loop's thread, and the ways to talk to it. All public methods may be called from any thread."""

    def __init__(
        self,
        runner: ModelRunner,
        new_scheduler: Callable[[], Scheduler],
        report: Callable[[list[Progress]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.runner = runner
        self.scheduler = new_scheduler()
        self.heartbeat = clock()
        self.steps = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self._past_preemptions = 0  # of schedulers before this one
        self._past_prefix_hits = 0
        self._new_scheduler = new_scheduler
        self._report = report
        self._clock = clock
        self._wake = threading.Condition()
        self._added: deque[Live] = deque()
        self._cancelled: set[str] = set()
        self._closing = False
        self._live: dict[str, Live] = {}
        self._thread = threading.Thread(target=self._loop, name="wherry-step-loop", daemon=True)

    def start(self) -> None:
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
        return self._past_preemptions + self.scheduler.preemptions

    @property
    def prefix_hit_tokens(self) -> int:
        return self._past_prefix_hits + self.scheduler.prefix_hit_tokens

    def _loop(self) -> None:
        while True:
            self.heartbeat = self._clock()
            with self._wake:
                if not (self._closing or self._added or self._cancelled or self._live):
                    self._wake.wait(IDLE_BEAT_S)
                added, self._added = self._added, deque()
                cancelled, self._cancelled = self._cancelled, set()
                # Counted as live before the lock is gone, so that the queue's bound holds.
                self._live.update((live.id, live) for live in added)
                closing = self._closing
            try:
                if closing:
                    self._fail_all(ErrorEvent(code="shutting_down", message="the engine shuts down", retryable=True))
                    return
                progress = self._take_in(added, cancelled)
                if self._live:
                    self._step(progress)
                if progress:
                    self._report(progress)
            except Exception:
                # A bug outside of any one request. The books may be wrong, so everybody starts again with new ones.
                log.exception("the step loop failed; all its requests end")
                self._fail_all(ErrorEvent(code="engine_error", message="the engine failed", retryable=True))
                self._renew_scheduler()

    def _renew_scheduler(self) -> None:
        self._past_preemptions += self.scheduler.preemptions
        self._past_prefix_hits += self.scheduler.prefix_hit_tokens
        self.scheduler = self._new_scheduler()

    def _fail_all(self, error: ErrorEvent) -> None:
        live, self._live = self._live, {}
        self._report([Progress(request_id, error=error) for request_id in live])

    def _take_in(self, added: deque[Live], cancelled: set[str]) -> list[Progress]:
        progress = []
        for live in added:
            try:
                self.scheduler.add(live.request)
            except Exception as e:
                log.exception("request %s cannot be queued", live.id)
                del self._live[live.id]
                progress.append(Progress(live.id, error=_error(e)))
        for request_id in cancelled:
            if self._live.pop(request_id, None) is not None:
                self.scheduler.remove(request_id)
                progress.append(Progress(request_id, finish="cancelled"))
        return progress

    def _step(self, progress: list[Progress]) -> None:
        plan = self.scheduler.schedule()
        now = self._clock()
        for request_id in plan.admitted:
            live = self._live[request_id]
            if live.admitted is None:
                live.admitted = now
                self.prompt_tokens += live.request.num_prompt
                progress.append(Progress(request_id, admitted=True, cached_tokens=live.request.cached_tokens))
        if progress:  # before the step, which may be long
            self._report(progress.copy())
            progress.clear()
        outcomes = self._run(plan)
        self.steps += 1
        tokens = {i: outcome.token for i, outcome in outcomes.items() if isinstance(outcome, Sampled)}
        done = [s for s in plan.sequences if not isinstance(outcomes.get(s.request_id), Exception)]
        self.scheduler.commit(StepPlan(done), tokens)
        for request_id, outcome in outcomes.items():
            if isinstance(outcome, Exception):
                self._fail(request_id, outcome, progress)
            elif isinstance(outcome, Sampled):
                self._book(self._live[request_id], outcome, progress)

    def _run(self, plan: StepPlan) -> dict[str, Outcome]:
        """Runs the plan; if that raises, runs its sequences one by one to find the ones to blame."""
        try:
            return dict(self.runner.step(plan.sequences, self._live))
        except Exception as e:
            log.warning("a step with %d sequences failed (%s: %s)", len(plan.sequences), type(e).__name__, e)
            if len(plan.sequences) == 1:
                return {plan.sequences[0].request_id: e}
        outcomes: dict[str, Outcome] = {}
        for sequence in plan.sequences:
            outcomes.update(self._run_alone(sequence))
        return outcomes

    def _run_alone(self, sequence: SequenceStep) -> dict[str, Outcome]:
        self.heartbeat = self._clock()
        try:
            return dict(self.runner.step([sequence], self._live))
        except Exception as e:
            return {sequence.request_id: e}

    def _fail(self, request_id: str, error: Exception, progress: list[Progress]) -> None:
        log.error("request %s failed: %s: %s", request_id, type(error).__name__, error)
        live = self._live.pop(request_id)
        suspects = live.request.blocks
        self.scheduler.blocks.forget(suspects)
        self.scheduler.remove(request_id)
        # Not those that others share: these were computed before, and are in use.
        self.runner.cache.scrub([block for block in suspects if self.scheduler.blocks.is_free(block)])
        progress.append(Progress(request_id, error=_error(error)))

    def _book(self, live: Live, sampled: Sampled, progress: list[Progress]) -> None:
        token = sampled.token
        live.note_token(token)
        if live.first_token is None:
            live.first_token = self._clock()
        self.completion_tokens += 1
        finish = live.finish_after(token)
        stop_id = token if finish == "stop" else None
        progress.append(Progress(live.id, token=token, logprobs=sampled.logprobs, finish=finish, stop_id=stop_id))
        if finish is not None:
            del self._live[live.id]
            self.scheduler.remove(live.id)


def _error(error: Exception) -> ErrorEvent:
    if isinstance(error, BadLogitsError):
        return ErrorEvent(code="bad_logits", message=str(error))
    if isinstance(error, MemoryError) or "memory" in str(error).lower():
        return ErrorEvent(code="out_of_memory", message="the step needs more memory than there is", retryable=True)
    return ErrorEvent(code="engine_error", message=f"the step failed: {type(error).__name__}", retryable=True)


def new_scheduler_factory(
    num_blocks: int, block_size: int, prefix_cache: bool, max_running: int, max_batched_tokens: int, max_queued: int
) -> Callable[[], Scheduler]:
    """Makes fresh schedulers with the same settings."""

    def make() -> Scheduler:
        blocks = BlockManager(num_blocks, block_size, prefix_cache)
        return Scheduler(blocks, max_running=max_running, max_batched_tokens=max_batched_tokens, max_queued=max_queued)

    return make
