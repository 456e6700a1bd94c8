"""Slow, gone, and well behind a dead connection: what the watchdog makes of silence."""

import asyncio
import time

import pytest

from wherry_router.watchdog import Health, Watchdog, begins_within

STALL_S = 0.05


class Case:
    """A watchdog over a worker that says that it is `alive`, and counts how often it is asked. Its answer has begun
    unless `begin_s` says how long that may take."""

    def __init__(self, *, alive: bool = True, promises: bool = False, begin_s: float | None = None) -> None:
        self.alive = alive
        self.asked = asyncio.Semaphore(0)
        self.aborted = asyncio.Event()
        deadline = asyncio.get_running_loop().time() + 60
        self.dog = Watchdog(STALL_S, begin_s or 0, deadline, self._ask, self.aborted.set)
        if begin_s is None:
            self.dog.begun(promises=promises)

    async def _ask(self) -> bool:
        self.asked.release()
        return self.alive

    async def questions(self, count: int) -> None:
        for _ in range(count):
            await asyncio.wait_for(self.asked.acquire(), 5)

    async def gone(self) -> None:
        await asyncio.wait_for(self.aborted.wait(), 5)
        self.dog.stop()


async def test_silence_and_no_answer_is_a_worker_that_is_gone() -> None:
    case = Case(alive=False)
    await case.gone()
    assert (case.dog.lost, case.dog.mute) == (True, False)


async def test_a_worker_that_promises_no_signs_of_life_may_be_slow_for_ever() -> None:
    case = Case()
    await case.questions(8)
    assert not case.aborted.is_set()
    case.dog.stop()


async def test_one_that_promised_them_and_is_well_is_behind_a_dead_connection() -> None:
    case = Case(promises=True)
    await case.gone()
    assert (case.dog.lost, case.dog.mute) == (True, True)


async def test_one_that_is_well_and_has_not_begun_in_time_is_behind_one_too() -> None:
    case = Case(begin_s=8 * STALL_S)
    await case.questions(3)
    assert not case.aborted.is_set()
    await case.gone()
    assert (case.dog.lost, case.dog.mute) == (True, True)


async def test_one_that_begins_in_time_may_be_slow_for_ever() -> None:
    case = Case(begin_s=3 * STALL_S)
    case.dog.begun(promises=False)
    await case.questions(8)
    assert not case.aborted.is_set()
    case.dog.stop()


def test_a_long_request_may_take_longer_to_begin() -> None:
    assert begins_within(0.4, 1_000) == pytest.approx(1.4, abs=0.01)
    assert begins_within(1.0, 4_000_000) == 18.0


async def test_signs_of_life_are_no_events_but_show_that_the_connection_lives() -> None:
    case = Case()

    async def beating() -> None:
        while True:
            case.dog.beat()
            await asyncio.sleep(STALL_S / 10)

    beats = asyncio.create_task(beating())
    # It is asked all the same: a step loop that hangs shows in /health alone.
    await case.questions(8)
    assert not case.aborted.is_set()
    beats.cancel()
    await case.gone()
    assert case.dog.mute


async def test_while_nobody_reads_silence_tells_nothing_of_the_connection() -> None:
    case = Case(promises=True)
    case.dog.hold()
    await case.questions(8)
    assert not case.aborted.is_set()
    case.dog.reads()
    await case.gone()
    assert case.dog.mute


async def test_while_nobody_reads_a_worker_may_still_be_gone() -> None:
    case = Case(alive=False, promises=True)
    case.dog.hold()
    await case.gone()
    assert (case.dog.lost, case.dog.mute) == (True, False)


async def test_a_router_that_stood_still_itself_blames_nobody() -> None:
    async def well(url: str) -> bool:
        await asyncio.sleep(0.05)
        return True

    asked = asyncio.create_task(Health(well, timeout_s=0.2).ask("http://worker"))
    await asyncio.sleep(0)
    time.sleep(0.5)  # noqa: ASYNC251 - the loop itself is what stands still
    assert await asked


async def test_who_does_not_answer_in_time_is_given_up() -> None:
    gone = asyncio.Event()

    async def well(url: str) -> bool:
        try:
            return await asyncio.get_running_loop().create_future()
        finally:
            gone.set()

    assert await asyncio.wait_for(Health(well, timeout_s=0.2).ask("http://worker"), 5) is False
    await asyncio.wait_for(gone.wait(), 5)


async def test_many_silent_streams_of_one_worker_share_a_question() -> None:
    asked = 0

    async def well(url: str) -> bool:
        nonlocal asked
        asked += 1
        return True

    health = Health(well, timeout_s=0.2)
    looked = asyncio.Semaphore(0)

    def is_well() -> bool:
        looked.release()
        return health.is_well("w")

    loop = asyncio.get_running_loop()
    began = loop.time()
    dogs = [
        Watchdog(STALL_S, 60, began + 60, lambda: health.ask("w"), lambda: None, is_well=is_well) for _ in range(100)
    ]
    for _ in range(1000):
        await asyncio.wait_for(looked.acquire(), 5)
    for dog in dogs:
        dog.stop()
    assert not any(dog.lost for dog in dogs)
    # One in a tenth of a second, and one that was under way.
    assert asked <= (loop.time() - began) / 0.1 + 2
