"""What happened in one episode, as a list of records: what was asked, what should come, every chunk that a client saw,
every fault, and what was left on the workers. One JSON object a line, so that a failing one can be kept and read."""

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
    """Takes records in the order they happen."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self.events: list[Event] = []
        self.chunks = 0

    def now(self) -> float:
        return time.monotonic() - self._began

    def add(self, kind: type[Record], **fields: Any) -> None:
        """Records one event, now."""
        self.chunks += kind is Chunk
        self.events.append(kind(t=self.now(), **fields))  # type: ignore[arg-type]


def save(events: list[Event], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(_encode(event) + b"\n" for event in events))


def load(path: Path) -> list[Event]:
    return [_decode(line) for line in path.read_bytes().splitlines()]
