"""A uvicorn server that bounds request heads and drains before it stops."""

import asyncio
import contextlib
import ipaddress
import math
import signal
import socket
import ssl
from collections.abc import Awaitable, Callable, Generator
from typing import Any

import msgspec
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from wherry_protocol.http.asgi import App, ClientConnection

MAX_HEAD_BYTES = 64 * 1024
# Longer than clients keep idle connections (aiohttp: 15 s), so that it is never the server that closes under a request.
KEEP_ALIVE_S = 75
_BACKLOG = 2048


class AddressError(Exception):
    """The server cannot listen where it was told to. The message says what to do."""


class _Joined:
    """What of a transport a response needs; all that is written in one turn of the loop goes out in one write.

    A write is the dearest thing that a router does for a token, and each is a packet that the client wakes up for. A
    head goes with its body, and tokens that came together leave together.
    """

    __slots__ = ("_loop", "_parts", "_transport", "is_closing")

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._parts: list[bytes] = []
        self.is_closing = transport.is_closing

    def write(self, data: bytes) -> None:
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._parts:
            data = b"".join(self._parts)
            self._parts.clear()
            self._transport.write(data)


class BoundedHeadProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol, with a cap on request line and headers together, which httptools does not have, with
    fewer writes, and with word of the client's end for `CancelOnDisconnect`."""

    _in_head = True
    _head_bytes = 0
    _client: ClientConnection
    _joined: _Joined

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there."""
        super().connection_made(transport)
        self._client = ClientConnection()
        self._joined = _Joined(transport, self.loop)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        super().connection_lost(exc)
        self._client.ended()

    def data_received(self, data: bytes) -> None:
        """Ends the connection when a head is over the cap."""
        self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(431, "request_head_too_large", f"request line and headers are over {MAX_HEAD_BYTES} bytes")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {ClientConnection.EXTENSION: self._client}  # type: ignore[dict-item]
        self._in_head = True

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()
        self.cycle.transport = self._joined  # type: ignore[assignment]

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head, self._head_bytes = True, 0

    def send_400_response(self, msg: str) -> None:
        """A request that is not HTTP gets a JSON answer like every other one."""
        self._refuse(400, "malformed_http", "this is not a well-formed HTTP/1.1 request")

    def _refuse(self, status: int, code: str, message: str) -> None:
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
        body = msgspec.json.encode({"error": error})
        head = (
            b"HTTP/1.1 %d Refused\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head % (status, len(body)) + body)
        self.transport.close()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Signals are ours: they start a drain, not an end."""
        yield


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to `host` and `port` (0: a free one).

    Raises:
        AddressError: the port is taken, or the host is not an address of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(_BACKLOG)
    except (OSError, OverflowError) as error:
        sock.close()
        reason = getattr(error, "strerror", None) or str(error)
        hint = "choose another with --port" if "in use" in reason else "choose another with --host or --port"
        raise AddressError(f"cannot listen on {host}:{port}: {reason}; {hint}") from None
    sock.setblocking(False)
    return sock


def url_of(sock: socket.socket, scheme: str = "http") -> str:
    """scheme://host:port of a bound socket."""
    host, port = sock.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def covers_loopback(sock: socket.socket) -> bool:
    """Whether `sock` listens on a loopback address, or on all addresses."""
    address = ipaddress.ip_address(sock.getsockname()[0])
    return address.is_loopback or address.is_unspecified


async def serve(
    app: App,
    sockets: list[socket.socket],
    stop: asyncio.Event,
    drain: Callable[[], Awaitable[float | None]],
    tls: ssl.SSLContext | None = None,
) -> None:
    """Serves `app` on `sockets` until `stop` is set, goes on serving while `drain` runs, then closes.

    `drain` returns how many seconds a request that still slipped in gets to finish; what then runs is cancelled.
    With `tls` connections are encrypted.
    """
    options: dict[str, Any] = {"lifespan": "off", "ws": "none", "log_config": None, "access_log": False}
    config = uvicorn.Config(
        app,
        http=BoundedHeadProtocol,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=1,
        backlog=_BACKLOG,
        **options,
    )
    config.load()
    config.ssl = tls
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=sockets))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        left = await drain()
        config.timeout_graceful_shutdown = max(math.ceil(left or 0), 1)
    finally:
        stopping.cancel()
        server.should_exit = True
        await serving


def stop_on_signals(stop: asyncio.Event) -> None:
    """SIGTERM and SIGINT set `stop`; a second SIGINT interrupts at once."""
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, interrupt)


async def drained(in_flight: Callable[[], int], timeout_s: float, grace_s: float = 0.0, quiet_s: float = 0.0) -> bool:
    """Waits until nothing has been in flight for `quiet_s`, at least `grace_s` and at most `timeout_s`.

    False: time ran out with something in flight.
    """
    loop = asyncio.get_running_loop()
    began = busy = loop.time()
    while True:
        now = loop.time()
        if in_flight() > 0:
            busy = now
        elif now - began >= grace_s and now - busy >= quiet_s:
            return True
        if now - began >= timeout_s:
            return in_flight() == 0
        await asyncio.sleep(0.02)
