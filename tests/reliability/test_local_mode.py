"""The same episodes in local mode: pods of an `LLMDeployment` are killed, frozen, cut off, deleted, and lose nodes."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from tests.reliability.checks import right, short
from tests.reliability.episode import Stage, stage
from tests.reliability.local_world import local_world

pytestmark = [pytest.mark.alone, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]
EPISODES = 5
_gaps: list[float] = []


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def on() -> AsyncIterator[Stage]:
    async with local_world() as world, stage(world) as made:
        yield made


@pytest.mark.parametrize("seed", range(EPISODES))
async def test_every_client_gets_what_it_would_have_got(on: Stage, seed: int) -> None:
    _gaps.extend(await right(on, seed, "local"))


async def test_the_gaps_are_short() -> None:
    if not _gaps:
        pytest.skip("no episode was played in this run")
    short(_gaps)
