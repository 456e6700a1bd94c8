"""What every test of episodes asserts, in whatever world."""

import os
from pathlib import Path

from tests.reliability.episode import Stage, play
from tests.reliability.history import Event, Fault, save
from tests.reliability.judge import Verdict, judge, percentile

GAP_P99_S = 2.0


def rerun(seed: int, world: str) -> str:
    """The command that plays one seed again."""
    return f"python -m tests.reliability --world {world} --seed {seed} --keep DIR"


def told(seed: int, events: list[Event], verdict: Verdict) -> str:
    """An episode in one line."""
    faults = ", ".join(f"{e.what} {e.target}".strip() for e in events if isinstance(e, Fault))
    ends = ", ".join(f"{count} {name}" for name, count in sorted(verdict.outcomes.items()))
    return f"seed {seed:4d}: {ends}; longest gap {max(verdict.gaps, default=0):.2f} s; {faults or 'no fault'}"


async def right(on: Stage, seed: int, world: str) -> list[float]:
    """Plays an episode; fails where anything in its history is wrong, and says how to play it again. Its gaps."""
    events = await play(on, seed)
    verdict = judge(events)
    if verdict.problems and (keep := os.environ.get("WHERRY_TEST_KEEP_LOGS")):
        save(events, Path(keep) / f"reliability-{world}-{seed}.jsonl")
    again = f"{told(seed, events, verdict)}\nagain: {rerun(seed, world)}"
    assert not verdict.problems, "\n".join([*verdict.problems, again])
    return verdict.gaps


def short(gaps: list[float]) -> None:
    """Fails where the 99th percentile of the streams' longest gaps is too long."""
    assert percentile(gaps, 99) < GAP_P99_S, f"the longest of {len(gaps)}: {sorted(gaps)[-5:]}"
