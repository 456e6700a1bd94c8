"""Answers that need not be computed again: those of requests whose answer is the same each time.

A request is deterministic when it is greedy or names its seed: sampling is a function of seed and position. Its answer
is found again by everything that decides it (prompt, sampling, model, the tenant's salt), so tenants never see one
another's. What a person may be waiting for is kept whole: an answer that broke off, was cancelled or failed is not.
"""

import argparse
import hashlib
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Protocol

import msgspec

from wherry_protocol.worker import End, ErrorEvent, Event, ExecuteRequest, Started, Token
from wherry_router.metrics import RouterMetrics

HEADER = b"x-wherry-cache"
DEFAULT_TTL_S = 600.0
_LEAST_BYTES = 1 << 20
_LARGEST_SHARE = 100  # no answer takes more than this part of the whole
# What an entry takes beside its own bytes: key, dictionary slot, bytes object.
_OVERHEAD = 250
_DAY_S = 86_400

_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(list[Event]).decode


class Store(Protocol):
    """Where answers are kept. Losing one costs time and nothing else."""

    async def get(self, key: bytes) -> bytes | None:
        """What was put there, if it is still there."""

    async def put(self, key: bytes, value: bytes) -> None:
        """Keeps it for a while."""


class Memory:
    """A `Store` in this process: the least recently used ones go when `max_bytes` are full, all go after `ttl_s`."""

    def __init__(self, max_bytes: int, ttl_s: float, clock: Callable[[], float]) -> None:
        self._max_bytes = max_bytes
        self._ttl = ttl_s
        self._clock = clock
        self._entries: OrderedDict[bytes, tuple[float, bytes]] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    async def get(self, key: bytes) -> bytes | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        until, value = entry
        if until <= self._clock():
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return value

    async def put(self, key: bytes, value: bytes) -> None:
        if key in self._entries:
            self._drop(key)
        size = len(value) + _OVERHEAD
        if size > self._max_bytes:
            return
        while self.bytes + size > self._max_bytes:
            self._drop(next(iter(self._entries)))
        self._entries[key] = (self._clock() + self._ttl, value)
        self.bytes += size

    def _drop(self, key: bytes) -> None:
        self.bytes -= len(self._entries.pop(key)[1]) + _OVERHEAD


def deterministic(request: ExecuteRequest) -> bool:
    """Whether its answer is the same each time."""
    return request.sampling.temperature == 0 or request.sampling.seed is not None


def key_of(request: ExecuteRequest, version: str = "") -> bytes:
    """Names all that decides the answer. Of the time only the day counts: chat templates may write a date.

    Args:
        version: of what answers, such as model and quantization.
    """
    bias = dict(sorted(request.sampling.logit_bias.items()))
    decides = msgspec.structs.replace(
        request,
        id="",
        priority=0,
        created=request.created // _DAY_S,
        resume=None,
        sampling=msgspec.structs.replace(request.sampling, logit_bias=bias),
    )
    return hashlib.sha256(_pack((version, decides))).digest()


class Lookup(msgspec.Struct, frozen=True):
    """What the cache says of a request: the events of each of its generations, or None, as some have to be computed;
    and whether it keeps what is computed."""

    kept: list[list[Event]] | None = None
    keeps: bool = False

    @property
    def result(self) -> str:
        """`hit`, `miss`, or nothing where the cache has no part in it."""
        return "hit" if self.kept is not None else "miss" if self.keeps else ""


NOTHING = Lookup()


class ResponseCache:
    """Finds answers in a store and puts new ones there."""

    def __init__(self, store: Store, max_entry_bytes: int, version: str = "") -> None:
        self._store = store
        self._max_entry = max_entry_bytes
        self._version = version

    async def look(self, requests: Sequence[ExecuteRequest], control: bytes | None = None) -> Lookup:
        """Looks for the answer of a request with these generations. `control`: its Cache-Control header (RFC 9111)."""
        words = {word.strip().lower() for word in (control or b"").split(b",")}
        if b"no-store" in words or not all(map(deterministic, requests)):
            return NOTHING
        return Lookup(None if b"no-cache" in words else await self._find(requests), keeps=True)

    async def _find(self, requests: Sequence[ExecuteRequest]) -> list[list[Event]] | None:
        found = []
        for request in requests:
            packed = await self._store.get(key_of(request, self._version))
            if packed is None:
                return None
            try:
                found.append(_unpack(packed))
            except msgspec.DecodeError:  # of another version of this program
                return None
        return found

    async def recorded(
        self, request: ExecuteRequest, events: AsyncGenerator[Event, None]
    ) -> AsyncGenerator[Event, None]:
        """Passes `events` on, and keeps the answer once it is whole."""
        record: _Record | None = _Record(self._max_entry)
        async with aclosing(events):
            async for event in events:
                if record is not None and not record.take(event):
                    record = None
                yield event
        if record is not None and record.whole:
            await self._store.put(key_of(request, self._version), _pack(record.events()))


class _Record:
    """An answer on its way, its tokens joined to one event."""

    def __init__(self, max_bytes: int) -> None:
        self._room = max_bytes
        self._started: Started | None = None
        self._tokens: list[Token] = []
        self._end: End | None = None

    @property
    def whole(self) -> bool:
        return self._started is not None and self._end is not None

    def take(self, event: Event) -> bool:
        """False: this answer is not kept."""
        if type(event) is Token:
            self._tokens.append(event)
            self._room -= 5 * len(event.ids) + len(event.text) + 200 * len(event.logprobs)
            return self._room > 0
        if type(event) is Started:
            self._started, self._tokens, self._end = event, [], None  # a second one voids what came before
        elif type(event) is End:
            self._end = event
            return event.finish_reason != "cancelled"
        return type(event) is not ErrorEvent

    def events(self) -> list[Event]:
        joined = Token(
            index=0,
            ids=[i for token in self._tokens for i in token.ids],
            text="".join(token.text for token in self._tokens),
            logprobs=[p for token in self._tokens for p in token.logprobs],
        )
        return [e for e in (self._started, joined, self._end) if e is not None]


async def replay(events: Sequence[Event]) -> AsyncGenerator[Event, None]:
    """Events that are there already."""
    for event in events:
        yield event


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    group = parser.add_argument_group("response cache")
    group.add_argument(
        "--response-cache-bytes",
        type=_size,
        default=0,
        help="memory for answers that are the same each time (temperature 0 or a seed); 0: none is kept (default)",
    )
    group.add_argument(
        "--response-cache-ttl-s", type=float, default=DEFAULT_TTL_S, help="seconds that they are kept (%(default)g)"
    )
    group.add_argument(
        "--response-cache-version", default="", help="of what answers; answers of another version are not found"
    )


def make(args: argparse.Namespace, metrics: RouterMetrics) -> ResponseCache | None:
    """What the flags say; `metrics` tells how full it is."""
    if not args.response_cache_bytes:
        return None
    memory = Memory(args.response_cache_bytes, args.response_cache_ttl_s, time.monotonic)
    metrics.response_cache_bytes.set_function(lambda: memory.bytes)
    return ResponseCache(memory, args.response_cache_bytes // _LARGEST_SHARE, args.response_cache_version)


def _size(text: str) -> int:
    value = int(text)
    if value != 0 and value < _LEAST_BYTES:
        raise argparse.ArgumentTypeError(f"{text} bytes are too few to be of use: give {_LEAST_BYTES} or more, or 0")
    return value
