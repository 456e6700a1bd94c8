"""Signs of life in an answer that pauses: who waits for the next event learns that worker and connection are there."""

import asyncio
import time

from wherry_protocol.http.asgi import Message, Send
from wherry_protocol.sse import HEARTBEAT, HEARTBEAT_S


class Pulse:
    """Passes messages on to `send`, and sends a comment where there was none for `HEARTBEAT_S`.

    The first message is the response's start; signs of life follow it. A message only notes the time, so that a token
    costs no timer.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._last = time.monotonic()
        self._sending = 0
        self._over = False
        self._beat: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def begun(self) -> bool:
        """Whether the response has started: its status cannot change any more."""
        return self._timer is not None

    async def send(self, message: Message) -> None:
        """Sends it; waits while the reader is slow, and no sign of life stands in line behind it."""
        if self._timer is None:
            self._timer = self._loop.call_later(HEARTBEAT_S, self._tick)
        self._sending += 1
        try:
            await self._send(message)
        finally:
            self._sending -= 1
            self._last = time.monotonic()

    def stop(self) -> None:
        """The answer is over: nothing more is sent from here on."""
        self._over = True
        if self._timer is not None:
            self._timer.cancel()
        if self._beat is not None:
            self._beat.cancel()

    def _tick(self) -> None:
        left = self._last + HEARTBEAT_S - time.monotonic()
        if left <= 0 and not self._sending:
            self._beat = self._loop.create_task(self._tell())
        self._timer = self._loop.call_later(left if left > 0 else HEARTBEAT_S, self._tick)

    async def _tell(self) -> None:
        if not self._over:
            await self.send({"type": "http.response.body", "body": HEARTBEAT, "more_body": True})
