"""What is made of the times at which tokens came. Without the engine, which takes seconds to import."""

import itertools
import statistics
from dataclasses import dataclass, field

from wherry_cli.bench_flags import Failure

WARM_TOKENS = 4  # of each request, not counted: buffers are touched and caches filled


@dataclass
class Stream:
    """When a request was sent and when each of its tokens came (seconds of one clock)."""

    sent: float
    tokens: list[float] = field(default_factory=list)


def steady(streams: list[Stream]) -> tuple[float, list[float]]:
    """Tokens per second of all streams while all of them ran, and the seconds between tokens of each one then.

    Raises:
        Failure: they never all ran at the same time.
    """
    start = max(s.tokens[WARM_TOKENS - 1] for s in streams)
    end = min(s.tokens[-1] for s in streams)
    if end <= start:
        raise Failure("the requests did not run at the same time; give the engine more KV cache or --new-tokens")
    inside = [[t for t in s.tokens if start <= t <= end] for s in streams]
    count = sum(sum(t > start for t in times) for times in inside)
    return count / (end - start), [b - a for times in inside for a, b in itertools.pairwise(times)]


def step_times(streams: list[Stream]) -> list[float]:
    """Seconds from each token to the next one, from the first on, each counted when the last stream has it."""
    marks = [max(stamps) for stamps in zip(*(s.tokens for s in streams), strict=True)]
    return [b - a for a, b in itertools.pairwise(marks)]


def percentiles(values: list[float]) -> dict[str, float]:
    """50th, 90th and 99th."""
    cuts = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else values * 99
    return {"p50": cuts[49], "p90": cuts[89], "p99": cuts[98]}
