"""Plays many episodes and judges each: `python -m tests.reliability [--histories N] [--seed N] [--keep DIR]`.

Prints a line for each episode and a summary; exits with 1 if anything was wrong. `--seed N` plays that one alone.
"""

import argparse
import asyncio
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from rich.console import Console
from tests.reliability.checks import GAP_P99_S, rerun, told
from tests.reliability.episode import play, stage
from tests.reliability.history import Fault, save
from tests.reliability.judge import judge, percentile
from tests.reliability.local_world import local_world
from tests.reliability.world import World, static_world

STREAMS = 20
_console = Console(highlight=False, soft_wrap=True)


async def run(seeds: list[int], world_name: str, keep: Path | None, seconds: float) -> int:
    """Plays `seeds`, no longer than `seconds` if that is not 0. The exit status."""
    began = time.monotonic()
    gaps: list[float] = []
    outcomes: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    bad: list[int] = []
    async with worlds()[world_name]() as world, stage(world) as on:
        for seed in seeds:
            if seconds and time.monotonic() - began > seconds:
                _console.print("out of time: the rest is left out")
                break
            events = await play(on, seed, STREAMS)
            verdict = judge(events)
            gaps += verdict.gaps
            outcomes += verdict.outcomes
            faults += Counter(e.what for e in events if isinstance(e, Fault))
            _console.print(told(seed, events, verdict))
            if keep is not None:
                save(events, keep / f"{seed}.jsonl")
            if verdict.problems:
                bad.append(seed)
                for problem in verdict.problems:
                    _console.print(f"  [red]{problem}[/]" if _console.is_terminal else f"  {problem}")
                _console.print(f"  again: {rerun(seed, world_name)}")
    p50, p99, worst = (percentile(gaps, p) for p in (50, 99, 100))
    _console.print(f"faults: {', '.join(f'{n} {name}' for name, n in sorted(faults.items()))}")
    _console.print(
        f"histories: {outcomes.total()} ({', '.join(f'{n} {name}' for name, n in sorted(outcomes.items()))})"
    )
    _console.print(f"longest gap of a stream: p50 {p50:.2f} s, p99 {p99:.2f} s, worst {worst:.2f} s")
    if p99 >= GAP_P99_S:
        _console.print(f"the gap's p99 is not under {GAP_P99_S:g} s")
    if bad:
        _console.print(f"wrong: seeds {', '.join(map(str, bad))}")
    return int(bool(bad) or p99 >= GAP_P99_S or not outcomes)


def worlds() -> dict[str, Callable[[], AbstractAsyncContextManager[World]]]:
    """By name."""
    return {
        "local": local_world,  # local mode: pods of an LLMDeployment
        "static": static_world,  # processes of their own
        "ranks": lambda: static_world(workers=2, ranks=2),  # the same, each worker of two processes
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=__doc__, allow_abbrev=False)
    parser.add_argument("--histories", type=int, default=1000, help="streams in all, 20 to an episode (%(default)s)")
    parser.add_argument("--first-seed", type=int, default=0, help="the first episode's seed (%(default)s)")
    parser.add_argument("--seed", type=int, help="this episode alone")
    parser.add_argument("--world", choices=sorted(worlds()), default="static", help="what to break (%(default)s)")
    parser.add_argument("--keep", type=Path, help="directory to keep the histories in")
    parser.add_argument("--seconds", type=float, default=0, help="begin no episode after so long; 0: no limit")
    args = parser.parse_args()
    # Told to stop, it ends what it started, as on Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    count = -(-args.histories // STREAMS)
    seeds = [args.seed] if args.seed is not None else list(range(args.first_seed, args.first_seed + count))
    sys.exit(asyncio.run(run(seeds, args.world, args.keep, args.seconds)))


if __name__ == "__main__":
    main()
