"""The thread that computes steps, one after the other.

It is handed steps before their tokens are known: when a step is done, what it drew is put in the place of the UNKNOWN
tokens of the next one, which starts at once. Nobody else has to wake up in between.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from wherry_runtime.engine.failures import is_out_of_memory
from wherry_runtime.engine.live import Live
from wherry_runtime.engine.sampling import Drawn, Sampled
from wherry_runtime.engine.speculative.rows import Outcome
from wherry_runtime.scheduling.plan import UNKNOWN, SequenceStep

log = logging.getLogger(__name__)


class Cache(Protocol):
    """The KV cache's memory."""

    def scrub(self, blocks: list[int]) -> None:
        """Zeroes blocks that no step in flight has."""


class Runner(Protocol):
    """What the step loop asks of a model runner."""

    @property
    def cache(self) -> Cache:
        """Of the model."""

    def prepare(self, sequences: list[SequenceStep]) -> Any:
        """Host work of a step that needs no token's value. Called by the step loop while `run` is busy elsewhere."""

    def run(self, prepared: Any, live: Mapping[str, Live]) -> Mapping[str, Outcome]:
        """Computes the step and draws: request id → token or tokens, for those that sample. Blocks, without the GIL.

        By now no token of the sequences that `prepared` was made from is UNKNOWN. `live` has those that sample. Writes
        the sequences' keys and values. May raise anything; then it may have written some of them.
        """


class DroppedError(Exception):
    """The step was not computed, because the one before it failed or nobody wants it any more."""


@dataclass(slots=True, eq=False)
class Job:
    """A step on its way through the device's thread."""

    sequences: list[SequenceStep]
    live: Mapping[str, Live]  # the requests that sample
    after: "Job | None" = None  # draws this one's UNKNOWN tokens
    prepared: Any = None  # by `Runner.prepare`
    dropped: bool = False  # set to not start it
    started: float | None = None  # on the device's clock
    seconds: float = 0.0
    outcomes: Mapping[str, Outcome] = field(default_factory=dict)
    error: Exception | None = None


class DeviceThread:
    """Runs jobs in the order they are submitted in. One other thread submits and collects them."""

    def __init__(self, runner: Runner, clock: Callable[[], float] = time.monotonic) -> None:
        self._runner = runner
        self._clock = clock
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._done: SimpleQueue[Job] = SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name="wherry-device", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: Job) -> None:
        self._jobs.put(job)

    def run(self, job: Job) -> None:
        """Computes a job in the caller's thread, while no other is submitted and not collected."""
        self._run(job)
        self._done.put(job)

    def collect(self, timeout_s: float | None = None) -> Job | None:
        """The oldest job not collected yet, once it is done; None if that takes longer."""
        try:
            return self._done.get(timeout=timeout_s)
        except Empty:
            return None

    def close(self) -> None:
        """Ends the thread once its jobs are done. Does not wait."""
        self._jobs.put(None)

    def _loop(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._run(job)
            self._done.put(job)

    def _run(self, job: Job) -> None:
        before, job.after = job.after, None
        if job.dropped or (before is not None and before.error is not None):
            job.error = DroppedError("not computed")
            return
        if before is not None:
            fill_in(job.sequences, before.outcomes)
        if job.error is not None:
            return  # it could not be prepared
        job.started = self._clock()
        try:
            job.outcomes = self._runner.run(job.prepared, job.live)
        except Exception as error:
            if not is_out_of_memory(error):
                log.warning("a step with %d sequences failed", len(job.sequences), exc_info=error)
            job.error = error.with_traceback(None)  # whose frames hold the step's tensors
            return
        job.seconds = self._clock() - job.started
        for request_id, outcome in job.outcomes.items():
            if isinstance(outcome, Sampled):
                job.live[request_id].note_token(outcome.token)
            elif isinstance(outcome, Drawn):
                for sampled in outcome.tokens:
                    job.live[request_id].note_token(sampled.token)


def fill_in(sequences: list[SequenceStep], outcomes: Mapping[str, Outcome]) -> None:
    """Puts drawn tokens in the place of UNKNOWN ones.

    Where a request has failed instead, any token does: nobody looks at what comes after it.
    """
    for sequence in sequences:
        tokens = sequence.tokens
        if tokens[-1] == UNKNOWN:
            outcome = outcomes.get(sequence.request_id)
            tokens[-1] = outcome.token if isinstance(outcome, Sampled) else 0
