"""What every engine is asked to do, and how its process and the comparison talk.

Standard library only (and NumPy for scores): it runs in the environment of each peer. A process measures one engine
with one format of weights and ends, so that no engine's threads, caches or memory stand in another's way.
"""

import ctypes
import json
import os
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

WARM_STEPS = 4  # decode steps after the first token that are not counted: shapes are compiled, pages touched
PR_SET_PDEATHSIG, SIGKILL = 1, 9


@dataclass(frozen=True)
class Job:
    """One engine, one format, one round."""

    engine: str
    variant: str  # format of weights, and how the engine is run, such as `int8` or `int8+cb`
    model: str  # the checkpoint's directory
    weights: str  # what the engine loads: the same, or a file or directory made from it
    vocab_size: int
    threads: int = 2
    prefill: tuple[int, ...] = (512,)
    batches: tuple[int, ...] = (1, 4, 8, 16)
    prompt_tokens: int = 32  # of each sequence before decoding
    new_tokens: int = 36  # of each sequence, WARM_STEPS and the first one included
    repeats: int = 2  # prefills in a run; the fastest counts
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)  # for the engine's process, see there
    windows: str = ""  # a JSON file with lists of token ids: score these instead of measuring speed

    def prompts(self, count: int, length: int, salt: int = 0) -> list[list[int]]:
        """`count` random prompts; another `salt`, other prompts, so that no prefix is known already."""
        draw = random.Random(f"{self.seed}/{count}/{length}/{salt}")
        return [[draw.randrange(10, self.vocab_size) for _ in range(length)] for _ in range(count)]


class Peer(Protocol):
    """An engine that has loaded its weights. `settings` are what a reader needs to run it the same way."""

    settings: dict[str, Any]

    def prefill(self, prompt: list[int]) -> float:
        """Seconds from a prompt to its first token."""

    def decode(self, prompts: list[list[int]], new_tokens: int) -> list[float]:
        """Seconds of each step that gave every prompt a token, from the second token on: new_tokens - 1 of them."""


class Scorer(Protocol):
    """An engine that gives the logits after every token."""

    settings: dict[str, Any]

    def logits(self, windows: list[list[int]]) -> Iterator[Any]:
        """For each window of L tokens an array [L, vocab_size], float32. Windows know nothing of one another."""


def memory() -> dict[str, int]:
    """Bytes of this process: resident, of it anonymous, of that in huge pages, and the most it ever had."""
    rollup = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split(":")
        rollup[name] = int(value.split()[0]) * 1024
    return {
        "rss": rollup["Rss"],
        "anonymous": rollup["Anonymous"],
        "huge": rollup["AnonHugePages"],
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def measure(job: Job, load: Callable[[Job], Peer]) -> dict[str, Any]:
    """Everything of one job: rates in tokens per second, times in seconds."""
    began = time.perf_counter()
    peer = load(job)
    result: dict[str, Any] = {"job": asdict(job), "load_s": time.perf_counter() - began, "prefill": {}, "decode": {}}
    peer.prefill(job.prompts(1, job.prompt_tokens, salt=1)[0])
    for length in job.prefill:
        times = [peer.prefill(job.prompts(1, length, salt=2 + i)[0]) for i in range(job.repeats)]
        result["prefill"][str(length)] = {"seconds": times, "rate": length / min(times)}
    for batch in job.batches:
        steps = peer.decode(job.prompts(batch, job.prompt_tokens), job.new_tokens)[WARM_STEPS:]
        result["decode"][str(batch)] = {
            "rate": batch * len(steps) / sum(steps),
            "median_step_s": statistics.median(steps),
            "steps": len(steps),
        }
    return {**result, "settings": peer.settings, "memory": memory(), "load_average": os.getloadavg()[0]}


def score(job: Job, load: Callable[[Job], Any]) -> dict[str, Any]:
    """For each window, and each of its tokens but the first: minus its log-probability, and the likeliest token."""
    import numpy as np  # every engine's environment has it

    windows: list[list[int]] = json.loads(Path(job.windows).read_text())
    scorer: Scorer = load(job)
    losses, likeliest = [], []
    for window, logits in zip(windows, scorer.logits(windows), strict=True):
        rows, targets = logits[: len(window) - 1], np.array(window[1:])
        top = rows.max(axis=-1)
        total = top + np.log(np.exp(rows - top[:, None]).sum(axis=-1))
        losses.append((total - rows[np.arange(len(targets)), targets]).tolist())
        likeliest.append(rows.argmax(axis=-1).tolist())
    return {"job": asdict(job), "losses": losses, "likeliest": likeliest, "settings": scorer.settings}


def die_with_parent() -> None:
    """A measuring process must not go on, and disturb others, when the comparison was stopped."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)


def main(load: Callable[[Job], Any], argv: Sequence[str] | None = None) -> None:
    """`python -m benchmarks.engine.PEER JOB.json RESULT.json`: standard output is the engine's own to write to."""
    die_with_parent()
    job_file, result_file = (Path(a) for a in (argv or sys.argv[1:]))
    raw = json.loads(job_file.read_text())
    job = Job(**{**raw, "prefill": tuple(raw["prefill"]), "batches": tuple(raw["batches"])})
    result_file.write_text(json.dumps((score if job.windows else measure)(job, load)))
