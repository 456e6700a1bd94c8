"""HTTP/1.1 with as little Python as there can be: neither the client nor the mock worker is to be what is measured."""

import asyncio
import contextlib
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httptools

MODEL = "chat"
PROMPT = "Tell me about boats."


@dataclass(slots=True)
class Answer:
    """`first_s` and `whole_s`: seconds from sending the request to the first byte of the body and to its last."""

    status: int
    first_s: float
    whole_s: float
    pieces: int  # tokens with text
    done: bool  # a stream's [DONE] came


class Lost(Exception):
    """The connection ended before the answer did."""


class Connection(asyncio.Protocol):
    """A connection that is kept, with one request on it at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None
        self._waiter: asyncio.Future[Answer] | None = None
        self._sent = self._first = 0.0
        self._body: list[bytes] = []
        self._complete = False

    @property
    def open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(Lost(str(error or "closed")))

    def data_received(self, data: bytes) -> None:
        if self._parser is not None:
            self._parser.feed_data(data)

    def on_body(self, data: bytes) -> None:
        if not self._body:
            self._first = time.perf_counter()
        self._body.append(data)

    def on_message_complete(self) -> None:
        now = time.perf_counter()
        status = self._parser.get_status_code()
        if not self._parser.should_keep_alive():
            self.close()
        body = b"".join(self._body)
        pieces = body.count(b'"content":"') - body.count(b'"content":""')
        answer = Answer(status, self._first - self._sent, now - self._sent, pieces, b"data: [DONE]" in body)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(answer)

    async def ask(self, request: bytes) -> Answer:
        """Sends a whole request and waits for the whole answer.

        Raises:
            Lost: it did not become whole.
        """
        if not self.open or self._transport is None:
            raise Lost("closed")
        self._parser, self._body = httptools.HttpResponseParser(self), []
        self._waiter = asyncio.get_running_loop().create_future()
        self._sent = time.perf_counter()
        self._transport.write(request)
        return await self._waiter

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


async def connect(url: str) -> Connection:
    """To a server that may need a moment for its backlog."""
    parts = urlsplit(url)
    loop = asyncio.get_running_loop()
    for attempt in range(5):
        with contextlib.suppress(OSError):
            _, protocol = await loop.create_connection(Connection, parts.hostname, parts.port)
            return protocol
        await asyncio.sleep(0.2 * (attempt + 1))
    raise Lost(f"no connection to {url}")


def chat(tokens: int, *, stream: bool, prompt: str = PROMPT) -> bytes:
    """A request to any of the routers, and to a mock worker directly. Every one has it in this form."""
    body = (
        f'{{"model":"{MODEL}","messages":[{{"role":"user","content":"{prompt}"}}],'
        f'"max_tokens":{tokens},"stream":{"true" if stream else "false"}}}'
    ).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: router\r\ncontent-type: application/json\r\n"
        f"authorization: Bearer none\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
