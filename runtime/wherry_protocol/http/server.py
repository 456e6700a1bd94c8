"""A uvicorn server that bounds what clients send and drains before it stops."""

import asyncio
import contextlib
import ipaddress
import math
import signal
import socket
import ssl
from collections.abc import Awaitable, Callable, Generator
from typing import Any

import uvicorn

from wherry_protocol.http.asgi import App
from wherry_protocol.http.bounded import KEEP_ALIVE_S, BoundedProtocol, Bounds

_BACKLOG = 2048


class AddressError(Exception):
    """The server cannot listen where it was told to. The message says what to do."""


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
    bounds: Bounds | None = None,
) -> None:
    """Serves `app` on `sockets` until `stop` is set, goes on serving while `drain` runs, then closes.

    `drain` returns how many seconds a request that still slipped in gets to finish; what then runs is cancelled.
    With `tls` connections are encrypted. `bounds`: of what a client may take.
    """
    protocol = type("Protocol", (BoundedProtocol,), {"bounds": bounds or Bounds()})
    options: dict[str, Any] = {"lifespan": "off", "ws": "none", "log_config": None, "access_log": False}
    config = uvicorn.Config(
        app,
        http=protocol,
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
