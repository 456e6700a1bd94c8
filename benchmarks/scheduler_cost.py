"""What the step loop costs beside the model: its own work for each step, as a share of the step.

    python -m benchmarks.scheduler_cost [--running 64] [--step-ms 20] [--json FILE]

The real scheduler, batch builder and step loop, with a device that takes no time and draws any token. Lengths are those
of a busy worker: contexts from 128 to 1,900 tokens, whose owners end and make room for others. Times are CPU time of
the step loop's thread, so other processes do not count; most of it overlaps with the step that computes meanwhile, and
only `fill in` is between two steps.
"""

import argparse
import gc
import json
import random
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from wherry_protocol.engine_config import EngineConfig
from wherry_protocol.worker import SamplingParams
from wherry_runtime.engine.core import EngineCore
from wherry_runtime.engine.device import Job, fill_in
from wherry_runtime.engine.live import Live
from wherry_runtime.engine.sampling import Sampled
from wherry_runtime.engine.setup import load
from wherry_runtime.scheduling.request import Request

WARM_UP = 50
TINY = Path(__file__).resolve().parents[1] / "examples" / "models" / "tiny"


class InstantDevice:
    """Finishes every step the moment it is submitted."""

    def __init__(self, took: Counter[str], vocab_size: int) -> None:
        self._took = took
        self._token = 0
        self._vocab_size = vocab_size
        self._done: deque[Job] = deque()

    def submit(self, job: Job) -> None:
        if job.error is not None:
            raise RuntimeError("a step cannot be prepared") from job.error
        began = time.thread_time_ns()
        if job.after is not None:
            fill_in(job.sequences, job.after.outcomes)
            job.after = None
        self._took["fill in"] += time.thread_time_ns() - began
        self._token = (self._token + 1) % self._vocab_size
        job.outcomes = {request_id: Sampled(self._token) for request_id in job.live}
        for live in job.live.values():
            live.note_token(self._token)
        job.started, job.seconds = time.monotonic() - 1, 0.02
        self._took["device"] += time.thread_time_ns() - began
        self._done.append(job)

    def collect(self, timeout_s: float | None = None) -> Job | None:
        return self._done.popleft() if timeout_s is None else None


def timed(took: Counter[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        began = time.thread_time_ns()
        try:
            return function(*args, **kwargs)
        finally:
            took[name] += time.thread_time_ns() - began

    return wrapped


def some_request(number: int, rng: random.Random, vocab_size: int) -> Live:
    length = rng.randint(128, 1500)
    tokens = [rng.randrange(vocab_size) for _ in range(length)]
    request = Request(f"request-{number}", tokens, max_new_tokens=rng.randint(100, 400))
    return Live(request, SamplingParams(), seed=number, stop_ids=frozenset({2}))


def measure(running: int, steps: int) -> dict[str, float]:
    """Microseconds per step, by part."""
    config = EngineConfig(
        model_name="tiny", model_uri=str(TINY), max_running=running, kv_cache_bytes=1 << 30, dtype="bfloat16"
    )
    loaded = load(config)
    took: Counter[str] = Counter()
    core = EngineCore(loaded.runner, loaded.new_scheduler, lambda progress: None)
    core._device = InstantDevice(took, loaded.model_config.vocab_size)  # type: ignore[assignment]
    scheduler: Any = core.scheduler
    scheduler.schedule = timed(took, "schedule", scheduler.schedule)
    scheduler.commit = timed(took, "commit", scheduler.commit)
    scheduler.pacer.observe = timed(took, "cost model", scheduler.pacer.observe)
    runner: Any = core.runner
    runner.prepare = timed(took, "prepare", runner.prepare)
    gc.freeze()  # as AsyncEngine does
    rng = random.Random(1)
    number = decodes = 0
    for step in track(range(WARM_UP + steps), "steps", console=Console(stderr=True), transient=True):
        if step == WARM_UP:
            took.clear()
            decodes = 0
        added = deque()
        while len(core._live) + len(added) < running:
            number += 1
            live = some_request(number, rng, loaded.model_config.vocab_size)
            added.append(live)
        core._live.update((live.id, live) for live in added)
        began = time.thread_time_ns()
        core._round(added, set())
        took["all"] += time.thread_time_ns() - began
        decodes += sum(1 for r in scheduler.running if r.num_new)
    took["all"] -= took["device"]
    took["all"] += took["fill in"]
    took["rest: booking, reports"] = took["all"] - sum(took[k] for k in ("schedule", "commit", "cost model", "prepare"))
    parts = ("schedule", "prepare", "fill in", "commit", "cost model", "rest: booking, reports", "all")
    return {part: took[part] / steps / 1e3 for part in parts} | {"decodes": decodes / steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--step-ms", type=float, default=20.0, help="what a step's time is compared with")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = measure(options.running, options.steps)
    table = Table(title=f"{options.running} running, {result['decodes']:.1f} of them answering, {options.steps} steps")
    table.add_column("part")
    table.add_column("µs a step", justify="right")
    table.add_column(f"of {options.step_ms:g} ms", justify="right")
    for part, micros in result.items():
        if part != "decodes":
            table.add_row(part, f"{micros:.0f}", f"{micros / options.step_ms / 10:.2f} %")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps({**vars(options), "json": None, "micros": result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
