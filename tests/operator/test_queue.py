"""The work queue: nothing lost, nothing twice at a time, failures ever later."""

import asyncio

import pytest

from wherry_operator.cluster.queue import BACKOFF_MAX_S, WorkQueue


async def take(queue: WorkQueue[str]) -> str:
    return await asyncio.wait_for(queue.get(), 5)


async def test_a_key_is_handed_out_once() -> None:
    queue: WorkQueue[str] = WorkQueue()
    for _ in range(3):
        queue.add("a")
    queue.add("b")
    assert [await take(queue), await take(queue)] == ["a", "b"]
    assert len(queue) == 0


async def test_news_during_the_work_ask_for_one_more_look() -> None:
    queue: WorkQueue[str] = WorkQueue()
    queue.add("a")
    await take(queue)
    queue.add("a")
    queue.add("a")
    assert len(queue) == 0, "the same key must not be worked on twice at a time"
    queue.done("a")
    assert await take(queue) == "a"
    queue.done("a")
    assert len(queue) == 0


async def test_failures_wait_longer_each_time() -> None:
    queue: WorkQueue[str] = WorkQueue()
    delays = []
    for _ in range(12):
        queue.add("a")
        await take(queue)
        delays.append(queue.failed("a"))
    assert delays[:4] == [0.2, 0.4, 0.8, 1.6]
    assert delays[-1] == BACKOFF_MAX_S
    queue.add("a")
    await take(queue)
    queue.done("a")
    queue.add("a")
    await take(queue)
    assert queue.failed("a") == 0.2, "a success starts the count anew"


async def test_a_failed_key_comes_back_by_itself() -> None:
    queue: WorkQueue[str] = WorkQueue()
    queue.add("a")
    await take(queue)
    queue.failed("a")
    assert await take(queue) == "a"


@pytest.mark.parametrize("delays", [(0.01, 60), (60, 0.01)])
async def test_the_earlier_timer_counts(delays: tuple[float, float]) -> None:
    queue: WorkQueue[str] = WorkQueue()
    for delay in delays:
        queue.add_after("a", delay)
    assert await take(queue) == "a"
