"""The router's HTTP client: answers cut anywhere, connections that end in any state."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from wherry_router import connections
from wherry_router.connections import Broken, Connections, Exchange, Unreachable
from wherry_router.worker_tls import PLAIN

REQUEST = b"POST /execute HTTP/1.1\r\nhost: w\r\ncontent-length: 2\r\n\r\n{}"
HEAD = b"HTTP/1.1 200 OK\r\nX-Kind: a\r\n"
LENGTH = HEAD + b"content-length: 5\r\n\r\nhello"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"
INTERIM = b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n"
CLOSE = HEAD + b"connection: close\r\ncontent-length: 5\r\n\r\nhello"

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Server:
    """A worker that answers as it is told. `requests` and `connections` count what came."""

    def __init__(self) -> None:
        self.origin = ""
        self.requests = self.connections = 0
        self.answer: Handler = self.says(LENGTH)
        self.writers: list[asyncio.StreamWriter] = []

    @staticmethod
    def says(data: bytes, *, size: int = 1 << 20, end: bool = False) -> Handler:
        """`data`, in pieces of `size`; with `end` it then closes."""

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            for start in range(0, len(data), size):
                writer.write(data[start : start + size])
                await writer.drain()
                if size < 100:
                    await asyncio.sleep(0)
            if end:
                writer.close()

        return answer

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.append(writer)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while not writer.is_closing():
                await reader.readuntil(b"{}")
                self.requests += 1
                await self.answer(reader, writer)
        writer.close()


@contextlib.asynccontextmanager
async def worker(connect_timeout_s: float = 2.0) -> AsyncIterator[tuple[Server, Connections]]:
    server, client = Server(), Connections(connect_timeout_s, lambda: PLAIN)
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    server.origin = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    try:
        yield server, client
    finally:
        client.close()
        listener.close()
        for writer in server.writers:
            writer.close()


async def whole(exchange: Exchange) -> tuple[int, bytes]:
    """Sends the request; the answer's status and body."""
    try:
        status = await asyncio.wait_for(exchange.send(REQUEST), 5)
        body = b""
        while data := await asyncio.wait_for(exchange.read(), 5):
            body += data
        return status, body
    finally:
        exchange.close()


async def until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not what():  # noqa: ASYNC110 - of what sockets do there is no event
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
@pytest.mark.parametrize("answer", [LENGTH, CHUNKED, INTERIM + LENGTH, INTERIM + CHUNKED], ids=range(4))
async def test_an_answer_is_the_same_however_it_is_cut(answer: bytes, size: int) -> None:
    async with worker() as (server, client):
        server.answer = server.says(answer, size=size)
        for _ in range(3):
            exchange = client.exchange(server.origin)
            assert await exchange.send(REQUEST) == 200
            assert exchange.header(b"x-kind") == b"a"
            assert exchange.header(b"link") is None
            body = b""
            while data := await exchange.read():
                body += data
            exchange.close()
            assert body == b"hello"
        assert (server.requests, server.connections) == (3, 1), "the connection is kept"


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"", "closed the connection"),
        (HEAD, "closed the connection"),
        (CHUNKED[:-3], "closed the connection"),
        (LENGTH[:-1], "closed the connection"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "not HTTP"),
        (HEAD + b"transfer-encoding: chunked\r\n\r\nnonsense\r\n", "not HTTP"),
        (b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 20_000, "headers of over"),
    ],
    ids=["nothing", "in the head", "in a chunk", "in the body", "another protocol", "in a size", "endless head"],
)
async def test_what_is_no_whole_answer_breaks(answer: bytes, says: str) -> None:
    async with worker() as (server, client):
        server.answer = server.says(answer, end=True)
        with pytest.raises(Broken, match=says):
            await whole(client.exchange(server.origin))
        server.answer = server.says(LENGTH)
        assert await whole(client.exchange(server.origin)) == (200, b"hello"), "another connection is made"


async def test_a_connection_is_not_used_again_once_either_side_is_done_with_it() -> None:
    async with worker() as (server, client):
        server.answer = server.says(CLOSE)
        assert await whole(client.exchange(server.origin)) == (200, b"hello")
        server.answer = server.says(LENGTH, end=True)  # says that it keeps it, and does not
        assert await whole(client.exchange(server.origin)) == (200, b"hello")
        assert server.connections == 2
        await until(lambda: not any(kept.usable for kept in client._kept.get(server.origin, ())))
        server.answer = server.says(LENGTH + b"HTTP/1.1 408 Late\r\ncontent-length: 0\r\n\r\n")  # of no request
        with contextlib.suppress(Broken):
            await whole(client.exchange(server.origin))
        server.answer = server.says(LENGTH)
        assert await whole(client.exchange(server.origin)) == (200, b"hello")
        assert server.connections == 4


async def test_an_answer_that_is_left_early_takes_its_connection_along() -> None:
    async with worker() as (server, client):
        server.answer = server.says(HEAD + b"content-length: 9\r\n\r\nhello")
        exchange = client.exchange(server.origin)
        await exchange.send(REQUEST)
        assert await exchange.read() == b"hello"
        exchange.close()
        server.answer = server.says(LENGTH)
        assert await whole(client.exchange(server.origin)) == (200, b"hello")
        assert server.connections == 2


async def test_what_nobody_reads_holds_the_worker_back() -> None:
    size = 64 << 20
    sent = 0

    async def much(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(HEAD + b"content-length: %d\r\n\r\n" % size)
        while sent < size:
            writer.write(b"x" * 65536)
            await writer.drain()
            sent += 65536

    async with worker() as (server, client):
        server.answer = much
        exchange = client.exchange(server.origin)
        await exchange.send(REQUEST)
        before = -1
        while before != sent:  # until the worker stands still
            before = sent
            await asyncio.sleep(0.2)
        assert sent < size / 2
        total = 0
        while data := await exchange.read():
            total += len(data)
        assert total == size
        exchange.close()


@pytest.mark.parametrize("when", ["head", "body"])
async def test_given_up_while_somebody_waits(when: str) -> None:
    async with worker() as (server, client):
        server.answer = server.says(b"" if when == "head" else HEAD + b"content-length: 9\r\n\r\nhello")
        exchange = client.exchange(server.origin)
        asking = asyncio.create_task(whole(exchange))
        await until(lambda: server.requests == 1)
        asyncio.get_running_loop().call_later(0.05, exchange.abort)
        with pytest.raises(Broken, match="given up"):
            await asking


@contextlib.asynccontextmanager
async def deaf() -> AsyncIterator[str]:
    """The origin of something that takes no connection, and does not refuse it either: its backlog is full."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=0)
    host, port = listener.getsockname()
    taken = []
    with contextlib.suppress(TimeoutError):
        for _ in range(8):
            async with asyncio.timeout(0.2):
                taken.append(await asyncio.open_connection(host, port))
    try:
        yield f"http://{host}:{port}"
    finally:
        listener.close()
        for _, writer in taken:
            writer.close()


async def test_given_up_while_it_connects() -> None:
    async with deaf() as origin:
        client = Connections(5.0, lambda: PLAIN)
        exchange = client.exchange(origin)
        asking = asyncio.create_task(whole(exchange))
        asyncio.get_running_loop().call_later(0.05, exchange.abort)
        with pytest.raises(Broken, match="given up"):
            await asking
        cancelled = asyncio.create_task(whole(client.exchange(origin)))
        asyncio.get_running_loop().call_later(0.05, cancelled.cancel)
        with pytest.raises(asyncio.CancelledError):
            await cancelled


async def test_a_worker_that_cannot_be_reached() -> None:
    async with deaf() as origin:
        with pytest.raises(Unreachable, match=r"no connection within 0\.1 s"):
            await whole(Connections(0.1, lambda: PLAIN).exchange(origin))
    async with worker() as (server, client):
        origin = server.origin
    with pytest.raises(Unreachable, match=r"refused|Connect call failed"):
        await whole(client.exchange(origin))


async def test_idle_connections_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "KEPT_S", 0.05)
    async with worker() as (server, client):
        await asyncio.gather(*(whole(client.exchange(server.origin)) for _ in range(4)))
        assert server.connections == 4
        await until(lambda: all(writer.is_closing() for writer in server.writers))
        assert not client._kept
        assert await whole(client.exchange(server.origin)) == (200, b"hello")
