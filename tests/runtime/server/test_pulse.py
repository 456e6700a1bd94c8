"""Signs of life: in silence, never in the way, never after the end."""

import asyncio

from wherry_protocol.http.asgi import Message
from wherry_protocol.sse import HEARTBEAT, decode_frame
from wherry_runtime.server.pulse import Pulse

TOKEN: Message = {"type": "http.response.body", "body": b"event: token\n\n", "more_body": True}


class Wire:
    """Takes what is sent; `open` cleared: it takes nothing."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.beats = asyncio.Semaphore(0)
        self.open = asyncio.Event()
        self.open.set()

    async def send(self, message: Message) -> None:
        await self.open.wait()
        self.sent.append(message["body"])
        if message["body"] == HEARTBEAT:
            self.beats.release()


async def beats(count: int) -> None:
    """Returns when another answer, which is silent, has had so many signs of life."""
    wire = Wire()
    pulse = Pulse(wire.send)
    await pulse.send(TOKEN)
    for _ in range(count):
        await asyncio.wait_for(wire.beats.acquire(), 5)
    pulse.stop()


async def test_a_silent_answer_gives_signs_of_life_until_it_is_over() -> None:
    wire = Wire()
    pulse = Pulse(wire.send)
    await pulse.send(TOKEN)
    for _ in range(2):
        await asyncio.wait_for(wire.beats.acquire(), 5)
    pulse.stop()
    before = list(wire.sent)
    await beats(2)
    assert wire.sent == before == [TOKEN["body"], HEARTBEAT, HEARTBEAT]


async def test_none_stands_in_line_behind_a_reader_that_is_slow() -> None:
    wire = Wire()
    wire.open.clear()
    pulse = Pulse(wire.send)
    sending = asyncio.create_task(pulse.send(TOKEN))
    await beats(3)
    wire.open.set()
    await sending
    pulse.stop()
    assert wire.sent == [TOKEN["body"]]


def test_it_is_no_event() -> None:
    assert decode_frame(HEARTBEAT.removesuffix(b"\n\n")) is None
