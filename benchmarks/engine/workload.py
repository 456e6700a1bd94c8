"""What every engine is asked to do, and how its process and the comparison talk.

Standard library only (and NumPy for scores): it runs in the environment of each peer. A process has one engine with one
format of weights and measures what it is asked to (process.py is the other side).
"""

import ctypes
import json
import random
import resource
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

WARM_STEPS = 4  # decode steps after the first token that are not counted: shapes are compiled, pages touched
PR_SET_PDEATHSIG, SIGKILL = 1, 9


@dataclass(frozen=True)
class Job:
    """One engine, one format, one round."""

    engine: str  # the module here that runs it
    variant: str  # format of weights, and how the engine is run, such as `int8` or `int8+cb`
    model: str  # the checkpoint's directory
    weights: str  # what the engine loads: the same, or a file or directory made from it
    vocab_size: int
    threads: int = 2
    prefill: tuple[int, ...] = (512,)
    batches: tuple[int, ...] = (1, 4, 8, 16)
    prompt_tokens: int = 32  # of each sequence before decoding
    new_tokens: int = 36  # of each sequence, WARM_STEPS and the first one included
    options: dict[str, Any] = field(default_factory=dict)  # for the engine's process, see there
    windows: str = ""  # a JSON file with lists of token ids: score these instead of measuring speed

    def prompts(self, count: int, length: int, salt: int = 0) -> list[list[int]]:
        """`count` random prompts; another `salt`, other prompts, so that no prefix is known already."""
        draw = random.Random(f"{count}/{length}/{salt}")
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


def measure(peer: Peer, job: Job, kind: str, size: int, number: int) -> dict[str, Any]:
    """A rate in tokens per second: of `prefill` of `size` tokens, or `decode` of `size` sequences by the median step.

    Another `number`, other prompts.
    """
    if kind == "prefill":
        seconds = peer.prefill(job.prompts(1, size, salt=number)[0])
        return {"rate": size / seconds, "seconds": seconds}
    steps = peer.decode(job.prompts(size, job.prompt_tokens, salt=number), job.new_tokens)[WARM_STEPS:]
    # A machine that stands still for a tenth of a second must not count. Where it is so busy that tokens are seen in
    # bunches, most steps seem to take no time.
    step = statistics.median(steps) or statistics.fmean(steps)
    return {"rate": size / step, "mean_rate": size * len(steps) / sum(steps), "steps": len(steps)}


def score(scorer: Scorer, job: Job) -> dict[str, Any]:
    """For each window, and each of its tokens but the first: minus its log-probability, and the likeliest token."""
    import numpy as np  # every engine's environment has it

    windows: list[list[int]] = json.loads(Path(job.windows).read_text())
    losses, likeliest = [], []
    for window, logits in zip(windows, scorer.logits(windows), strict=True):
        rows, targets = logits[: len(window) - 1], np.array(window[1:])
        top = rows.max(axis=-1)
        total = top + np.log(np.exp(rows - top[:, None]).sum(axis=-1))
        losses.append((total - rows[np.arange(len(targets)), targets]).tolist())
        likeliest.append(rows.argmax(axis=-1).tolist())
    return {"losses": losses, "likeliest": likeliest}


def die_with_parent() -> None:
    """A measuring process must not go on, and disturb others, when the comparison was stopped."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)


def main(load: Callable[[Job], Any], argv: Sequence[str] | None = None) -> None:
    """`python -m benchmarks.engine.PEER FD`: answers questions, a line of JSON each, on the socket FD, the job first.
    Standard output is the engine's own to write to."""
    die_with_parent()
    with socket.socket(fileno=int((argv or sys.argv[1:])[0])) as connection, connection.makefile("rw") as lines:
        raw = json.loads(lines.readline())
        job = Job(**{**raw, "prefill": tuple(raw["prefill"]), "batches": tuple(raw["batches"])})
        began = time.perf_counter()
        engine = load(job)
        if not job.windows:
            engine.prefill(job.prompts(1, job.prompt_tokens, salt=-1)[0])
        answer: dict[str, Any] = {"load_s": time.perf_counter() - began, "settings": engine.settings}
        while True:
            print(json.dumps({**answer, "memory": memory()}), file=lines, flush=True)
            if not (line := lines.readline()):
                return
            answer = score(engine, job) if job.windows else measure(engine, job, **json.loads(line))
