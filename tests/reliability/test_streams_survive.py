"""Streams through real routers and workers that are killed, frozen and cut off: every client gets its whole answer.

An episode is a seed: 20 clients and what is done to the workers. `make reliability` plays many more than run here.
"""

from collections import Counter
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from tests.reliability.checks import right, short
from tests.reliability.episode import Stage, stage
from tests.reliability.workload import FAULTS, draw_episode
from tests.reliability.world import static_world

pytestmark = [pytest.mark.alone, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]
SEEDS = (17, 19, 54, 91, 124, 146)  # of three faults each, which have every kind at least twice
_gaps: list[float] = []


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def on() -> AsyncIterator[Stage]:
    async with static_world() as world, stage(world) as made:
        yield made


@pytest.mark.parametrize("seed", SEEDS)
async def test_every_client_gets_what_it_would_have_got(on: Stage, seed: int) -> None:
    _gaps.extend(await right(on, seed, "static"))


async def test_every_fault_is_done_twice(on: Stage) -> None:
    done = Counter(act.what for seed in SEEDS for act in draw_episode(seed, on.world.size).acts)
    assert done.keys() == set(FAULTS)
    assert min(done.values()) >= 2


async def test_the_gaps_are_short() -> None:
    if not _gaps:
        pytest.skip("no episode was played in this run")
    short(_gaps)
