"""Several generations of one answer, run at the same time."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from wherry_protocol.worker import Event

# Events that wait for a slow client, of all choices together. Full, it holds the generations back.
_BUFFER = 32


async def _numbered(index: int, events: AsyncGenerator[Event, None]) -> AsyncGenerator[tuple[int, Event], None]:
    async with aclosing(events):
        async for event in events:
            yield index, event


def merge(generations: Sequence[AsyncGenerator[Event, None]]) -> AsyncGenerator[tuple[int, Event], None]:
    """Each event with its generation's number, in the order they come. The first error ends all.

    Closing the generator closes all.
    """
    if len(generations) == 1:
        return _numbered(0, generations[0])
    return _together(generations)


async def _together(generations: Sequence[AsyncGenerator[Event, None]]) -> AsyncGenerator[tuple[int, Event], None]:
    queue: asyncio.Queue[tuple[int, Event | Exception | None]] = asyncio.Queue(_BUFFER)

    async def pump(index: int, events: AsyncGenerator[Event, None]) -> None:
        last: Exception | None = None
        try:
            async with aclosing(events):
                async for event in events:
                    await queue.put((index, event))
        except Exception as error:
            last = error
        await queue.put((index, last))

    pumps = [asyncio.create_task(pump(index, events)) for index, events in enumerate(generations)]
    try:
        running = len(pumps)
        while running:
            index, item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield index, item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
