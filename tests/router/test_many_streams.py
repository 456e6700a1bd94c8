"""More streams at a time than other routers bore, again and again: all whole, and nothing is left of them."""

import asyncio
import json
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from tests.router.harness import Process, chat, eventually, mock_worker, router, script, text_of

STREAMS = 1200
TOKENS = 3
PAUSE_S = 1.0


@pytest.fixture(scope="module")
def front() -> Iterator[Process]:
    with mock_worker("a", "--max-running", "5000") as mock, router(mock.url, args=("--max-per-replica", "5000")) as one:
        yield one


async def stream(url: str, number: int) -> str:
    """One stream over a connection of its own; its text."""
    address = urlsplit(url)
    body = json.dumps(chat(script(tokens=TOKENS, pause_s=PAUSE_S, text=f"{number} "), stream=True)).encode()
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    got = await reader.read(-1)
    writer.close()
    events = [line.removeprefix(b"data: ").strip() for line in got.split(b"\n") if line.startswith(b"data: ")]
    assert events[-1:] == [b"[DONE]"], (number, got[-300:])
    return text_of([json.loads(event) for event in events[:-1]])


def in_flight(url: str) -> float:
    text = httpx.get(url + "/metrics", timeout=30).text
    return float(text.partition("\nwherry_router_requests_in_flight ")[2].split()[0])


async def play(url: str) -> float:
    """The most streams that ran at a time."""
    streams = asyncio.gather(*(stream(url, number) for number in range(STREAMS)))
    most = 0.0
    while not streams.done():
        most = max(most, await asyncio.to_thread(in_flight, url))
        await asyncio.sleep(0.1)
    assert await streams == [f"{number} " * TOKENS for number in range(STREAMS)]
    return most


async def test_more_than_a_thousand_streams_at_a_time_are_whole_and_leave_nothing(front: Process) -> None:
    process = psutil.Process(front.popen.pid)
    most, memory, files = [], [], []
    for _ in range(2):
        most.append(await play(front.url))
        eventually(lambda: in_flight(front.url) == 0)
        memory.append(process.memory_info().rss)
        files.append(process.num_fds())
    assert max(most) > 1000
    assert memory[1] < 300e6
    assert memory[1] - memory[0] < 10e6, memory
    assert files[1] - files[0] < 50, files
