"""Plays an episode in a world: clients stream, faults come, everything is recorded."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from tests.reliability import client
from tests.reliability.history import Event, Expected, Fault, Left, Recorder
from tests.reliability.judge import streamed_pieces
from tests.reliability.workload import Act, Client, Episode, draw_episode, draw_request
from tests.reliability.world import World, until

# What a mended worker may still have to do for clients that are gone.
_IDLE_S = 10.0


@dataclass
class Stage:
    """A world, the clients' connections to it, and the undisturbed answers that are known."""

    world: World
    http: aiohttp.ClientSession
    narrow: aiohttp.ClientSession
    answers: dict[int, dict[str, Any]] = field(default_factory=dict)

    async def undisturbed(self, requests: set[int]) -> None:
        """Asks for the answers that are not known yet, while nothing is broken."""
        missing = sorted(requests - self.answers.keys())
        gate = asyncio.Semaphore(16)

        async def ask(number: int) -> None:
            path, body = draw_request(number)
            async with gate:
                url = self.world.routers[number % len(self.world.routers)]
                self.answers[number] = await client.whole(self.http, url, path, body | {"model": self.world.model})

        await asyncio.gather(*(ask(number) for number in missing))

    async def whole_again(self, at_least: int) -> None:
        """Waits until so many workers are well, and mends what does not come back by itself."""
        for number in range(self.world.size):
            await self.world.mend(number)

        async def enough() -> bool:
            return len(await self.world.healthy()) >= at_least

        await until(enough, f"{at_least} healthy workers")


@contextlib.asynccontextmanager
async def stage(world: World) -> AsyncIterator[Stage]:
    async with client.session() as http, client.narrow_session() as narrow:
        yield Stage(world, http, narrow)


async def play(on: Stage, seed: int, streams: int = 20) -> list[Event]:
    """One episode's history. Afterwards nothing is broken any more, though what died may still be coming back."""
    episode = draw_episode(seed, on.world.size, streams, on.world.faults)
    await on.whole_again(at_least=min(2, on.world.size))
    await on.undisturbed({c.request for c in episode.clients})
    await on.whole_again(at_least=min(2, on.world.size))
    recorder = Recorder()
    total = 0
    for number, one in enumerate(episode.clients):
        recorder.add(Expected, stream=number, body=on.answers[one.request])
        total += streamed_pieces(on.answers[one.request])
    playing = [asyncio.create_task(_stream(on, recorder, n, c, total)) for n, c in enumerate(episode.clients)]
    breaking = asyncio.create_task(_break(on, recorder, episode, total))
    await asyncio.gather(*playing)
    recorder.finish()
    await breaking
    for number in range(on.world.size):
        await on.world.mend(number)
    await _leftovers(on, recorder)
    return recorder.events


async def _stream(on: Stage, recorder: Recorder, number: int, one: Client, total: int) -> None:
    # Should the others stand still, nobody waits for their progress any longer than it takes.
    await _either(recorder.reached(one.begins * total), 3.0)
    path, body = draw_request(one.request)
    url = on.world.routers[number % len(on.world.routers)]
    http = on.narrow if one.paced else on.http
    await client.stream(http, url, recorder, number, one, path, body | {"model": on.world.model})


async def _either(waiting: Any, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(waiting, seconds)


async def _break(on: Stage, recorder: Recorder, episode: Episode, total: int) -> None:
    hurt: set[int] = set()
    for act in episode.acts:
        await _either(recorder.reached(act.at * total), 3.0)
        if recorder.over:
            return  # no stream is left that it could disturb
        await _act(on, recorder, act, hurt)


async def _act(on: Stage, recorder: Recorder, act: Act, hurt: set[int]) -> None:
    """Does it to the first well worker in its order, if another well one is left: that is what is promised."""
    well = (await on.world.healthy()) - hurt
    target = next((number for number in act.order if number in well), None)
    if target is None or len(well) < 2:
        recorder.add(Fault, what=f"spared: {act.what}", target="")
        return
    hurt.add(target)
    recorder.add(Fault, what=act.what, target=f"worker-{target}")
    await on.world.do(act.what, target)


async def _leftovers(on: Stage, recorder: Recorder) -> None:
    """Waits until the workers are idle, and records what they say then."""
    loads: dict[str, tuple[int, int]] = {}

    async def idle() -> bool:
        nonlocal loads
        loads = await on.world.loads()
        return not any(running or waiting for running, waiting in loads.values())

    with contextlib.suppress(AssertionError):
        await until(idle, "idle workers", _IDLE_S)
    for name, (running, waiting) in loads.items():
        recorder.add(Left, worker=name, running=running, waiting=waiting)
