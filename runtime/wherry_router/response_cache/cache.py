"""Answers that need not be computed again: those of requests whose answer is the same each time.

A request is deterministic when it is greedy or names its seed: sampling is a function of seed and position. Its answer
is found again by everything that decides it (prompt, sampling, model, the tenant's salt), so tenants never see one
another's. What a person may be waiting for is kept whole: an answer that broke off, was cancelled or failed is not.
"""

import hashlib
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING

import msgspec

from wherry_protocol.http.asgi import Headers
from wherry_protocol.worker import End, ErrorEvent, Event, ExecuteRequest, Started, Token
from wherry_router.response_cache.memory import Store

if TYPE_CHECKING:  # needs NumPy, which is loaded only where answers are found by meaning
    from wherry_router.response_cache.semantic import Asked, Semantic

HEADER = b"x-wherry-cache"
SIMILARITY = b"x-wherry-cache-similarity"
EXACT = b"exact"
_DAY_S = 86_400

_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(list[Event]).decode


def deterministic(request: ExecuteRequest) -> bool:
    """Whether its answer is the same each time."""
    return request.sampling.temperature == 0 or request.sampling.seed is not None


def decides(request: ExecuteRequest) -> ExecuteRequest:
    """All that decides the answer. Of the time only the day counts: chat templates may write a date."""
    bias = dict(sorted(request.sampling.logit_bias.items()))
    return msgspec.structs.replace(
        request,
        id="",
        priority=0,
        created=request.created // _DAY_S,
        resume=None,
        sampling=msgspec.structs.replace(request.sampling, logit_bias=bias),
    )


def key_of(request: ExecuteRequest, version: str = "") -> bytes:
    """Names all that decides the answer.

    Args:
        version: of what answers: model, quantization and the like.
    """
    return hashlib.sha256(_pack((version, decides(request)))).digest()


class Lookup(msgspec.Struct, frozen=True):
    """What the cache says of a request: the events of each of its generations, or None, as some have to be computed;
    and whether it keeps what is computed. `similarity`: the cosine, where the answer is that of another question."""

    kept: list[list[Event]] | None = None
    keeps: bool = False
    similarity: float | None = None
    asked: "Asked | None" = None

    @property
    def result(self) -> str:
        """`hit`, `semantic_hit`, `miss`, or nothing where the cache has no part in it."""
        if self.kept is None:
            return "miss" if self.keeps else ""
        return "hit" if self.similarity is None else "semantic_hit"

    def headers(self) -> Headers:
        """Tells the client."""
        if not (result := self.result):
            return []
        told = [(HEADER, result.encode())]
        if self.similarity is not None:
            told.append((SIMILARITY, b"%.4f" % self.similarity))
        return told


NOTHING = Lookup()


class ResponseCache:
    """Finds answers in a store and puts new ones there.

    Args:
        version: of what answers (`Started.version`). While a rollout goes on, replicas of another one answer, too: what
            they say is passed on, and not kept.
        semantic: finds answers by meaning where nothing else did.
    """

    def __init__(
        self, store: Store, max_entry_bytes: int, version: str = "", semantic: "Semantic | None" = None
    ) -> None:
        self._store = store
        self._max_entry = max_entry_bytes
        self._version = version
        self._semantic = semantic

    async def look(
        self, requests: Sequence[ExecuteRequest], control: bytes | None = None, wish: bytes | None = None
    ) -> Lookup:
        """Looks for the answer of a request with these generations.

        Args:
            control: its Cache-Control header (RFC 9111).
            wish: its header `HEADER`; `EXACT` wants no other question's answer.
        """
        words = {word.strip().lower() for word in (control or b"").split(b",")}
        if b"no-store" in words or not all(map(deterministic, requests)):
            return NOTHING
        anew = b"no-cache" in words
        kept = None if anew else await self._find(requests)
        if kept is not None or self._semantic is None or len(requests) != 1:
            return Lookup(kept, keeps=True)
        asked = self._semantic.ask(requests[0], self._version)
        if asked is None or anew or (wish is not None and wish.strip().lower() == EXACT):
            return Lookup(keeps=True, asked=asked)
        return await self._similar(self._semantic, requests[0].cache_salt, asked)

    async def _similar(self, semantic: "Semantic", tenant: str, asked: "Asked") -> Lookup:
        near = await semantic.nearest(asked)
        if near is not None:
            packed = await self._store.get(tenant, near.key)
            if packed is not None and (events := _read(packed)) is not None:
                return Lookup([events], keeps=True, similarity=near.similarity)
            semantic.forget(asked, near)
        return Lookup(keeps=True, asked=asked)

    async def _find(self, requests: Sequence[ExecuteRequest]) -> list[list[Event]] | None:
        found: list[list[Event]] = []
        for request in requests:
            packed = await self._store.get(request.cache_salt, key_of(request, self._version))
            if packed is None or (events := _read(packed)) is None:
                return None
            found.append(events)
        return found

    async def recorded(
        self, request: ExecuteRequest, events: AsyncGenerator[Event, None], lookup: Lookup = NOTHING
    ) -> AsyncGenerator[Event, None]:
        """Passes `events` on, and keeps the answer once it is whole. `lookup`: what `look` said of it."""
        record: _Record | None = _Record(self._max_entry)
        async with aclosing(events):
            async for event in events:
                if record is not None and not record.take(event):
                    record = None
                yield event
        if record is not None and record.whole and self._is_ours(record.version):
            key = key_of(request, self._version)
            self._store.put(request.cache_salt, key, _pack(record.events()))
            if self._semantic is not None and lookup.asked is not None:
                self._semantic.keep(lookup.asked, key)

    def _is_ours(self, version: str) -> bool:
        return not (version and self._version) or version == self._version


def _read(packed: bytes) -> list[Event] | None:
    try:
        return _unpack(packed)
    except msgspec.DecodeError:  # of another version of this program
        return None


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

    @property
    def version(self) -> str:
        """Of whoever gave it."""
        return "" if self._started is None else self._started.version

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
