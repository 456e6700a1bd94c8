"""One worker and no spare: streams wait for it to come back, and where it does not, they end as documented."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from tests.reliability import client
from tests.reliability.episode import Stage, stage
from tests.reliability.history import Chunk, Event, Expected, Over, Recorder
from tests.reliability.judge import judge
from tests.reliability.workload import CHAT, Client, Fault
from tests.reliability.world import StaticWorld, static_world

pytestmark = [pytest.mark.alone, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]
STREAMS = 6
WAIT_S = 3.0
PATIENT, IMPATIENT = 0, 1  # routers
PROMPTS = ["Explain boats to me.", "写一首关于猫的诗。", "🚀 Tell me about rockets"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def on() -> AsyncIterator[Stage]:
    flags = [(), ("--resume-wait-s", f"{WAIT_S:g}")]
    async with static_world(workers=1, routers=flags) as world, stage(world) as made:
        yield made


def body(number: int) -> dict[str, object]:
    messages = [{"role": "user", "content": PROMPTS[number % len(PROMPTS)]}]
    options = {"max_tokens": 400, "ignore_eos": True, "seed": number, "temperature": 0.8, "logprobs": number % 2 == 0}
    return {"model": "chat", "messages": messages, **options}


async def history(on: Stage, fault: Fault, router: int = PATIENT) -> list[Event]:
    """All streams in the middle, then the fault."""
    world, url = on.world, on.world.routers[router]
    recorder = Recorder()
    bodies = [body(number) for number in range(STREAMS)]
    if not on.answers:
        whole = await asyncio.gather(*(client.whole(on.http, url, CHAT, one) for one in bodies))
        on.answers.update(enumerate(whole))
    for number in range(STREAMS):
        recorder.add(Expected, stream=number, body=on.answers[number])
    plain = Client(request=0, begins=0, leaves_after=None, paced=False)
    streams = [
        asyncio.create_task(client.stream(on.http, url, recorder, number, plain, CHAT, one, patience_s=60))
        for number, one in enumerate(bodies)
    ]
    await recorder.reached(STREAMS * 40)
    await world.do(fault, 0)
    await asyncio.gather(*streams)
    return recorder.events


@pytest.mark.parametrize("fault", ["kill", "cut", "drain"])
async def test_streams_wait_and_go_on_when_the_worker_is_back(on: Stage, fault: Fault) -> None:
    await on.whole_again(at_least=1)
    verdict = judge(await history(on, fault))
    assert verdict.problems == []
    assert verdict.outcomes == {"done": STREAMS}


async def test_where_it_does_not_come_back_they_end_with_an_error_in_time(on: Stage) -> None:
    world = on.world
    assert isinstance(world, StaticWorld)
    await on.whole_again(at_least=1)
    world.workers[0].child.may_start.clear()
    try:
        events = await history(on, "kill", IMPATIENT)
    finally:
        world.workers[0].child.may_start.set()
    verdict = judge(events, allowed=("error",))
    assert verdict.problems == []
    assert verdict.outcomes == {"error": STREAMS}
    assert verdict.codes == {"resume_timeout": STREAMS}
    ends = [event.t for event in events if isinstance(event, Over)]
    last = max(event.t for event in events if isinstance(event, Chunk))
    assert max(ends) - last < WAIT_S + 2, "the deadline holds"
    assert min(ends) - last > WAIT_S - 1, "and nobody gives up before it"
