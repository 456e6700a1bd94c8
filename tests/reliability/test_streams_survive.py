"""Streams through real routers and workers that are killed, frozen and cut off: every client gets its whole answer.

An episode is a seed: 20 clients and what is done to the workers. `make reliability` plays many more than run here.
"""

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from tests.reliability.__main__ import GAP_P99_S, rerun, told
from tests.reliability.episode import Stage, play, stage
from tests.reliability.history import save
from tests.reliability.judge import judge, percentile
from tests.reliability.world import static_world

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]
EPISODES = 12
_gaps: list[float] = []


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def on() -> AsyncIterator[Stage]:
    async with static_world() as world, stage(world) as made:
        yield made


@pytest.mark.parametrize("seed", range(EPISODES))
async def test_every_client_gets_what_it_would_have_got(on: Stage, seed: int) -> None:
    events = await play(on, seed)
    verdict = judge(events)
    if verdict.problems and (keep := os.environ.get("WHERRY_TEST_KEEP_LOGS")):
        save(events, Path(keep) / f"reliability-{seed}.jsonl")
    _gaps.extend(verdict.gaps)
    again = f"{told(seed, events, verdict)}\nagain: {rerun(seed, 'static')}"
    assert not verdict.problems, "\n".join([*verdict.problems, again])


async def test_the_gaps_are_short() -> None:
    if not _gaps:
        pytest.skip("no episode was played in this run")
    worst = sorted(_gaps)[-5:]
    assert percentile(_gaps, 99) < GAP_P99_S, f"the longest of {len(_gaps)}: {worst}"
