"""The proxy that breaks connections breaks them as it says."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
from tests.reliability.proxy import Proxy

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    """A proxy in front of a server that answers each line with itself."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                writer.write(line)
        except (ConnectionError, ValueError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    made = Proxy(server.sockets[0].getsockname()[1])
    await made.start()
    yield made
    await made.stop()
    server.close()
    await server.wait_closed()


async def connect(proxy: Proxy) -> Streams:
    return await asyncio.open_connection("127.0.0.1", int(proxy.url.rpartition(":")[2]))


async def echoed(streams: Streams, word: bytes = b"hello\n", timeout_s: float = 5) -> bytes:
    streams[1].write(word)
    async with asyncio.timeout(timeout_s):
        return await streams[0].readline()


async def test_it_passes_everything_both_ways(proxy: Proxy) -> None:
    streams = await connect(proxy)
    big = b"x" * 60_000 + b"\n"
    for word in (b"a\n", big, b"b\n"):
        assert await echoed(streams, word) == word
    streams[1].write_eof()
    assert await streams[0].read() == b""
    streams[1].close()


async def test_a_cut_is_a_reset_and_new_connections_work(proxy: Proxy) -> None:
    streams = await connect(proxy)
    assert await echoed(streams) == b"hello\n"
    proxy.cut()
    with pytest.raises(ConnectionResetError):
        await echoed(streams)
    again = await connect(proxy)
    assert await echoed(again) == b"hello\n"
    again[1].close()


async def test_swallowed_connections_are_silent_and_new_ones_work(proxy: Proxy) -> None:
    old = await connect(proxy)
    assert await echoed(old) == b"hello\n"
    proxy.swallow()
    with pytest.raises(TimeoutError):
        await echoed(old, timeout_s=0.2)
    new = await connect(proxy)
    assert await echoed(new, b"new\n") == b"new\n"
    proxy.mend()
    assert await asyncio.wait_for(old[0].readline(), 5) == b"hello\n"
    for streams in (old, new):
        streams[1].close()


async def test_connections_that_were_not_in_use_are_left_alone(proxy: Proxy) -> None:
    idle = await connect(proxy)
    assert await echoed(idle) == b"hello\n"
    busy = await connect(proxy)
    assert await echoed(busy) == b"hello\n"
    first, second = sorted(proxy.links, key=lambda link: link.used)
    proxy.swallow((time.monotonic() - first.used + time.monotonic() - second.used) / 2)
    assert await echoed(idle) == b"hello\n"
    with pytest.raises(TimeoutError):
        await echoed(busy, timeout_s=0.2)
    for streams in (idle, busy):
        streams[1].close()


async def test_in_the_dark_new_connections_are_silent_too_until_it_is_mended(proxy: Proxy) -> None:
    proxy.darken()
    streams = await connect(proxy)
    with pytest.raises(TimeoutError):
        await echoed(streams, timeout_s=0.2)
    proxy.mend()
    assert await asyncio.wait_for(streams[0].readline(), 5) == b"hello\n"
    streams[1].close()


async def test_nobody_listening_behind_it_is_a_reset(proxy: Proxy) -> None:
    alone = Proxy(1)
    await alone.start()
    streams = await connect(alone)
    with pytest.raises(ConnectionResetError):
        await echoed(streams)
    await alone.stop()
