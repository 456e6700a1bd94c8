"""uvicorn's HTTP/1.1 protocol with bounds on what a client sends beside its bodies, and on how long it takes for it."""

import asyncio
from typing import NamedTuple

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from wherry_protocol.http.asgi import ClientConnection
from wherry_protocol.http.joined import Joined


class Bounds(NamedTuple):
    """What a client may take. `max_connections`: at once; 0: no bound."""

    head_timeout_s: float = 30.0  # for a request's line and headers to arrive
    unread_timeout_s: float = 300.0  # for a client to take what waits for it
    max_connections: int = 0


# Of one request: its line, headers, trailers, and what its chunks say beside their bytes.
MAX_HEAD_BYTES = 64 * 1024
# Longer than clients keep idle connections (aiohttp: 15 s), so that it is never the server that closes under a request.
KEEP_ALIVE_S = 75
# For so long the rest of a request is read that has its answer already, so that its client gets to see that.
LINGER_S = 2.0
# What one chunk may say beside its bytes for nothing: its size and two line ends.
_FRAME_BYTES = 32


class BoundedProtocol(HttpToolsProtocol):
    """Refuses with 431 what is over `MAX_HEAD_BYTES`, with 408 a head that is not whole in time, with 503 a connection
    too many, and cuts who does not read its answer.

    llhttp and httptools have no such bounds: trailers would be kept as they come, for as long as they come. What it
    writes is joined, and the app is told when the client goes.
    """

    bounds = Bounds()
    _in_head = True
    _beside = 0  # bytes of the request that are none of its body
    _timer: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _client: ClientConnection
    _joined: Joined

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client that never says anything holds a connection no longer than one that says it slowly."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self._client = ClientConnection()
        self._joined = Joined(self.transport, self.loop)
        self._arm(self.bounds.head_timeout_s)
        if 0 < self.bounds.max_connections < len(self.connections):
            self._refuse(503, "too_many_connections", "the server has as many connections as it may have")

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        if self._unread is not None:
            self._unread.cancel()
        super().connection_lost(exc)
        self._client.ended()

    def pause_writing(self) -> None:
        """The client is slow. One that takes nothing at all is not waited for: its request holds a place."""
        super().pause_writing()
        self._unread = self.loop.call_later(self.bounds.unread_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """It has read."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()

    def shutdown(self) -> None:
        """No further request; what is written is not lost."""
        self._joined.flush()
        super().shutdown()

    def data_received(self, data: bytes) -> None:
        """Ends the connection when a request is over the cap; notes when its head begins."""
        self._beside += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._beside > MAX_HEAD_BYTES:
            self._refuse(431, "request_head_too_large", f"request line and headers are over {MAX_HEAD_BYTES} bytes")
        elif self._in_head and self._timer is None:
            if self._beside:
                self._arm(self.bounds.head_timeout_s)
            elif self.cycle.response_complete:
                # Its answer came before its end did, so uvicorn no longer waits for the next one.
                self._arm(KEEP_ALIVE_S)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {ClientConnection.EXTENSION: self._client}  # type: ignore[dict-item]

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._disarm()
        super().on_headers_complete()
        self.cycle.transport = self._joined  # type: ignore[assignment]

    def on_body(self, body: bytes) -> None:
        self._beside -= len(body) + _FRAME_BYTES
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        if not self.pipeline:
            # uvicorn leaves it paused where a body's last piece was large, and nobody would see the client go.
            self.flow.resume_reading()
        self._in_head, self._beside = True, 0
        self._disarm()

    def on_response_complete(self) -> None:
        self._joined.flush()  # nothing more comes that could go with it
        super().on_response_complete()
        if not self._in_head and self.cycle.response_complete and not self.transport.is_closing():
            self._arm(LINGER_S)

    def send_400_response(self, msg: str) -> None:
        """A request that is not HTTP gets a JSON answer like every other one."""
        self._refuse(400, "malformed_http", "this is not a well-formed HTTP/1.1 request")

    def _arm(self, seconds: float) -> None:
        self._disarm()
        self._timer = self.loop.call_later(seconds, self._late)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        if self._answering() and self._in_head:
            self._arm(self.bounds.head_timeout_s)  # the answer before is not to be cut
        elif self._in_head and self._beside:
            self._refuse(
                408, "timeout", f"the request's headers did not arrive within {self.bounds.head_timeout_s:g} s"
            )
        else:
            self._joined.close()

    def _answering(self) -> bool:
        """Whether an answer is being written, or about to be."""
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, status: int, code: str, message: str) -> None:
        # Nothing may be written into an answer that has begun.
        if not self._answering() or not (self._in_head or self.cycle.response_started):
            error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
            body = msgspec.json.encode({"error": error})
            head = (
                b"HTTP/1.1 %d Refused\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
                b"connection: close\r\n\r\n"
            )
            self._joined.write(head % (status, len(body)) + body)
        self._joined.close()
