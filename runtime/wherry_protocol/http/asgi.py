"""The ASGI vocabulary and the few verbs that the hot paths need: https://asgi.readthedocs.io/en/latest/specs/www.html."""

import asyncio
import contextlib
import os
import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from types import TracebackType
from typing import Any

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

_CORRELATION_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
_LINGER_S = 2.0


class BodyTooLarge(Exception):
    """The body is over the cap; nothing over the cap was kept."""


class BodyTimeout(Exception):
    """The body did not arrive in time."""


class ClientGone(Exception):
    """The client closed the connection before its request was whole."""


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first header called `name` (in lower case)."""
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value)
    return None


def correlation_id(scope: Scope) -> str:
    """The client's X-Correlation-Id or X-Request-Id if it is a plain token, else a new one."""
    for name in (b"x-correlation-id", b"x-request-id"):
        value = header(scope, name)
        if value is not None and _CORRELATION_ID.fullmatch(value):
            return value.decode()
    return os.urandom(12).hex()


async def read_body(scope: Scope, receive: Receive, limit: int, timeout_s: float = 30.0) -> bytes:
    """The request's body, read no further than `limit` bytes.

    Raises:
        BodyTooLarge: by the declared length before anything is read, or as soon as more than `limit` bytes arrived.
        BodyTimeout: it took longer than `timeout_s`.
        ClientGone: the client went away.
    """
    declared = header(scope, b"content-length")
    if declared is not None and (len(declared) > 18 or int(declared) > limit):
        raise BodyTooLarge
    message = await receive()
    if not message.get("more_body", False) and message["type"] == "http.request":
        body = bytes(message["body"])
        if len(body) > limit:
            raise BodyTooLarge
        return body
    try:
        async with asyncio.timeout(timeout_s):
            return await _read_rest(message, receive, limit)
    except TimeoutError:
        raise BodyTimeout from None


async def _read_rest(message: Message, receive: Receive, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise BodyTooLarge
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)
        message = await receive()


async def respond(
    send: Send,
    status: int,
    body: bytes,
    *,
    content_type: bytes = b"application/json",
    headers: Iterable[tuple[bytes, bytes]] = (),
) -> None:
    """A whole response."""
    start: Headers = [(b"content-type", content_type), (b"content-length", b"%d" % len(body)), *headers]
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": body})


async def respond_unread(
    receive: Receive, send: Send, status: int, body: bytes, limit: int, headers: Iterable[tuple[bytes, bytes]] = ()
) -> None:
    """Answers a request whose body was not read, then closes the connection.

    A socket that is closed with data unread sends a reset, and the client may lose the answer; so up to `limit` bytes
    more are thrown away first, for at most two seconds.
    """
    start: Headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"connection", b"close"),
        *headers,
    ]
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    try:
        async with asyncio.timeout(_LINGER_S):
            while limit > 0:
                message = await receive()
                limit -= len(message.get("body", b""))
                if not message.get("more_body", False):
                    break
    except TimeoutError:
        pass
    await send({"type": "http.response.body", "body": b""})


class ClientConnection:
    """Whether the client is still there. Wherry's servers put it into the scope's extensions under `EXTENSION`."""

    EXTENSION = "wherry.client"
    __slots__ = ("lost", "on_lost")

    def __init__(self) -> None:
        self.lost = False
        self.on_lost: Callable[[], None] | None = None

    def ended(self) -> None:
        """The connection is gone."""
        self.lost = True
        if self.on_lost is not None:
            self.on_lost()


class CancelOnDisconnect:
    """Cancels the task inside `async with` as soon as its client goes away; the cancellation ends at the block's end.

    The body must have been read whole before. (A second task that waits for `http.disconnect` would do the same, at
    the price of a task for each request.)
    """

    __slots__ = ("_client", "_task", "gone")

    def __init__(self, scope: Scope) -> None:
        self._client: ClientConnection = scope["extensions"][ClientConnection.EXTENSION]
        self._task: asyncio.Task[Any] | None = None
        self.gone = False

    def _lost(self) -> None:
        self.gone = True
        if self._task is not None:
            self._task.cancel()

    async def __aenter__(self) -> "CancelOnDisconnect":
        self._task = asyncio.current_task()
        self._client.on_lost = self._lost
        if self._client.lost:
            self._lost()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._client.on_lost = None
        if not self.gone or self._task is None:
            return False
        if kind is None:
            # The cancellation may still be on its way: let it arrive here and nowhere else.
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0)
        self._task.uncancel()
        return kind is None or issubclass(kind, asyncio.CancelledError)
