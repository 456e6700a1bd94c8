"""Workers of two processes each: when one is killed or the group frozen, its streams go on elsewhere."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from tests.reliability.checks import right, short
from tests.reliability.episode import Stage, stage
from tests.reliability.world import static_world

pytestmark = [pytest.mark.alone, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]
EPISODES = 2
_gaps: list[float] = []


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def on() -> AsyncIterator[Stage]:
    async with static_world(workers=2, ranks=2) as world, stage(world) as made:
        yield made


@pytest.mark.parametrize("seed", range(EPISODES))
async def test_every_client_gets_what_it_would_have_got(on: Stage, seed: int) -> None:
    _gaps.extend(await right(on, seed, "ranks"))


async def test_the_gaps_are_short() -> None:
    if not _gaps:
        pytest.skip("no episode was played in this run")
    short(_gaps)
