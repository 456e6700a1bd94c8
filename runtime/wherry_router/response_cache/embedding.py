"""Asks an endpoint that speaks OpenAI's `/v1/embeddings` what a text means."""

import asyncio
import logging
from collections.abc import Callable
from typing import Literal

import aiohttp
import msgspec

from wherry_router.response_cache.circuit import LEAST_S, Circuit
from wherry_router.response_cache.vectors import Vector, unit

log = logging.getLogger("wherry.router")

CONNECTIONS = 32
# Failures in a row after which nobody waits for it until a probe succeeds.
FAILURES = 3
MOST_DIMENSIONS = 8192
_MOST_BYTES = 32 * MOST_DIMENSIONS
_PROBE = "Is anybody there?"

Result = Literal["ok", "timeout", "error"]


class _Embedding(msgspec.Struct):
    embedding: list[float]


class _Answer(msgspec.Struct):
    data: list[_Embedding]


_read = msgspec.json.Decoder(_Answer).decode
_write = msgspec.json.Encoder().encode


class EmbeddingError(Exception):
    """The endpoint answered, and not with an embedding. `ours`: it refused this one text, and is well itself."""

    def __init__(self, why: str, *, ours: bool = False) -> None:
        super().__init__(why)
        self.ours = ours


class Embedder:
    """One endpoint. Whatever fails there costs `timeout_s` at most, and after `FAILURES` in a row nothing.

    Belongs to the event loop that it is made in.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None,
        timeout_s: float,
        clock: Callable[[], float],
        count: Callable[[Result], None],
    ) -> None:
        self._url = url
        self._model = model
        self._timeout_s = timeout_s
        self._count = count
        self._circuit = Circuit(FAILURES, clock)
        headers = {"content-type": "application/json", "accept": "application/json", "user-agent": "wherry-router"}
        if key:
            headers["authorization"] = f"Bearer {key}"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=CONNECTIONS, keepalive_timeout=15),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=headers,
        )

    @property
    def lost(self) -> bool:
        """Whether it is not asked now."""
        return self._circuit.open

    async def embed(self, text: str) -> Vector | None:
        """The text's vector, of length 1; None: it cannot be had now."""
        return None if self._circuit.open else await self._ask(text)

    async def run(self) -> None:
        """While it is lost, asks whether it is there again. Never ends."""
        while True:
            await asyncio.sleep(LEAST_S / 2)
            if self._circuit.due():
                await self._ask(_PROBE)

    async def close(self) -> None:
        """Closes every connection."""
        await self._session.close()

    async def _ask(self, text: str) -> Vector | None:
        try:
            async with asyncio.timeout(self._timeout_s):
                vector = await self._post(text)
        except TimeoutError:
            self._failed("timeout", "it did not answer in time")
            return None
        except EmbeddingError as error:
            if error.ours:
                self._count("error")
            else:
                self._failed("error", str(error))
            return None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            self._failed("error", type(error).__name__)
            return None
        self._count("ok")
        if self._circuit.succeeded():
            log.info("the embedding endpoint answers again")
        return vector

    async def _post(self, text: str) -> Vector:
        body = _write({"model": self._model, "input": text, "encoding_format": "float"})
        # What it redirects to, nobody has configured.
        async with self._session.post(self._url, data=body, allow_redirects=False) as response:
            if response.status != 200:
                raise EmbeddingError(f"status {response.status}", ours=response.status in (400, 413, 422))
            answer = bytearray()
            async for part in response.content.iter_any():
                answer += part
                if len(answer) > _MOST_BYTES:
                    raise EmbeddingError(f"its answer is larger than {_MOST_BYTES} bytes")
        return _vector(bytes(answer))

    def _failed(self, result: Result, why: str) -> None:
        self._count(result)
        if self._circuit.failed():
            fields = {"why": why}
            log.error("the embedding endpoint is lost; answers are found by exact words only", extra={"fields": fields})


def _vector(answer: bytes) -> Vector:
    try:
        data = _read(answer).data
    except msgspec.MsgspecError:
        raise EmbeddingError("its answer is no embedding") from None
    if len(data) != 1 or not 0 < len(data[0].embedding) <= MOST_DIMENSIONS:
        raise EmbeddingError(f"its answer is not one embedding of at most {MOST_DIMENSIONS} dimensions")
    vector = unit(data[0].embedding)
    if vector is None:
        raise EmbeddingError("its embedding has no direction")
    return vector
