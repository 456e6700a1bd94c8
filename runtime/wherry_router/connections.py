"""HTTP/1.1 to workers on the hot path: connections that are kept, with one request on each at a time.

A client library costs a router more than all that it decides: with aiohttp a third of a request's time. What workers
need of HTTP is little, and parsing it is left to llhttp (httptools), as uvicorn does. See
docs/adr/0010-client-of-workers.md.
"""

import asyncio
import ssl
import time
from collections import deque
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httptools

from wherry_router.worker_tls import Secure

KEPT_S = 15.0  # shorter than servers keep idle connections (uvicorn here: 75 s)
_HIGH_WATER = 2**17  # bytes that wait for a slow client before reading pauses
_LOW_WATER = 2**16
_MAX_HEADERS = 64 * 1024


class Unreachable(OSError):
    """No connection was made."""


class Broken(ConnectionError):
    """The connection ended, or what came over it is not HTTP, before the answer was whole."""


class Connection(asyncio.Protocol):
    """One connection. An exchange sends a request and reads its answer; then the connection may be used again."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.complete = True  # nothing of an answer is still to come
        self.reusable = True
        self.idle_since = 0.0
        self.context: ssl.SSLContext | None = None  # what it was made with
        self._transport: Any = None
        self._parser = httptools.HttpResponseParser(self)
        self._head = False  # the answer's head is there
        self._head_bytes = 0
        self._body: list[bytes] = []
        self._waiting = 0  # bytes of `_body`
        self._paused = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    # What the transport tells.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is there."""
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone; what had been received may still be read."""
        self._fail(Broken(str(exc) if exc else "the worker closed the connection"))

    def data_received(self, data: bytes) -> None:
        """Something came."""
        if self.complete:
            self._fail(Broken("the worker sent what nobody asked for"))
            return
        if not self._head:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(Broken(f"not HTTP: {error}"))
            return
        if not self._head and self._head_bytes > _MAX_HEADERS:
            self._fail(Broken(f"headers of over {_MAX_HEADERS} bytes"))
        elif self._waiting > _HIGH_WATER and not self._paused:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    # What the parser tells.

    def on_message_begin(self) -> None:
        """An answer, which somebody must be waiting for."""
        if self.complete:
            raise Broken("the worker sent what nobody asked for")

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        self.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        """The answer's head, or an interim one."""
        self.status = self._parser.get_status_code()
        self._head = self.status >= 200
        if not self._head:
            self.headers.clear()

    def on_body(self, data: bytes) -> None:
        """A piece of the body."""
        self._body.append(data)
        self._waiting += len(data)

    def on_message_complete(self) -> None:
        """The answer's end."""
        if self._head:
            self.complete = True
            self.reusable = self.reusable and self._parser.should_keep_alive()

    # What an exchange does.

    def send(self, request: bytes) -> None:
        """Sends a whole request."""
        self.status, self.headers = 0, {}
        self.complete = self._head = False
        self._head_bytes = 0
        self._transport.write(request)

    async def head(self) -> int:
        """The status, once the answer's head has come.

        Raises:
            Broken: it will not come.
        """
        while not self._head:
            await self._more()
        return self.status

    async def read(self) -> bytes:
        """What came of the body since the last time, at least a byte; empty at its end.

        Raises:
            Broken: the connection ended before the body did.
        """
        while not self._body:
            if self.complete:
                return b""
            await self._more()
        body = self._body
        data = body[0] if len(body) == 1 else b"".join(body)
        self._body = []
        self._waiting = 0
        if self._paused:
            self._paused = False
            self._transport.resume_reading()
        return data

    def abort(self, reason: str = "given up") -> None:
        """Ends it now; whoever reads from it is told."""
        self._fail(Broken(reason))

    @property
    def answered(self) -> bool:
        """Whether the answer's head has come."""
        return self._head

    @property
    def usable(self) -> bool:
        """Whether another request may be sent over it."""
        return self.complete and self.reusable and self._error is None

    async def _more(self) -> None:
        if self._error is not None:
            raise self._error
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, error: Exception) -> None:
        if self._error is None:
            self._error = error
            if self._transport is not None:
                self._transport.abort()
            self._wake()


class Exchange:
    """One request and its answer. `abort` may be called at any time, from anywhere."""

    __slots__ = ("_aborted", "_connecting", "_connection", "_connections", "_origin")

    def __init__(self, connections: "Connections", origin: str) -> None:
        self._connections = connections
        self._origin = origin
        self._connection: Connection | None = None
        self._connecting: asyncio.Task[Connection] | None = None
        self._aborted = False

    async def send(self, request: bytes) -> int:
        """Sends a whole request and returns its answer's status.

        Raises:
            Unreachable: no connection could be made.
            Broken: it broke, or was aborted, before the answer's head came.
        """
        connection = self._connections.kept(self._origin)
        if connection is None:
            connection = await self._connect()
        self._connection = connection
        connection.send(request)
        return await connection.head()

    async def _connect(self) -> Connection:
        task = self._connecting = asyncio.create_task(self._connections.connect(self._origin))
        try:
            return await task
        except asyncio.CancelledError:
            if task.done() and not task.cancelled() and task.exception() is None:
                task.result().abort()  # it was made in the same moment
            own = asyncio.current_task()
            if self._aborted and own is not None and not own.cancelling():
                raise Broken("given up") from None
            raise
        finally:
            self._connecting = None

    @property
    def answered(self) -> bool:
        """Whether the answer's head came, or its maker no longer waits for it."""
        return self._aborted or (self._connection is not None and self._connection.answered)

    def header(self, name: bytes) -> bytes | None:
        """A header of the answer, by its name in lower case."""
        return None if self._connection is None else self._connection.headers.get(name)

    async def read(self) -> bytes:
        """See `Connection.read`."""
        return b"" if self._connection is None else await self._connection.read()

    def abort(self) -> None:
        """Ends it: whoever waits for it is told."""
        self._aborted = True
        if self._connecting is not None:
            self._connecting.cancel()
        if self._connection is not None:
            self._connection.abort()

    def close(self) -> None:
        """Gives the connection back, if its answer is whole; else ends it."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._connections.give_back(self._origin, connection)


class Connections:
    """Connections to workers by their origin, `http://host:port` or `https://host:port`."""

    def __init__(self, connect_timeout_s: float, secure: Callable[[], Secure]) -> None:
        """`secure`: what a connection is made with, asked each time. Those made with another context are not used."""
        self._connect_timeout = connect_timeout_s
        self._secure = secure
        self._kept: dict[str, deque[Connection]] = {}
        self._sweep: asyncio.TimerHandle | None = None
        self._closed = False

    def exchange(self, origin: str) -> Exchange:
        """For one request."""
        return Exchange(self, origin)

    def kept(self, origin: str) -> Connection | None:
        """One that has been used before, and is idle."""
        idle = self._kept.get(origin)
        context = self._secure().get("ssl")
        while idle:
            connection = idle.pop()
            fresh = connection.idle_since > time.monotonic() - KEPT_S
            if fresh and connection.usable and connection.context is context:
                return connection
            connection.abort()
        return None

    async def connect(self, origin: str) -> Connection:
        """A new one.

        Raises:
            Unreachable: it cannot be made, or not in time.
        """
        parts = urlsplit(origin)
        loop = asyncio.get_running_loop()
        secure = self._secure()
        context, name = secure.get("ssl"), secure.get("server_hostname")
        host, port = parts.hostname or "", parts.port or 80
        try:
            async with asyncio.timeout(self._connect_timeout):
                _, connection = await loop.create_connection(Connection, host, port, ssl=context, server_hostname=name)
        except TimeoutError:
            raise Unreachable(f"no connection within {self._connect_timeout:g} s") from None
        except (OSError, ValueError) as error:
            raise Unreachable(str(error)) from error
        connection.context = context
        return connection

    def give_back(self, origin: str, connection: Connection) -> None:
        """Keeps it for the next request if it can be used again, else ends it."""
        if self._closed or not connection.usable:
            connection.abort()
            return
        connection.idle_since = time.monotonic()
        self._kept.setdefault(origin, deque()).append(connection)
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(KEPT_S, self._sweep_idle)

    def _sweep_idle(self) -> None:
        """Ends what has been idle for too long, whoever's it was: workers come and go."""
        before = time.monotonic() - KEPT_S
        for idle in self._kept.values():
            while idle and (idle[0].idle_since <= before or not idle[0].usable):
                idle.popleft().abort()
        self._kept = {origin: idle for origin, idle in self._kept.items() if idle}
        again = bool(self._kept)
        self._sweep = asyncio.get_running_loop().call_later(KEPT_S, self._sweep_idle) if again else None

    def close(self) -> None:
        """Ends all that are idle, and each other one once its answer is over."""
        self._closed = True
        if self._sweep is not None:
            self._sweep.cancel()
        for idle in self._kept.values():
            for connection in idle:
                connection.abort()
        self._kept.clear()
