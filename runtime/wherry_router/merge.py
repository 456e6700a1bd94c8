"""Several generations of one answer, run at the same time."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from contextlib import aclosing
from typing import Protocol

from wherry_protocol.worker import Event

# Events that wait for a slow client, of all choices together. Full, it holds the generations back.
_BUFFER = 32


class _Single:
    """The events of the only generation, as number 0. One generator less than a generator would be."""

    __slots__ = ("_events", "aclose")

    def __init__(self, events: AsyncGenerator[Event, None]) -> None:
        self._events = events
        self.aclose = events.aclose

    def __aiter__(self) -> "_Single":
        return self

    async def __anext__(self) -> tuple[int, Event]:
        return 0, await self._events.__anext__()


class Merged(Protocol):
    """Events with their generation's number."""

    def __aiter__(self) -> AsyncIterator[tuple[int, Event]]: ...

    def aclose(self) -> Awaitable[None]:
        """Ends all generations."""


def merge(generations: Sequence[AsyncGenerator[Event, None]]) -> Merged:
    """Each event with its generation's number, in the order they come. The first error ends all.

    Closing the generator closes all.
    """
    if len(generations) == 1:
        return _Single(generations[0])
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
