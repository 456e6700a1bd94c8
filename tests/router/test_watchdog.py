"""Slow, gone, and well behind a dead connection: what the watchdog makes of silence."""

import asyncio

from wherry_router.watchdog import Watchdog

STALL_S = 0.05


class Case:
    """A watchdog over a worker that says that it is `alive`, and counts how often it is asked."""

    def __init__(self, *, alive: bool = True) -> None:
        self.alive = alive
        self.asked = asyncio.Semaphore(0)
        self.aborted = asyncio.Event()
        self.dog = Watchdog(STALL_S, asyncio.get_running_loop().time() + 60, self._ask, self.aborted.set)

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
    case = Case()
    case.dog.beat()
    await case.gone()
    assert (case.dog.lost, case.dog.mute) == (True, True)


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
    case = Case()
    case.dog.beat()
    case.dog.hold()
    await case.questions(8)
    assert not case.aborted.is_set()
    case.dog.reads()
    await case.gone()
    assert case.dog.mute


async def test_while_nobody_reads_a_worker_may_still_be_gone() -> None:
    case = Case(alive=False)
    case.dog.beat()
    case.dog.hold()
    await case.gone()
    assert (case.dog.lost, case.dog.mute) == (True, False)
