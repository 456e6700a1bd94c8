"""A TCP proxy between router and worker that fails as networks do: connections reset, packets that vanish."""

import asyncio
import socket
import struct
import time
from typing import cast

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER that turns close into a reset


class _Side(asyncio.Protocol):
    """One end of a connection. What it receives goes to `other`, unless the link swallows it."""

    def __init__(self, link: "_Link") -> None:
        self.link = link
        self.transport: asyncio.Transport | None = None
        self.other: _Side | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        if self is self.link.client:
            # It reads nothing until there is a server to pass it to.
            self.transport.pause_reading()
            self.link.connect()

    def data_received(self, data: bytes) -> None:
        self.link.used = time.monotonic()
        if self.other is not None and self.other.transport is not None and not self.other.transport.is_closing():
            self.other.transport.write(data)

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, error: Exception | None) -> None:
        if not self.link.silent:
            self.link.close()

    def pause_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None and self.other.transport is not None and not self.link.silent:
            self.other.transport.resume_reading()


class _Link:
    """A connection through the proxy: a client's side and a server's."""

    def __init__(self, proxy: "Proxy") -> None:
        self._proxy = proxy
        self.client = _Side(self)
        self.server = _Side(self)
        self.client.other, self.server.other = self.server, self.client
        self.silent = False
        self.used = time.monotonic()

    def connect(self) -> None:
        """The client is there; now for the server."""
        self._proxy.connect(self)

    def sides(self) -> list[asyncio.Transport]:
        return [side.transport for side in (self.client, self.server) if side.transport is not None]

    def close(self) -> None:
        self._proxy.links.discard(self)
        for transport in self.sides():
            transport.close()

    def reset(self) -> None:
        """Both ends get a reset."""
        self._proxy.links.discard(self)
        for transport in self.sides():
            sock = transport.get_extra_info("socket")
            if sock is not None and not transport.is_closing():
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            transport.abort()

    def silence(self) -> None:
        """From now on nothing passes, not even the end of the connection, and neither end is told."""
        self.silent = True
        for transport in self.sides():
            if not transport.is_closing():
                transport.pause_reading()

    def speak(self) -> None:
        """What was held back goes on, as after lost packets are sent again."""
        self.silent = False
        if len(self.sides()) < 2:
            return  # its other half is still being made
        for transport in self.sides():
            if transport.is_closing():
                self.close()
                return
            transport.resume_reading()


class Proxy:
    """Listens on `url`, passes everything to `port` of 127.0.0.1."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._server: asyncio.Server | None = None
        self._dark = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.links: set[_Link] = set()
        self.url = ""

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._accepted, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def _accepted(self) -> _Side:
        link = _Link(self)
        self.links.add(link)
        return link.client

    def connect(self, link: _Link) -> None:
        """Makes the link's other half."""
        task = asyncio.get_running_loop().create_task(self._connect(link))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, link: _Link) -> None:
        try:
            await asyncio.get_running_loop().create_connection(lambda: link.server, "127.0.0.1", self._port)
        except OSError:
            link.reset()
            return
        if any(transport.is_closing() for transport in link.sides()):
            link.close()
        elif self._dark or link.silent:
            link.silence()
        else:
            link.sides()[0].resume_reading()

    def cut(self) -> None:
        """Resets every connection."""
        for link in list(self.links):
            link.reset()

    def swallow(self, in_use_s: float = float("inf")) -> None:
        """Silences the connections that carried something in the last `in_use_s`; others and new ones work, as where a
        firewall forgot some flows."""
        since = time.monotonic() - in_use_s
        for link in self.links:
            if link.used >= since:
                link.silence()

    def darken(self) -> None:
        """Silences every connection, new ones too, as where a network is partitioned."""
        self._dark = True
        self.swallow()

    def mend(self) -> None:
        """Everything passes again, what was held back first."""
        self._dark = False
        for link in list(self.links):
            if link.silent:
                link.speak()

    async def stop(self) -> None:
        """Closes everything."""
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.cut()
        if self._server is not None:
            await self._server.wait_closed()
