"""Writes of one turn of the event loop, put together."""

import asyncio

_MOST = 2**14


class Joined:
    """What of a transport an HTTP response needs; all that is written in one turn of the loop goes out in one write.

    A write is the dearest thing that a router does for a token, and each is a packet that the client wakes up for. A
    head goes with its body, and tokens that came together leave together. More than 16 KiB go at once, so that who
    writes is told when the other side is slow.
    """

    __slots__ = ("_loop", "_parts", "_size", "_transport", "is_closing")

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._parts: list[bytes] = []
        self._size = 0
        self.is_closing = transport.is_closing

    def write(self, data: bytes) -> None:
        """Soon."""
        if not self._parts:
            self._loop.call_soon(self.flush)
        self._parts.append(data)
        self._size += len(data)
        if self._size > _MOST:
            self.flush()

    def flush(self) -> None:
        """Now."""
        if self._parts:
            data = b"".join(self._parts)
            self._parts.clear()
            self._size = 0
            self._transport.write(data)

    def close(self) -> None:
        """Closes the transport once all is written."""
        self.flush()
        self._transport.close()
