"""Answers of questions that mean the same.

What may be answered so is `question`'s to say. A question is embedded at most once, and only where the exact half found
nothing; while no question of its group is known, its embedding is not waited for.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Protocol

import msgspec
import numpy as np

from wherry_protocol.worker import ExecuteRequest
from wherry_router.response_cache.question import Question, question_of
from wherry_router.response_cache.vectors import Near, Vector, Vectors

# Questions that are embedded after their answer, at a time; over it they are not kept.
_MOST_PENDING = 32


class Embeds(Protocol):
    """See `Embedder`."""

    async def embed(self, text: str) -> Vector | None:
        """See `Embedder.embed`."""


class News(Protocol):
    """Tells all routers, this one too."""

    def tell(self, plain: bytes, most: int) -> None:
        """Tells `told`, now and for some time; whoever starts later is told the latest `most`."""

    def told(self) -> AsyncGenerator[tuple[bytes, float], None]:
        """What was told, and for how many seconds it is of use."""


class Answered(msgspec.Struct, array_like=True):
    """A question that was answered, as routers tell one another. `vector`: float32, little-endian."""

    tenant: str
    group: bytes
    key: bytes
    vector: bytes


_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(Answered).decode


class Asked:
    """A question that is being answered."""

    def __init__(self, tenant: str, question: Question) -> None:
        self.tenant = tenant
        self.question = question
        self.vector: Vector | None = None
        self.embedded = False  # or it was tried in vain


class SemanticSettings(msgspec.Struct, frozen=True, kw_only=True):
    """`space`: names what embeds. `threshold`: cosine from which on two questions mean the same. `most`: questions that
    are known at a time. `max_chars`: longer ones are not compared. `ttl_s`: as of answers."""

    space: str
    threshold: float = 0.95
    most: int = 2000
    max_chars: int = 1000
    ttl_s: float = 600.0


class Semantic:
    """Knows which questions were answered. With `news`, also those that other routers answered."""

    def __init__(
        self, settings: SemanticSettings, embedder: Embeds, clock: Callable[[], float], news: News | None = None
    ) -> None:
        self._settings = settings
        self._embedder = embedder
        self._clock = clock
        self._news = news
        self._tasks: set[asyncio.Task[None]] = set()
        self.vectors = Vectors(settings.most, clock)

    def ask(self, request: ExecuteRequest, version: str) -> Asked | None:
        """The question of a request, if it has one that may be answered so."""
        settings = self._settings
        question = question_of(request, f"{version}\0{settings.space}", settings.max_chars)
        return None if question is None else Asked(request.cache_salt, question)

    async def nearest(self, asked: Asked) -> Near | None:
        """The answered question that means the same, if there is one."""
        group = asked.question.group
        if not self.vectors.knows(group):
            return None
        await self._embed(asked)
        near = None if asked.vector is None else self.vectors.nearest(asked.tenant, group, asked.vector)
        return near if near is not None and near.similarity >= self._settings.threshold else None

    def forget(self, asked: Asked, near: Near) -> None:
        """An answer that is gone answers nothing."""
        self.vectors.drop(asked.tenant, asked.question.group, near.key)

    def keep(self, asked: Asked, key: bytes) -> None:
        """Notes that the question was answered, with the answer of that key; maybe after this returns."""
        if asked.embedded:
            self._note(asked, key)
        elif len(self._tasks) < _MOST_PENDING:
            task = asyncio.get_running_loop().create_task(self._embed_and_note(asked, key))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def follow(self, news: News) -> None:
        """Follows what all routers answered. Never ends."""
        async for plain, left_s in news.told():
            try:
                one = _unpack(plain)
                vector = np.frombuffer(one.vector, dtype="<f4").astype(np.float32, copy=False)
            except (msgspec.MsgspecError, ValueError):  # of another version of this program
                continue
            if len(vector):
                self.vectors.put(one.tenant, one.group, one.key, vector, self._clock() + left_s)

    async def close(self) -> None:
        """Gives up what is being embedded."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _embed(self, asked: Asked) -> None:
        asked.embedded = True
        asked.vector = await self._embedder.embed(asked.question.text)

    async def _embed_and_note(self, asked: Asked, key: bytes) -> None:
        await self._embed(asked)
        self._note(asked, key)

    def _note(self, asked: Asked, key: bytes) -> None:
        if (vector := asked.vector) is None:
            return
        tenant, group = asked.tenant, asked.question.group
        self.vectors.put(tenant, group, key, vector, self._clock() + self._settings.ttl_s)
        if self._news is not None:
            packed = _pack(Answered(tenant, group, key, vector.astype("<f4").tobytes()))
            self._news.tell(packed, self._settings.most)
