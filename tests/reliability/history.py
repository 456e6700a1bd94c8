"""What happened in one episode, as a list of records: what was asked, what should come, every chunk that a client saw,
every fault, and what was left on the workers. One JSON object a line, so that a failing one can be kept and read."""

import asyncio
import heapq
import itertools
import time
from pathlib import Path
from typing import Any, Literal

import msgspec

Outcome = Literal[
    "done",  # `[DONE]` came
    "left",  # the client went away, as planned
    "error",  # an error event in the stream, and no `[DONE]`
    "refused",  # an HTTP status other than 200
    "cut",  # the connection ended and neither came
    "hung",  # nothing came until the client's patience was over
]


class Record(msgspec.Struct, kw_only=True, frozen=True, tag_field="kind"):
    """`t`: seconds since the episode began."""

    t: float


class Asked(Record, tag="asked"):
    """A client sent a request. `paced`: it reads slowly, so its gaps are its own."""

    stream: int
    path: str
    body: dict[str, Any]
    paced: bool = False


class Expected(Record, tag="expected"):
    """What the same request gets, not streamed, where nothing fails."""

    stream: int
    body: dict[str, Any]


class Chunk(Record, tag="chunk"):
    """One `data:` line, as it came. `[DONE]` and error events are none: they make the outcome."""

    stream: int
    data: dict[str, Any]


class Over(Record, tag="over"):
    """The stream's end. `code`: the error's code or the HTTP status."""

    stream: int
    outcome: Outcome
    code: str = ""


class Fault(Record, tag="fault"):
    """Something was broken, or mended."""

    what: str
    target: str


class Left(Record, tag="left"):
    """A worker's load after all streams were over."""

    worker: str
    running: int
    waiting: int


Event = Asked | Expected | Chunk | Over | Fault | Left

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Event).decode


class Recorder:
    """Takes records in the order they happen, and wakes those who wait for a number of chunks."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()
        self.events: list[Event] = []
        self.chunks = 0
        self.over = False

    def now(self) -> float:
        """Seconds since the episode began."""
        return time.monotonic() - self._began

    def add(self, kind: type[Record], **fields: Any) -> None:
        """Records one event, now."""
        self.events.append(kind(t=self.now(), **fields))  # type: ignore[arg-type]
        if kind is Chunk:
            self.chunks += 1
            self._wake(self.chunks)

    def finish(self) -> None:
        """No more chunks will come: nobody waits in vain."""
        self.over = True
        self._wake(float("inf"))

    async def reached(self, chunks: float) -> None:
        """Returns once so many chunks came, or none will come any more."""
        if self.over or self.chunks >= chunks:
            return
        future = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (chunks, next(self._numbers), future))
        await future

    def _wake(self, chunks: float) -> None:
        while self._waiting and self._waiting[0][0] <= chunks:
            future = heapq.heappop(self._waiting)[2]
            if not future.done():
                future.set_result(None)


def save(events: list[Event], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(_encode(event) + b"\n" for event in events))


def load(path: Path) -> list[Event]:
    return [_decode(line) for line in path.read_bytes().splitlines()]
