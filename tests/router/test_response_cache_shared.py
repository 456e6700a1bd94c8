"""Answers that several routers keep in a real Redis: its bounds, what is to be seen there, and what holds while it dies
or freezes."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from tests.router.harness import Mock, Process, chat, eventually, mock_worker, post, router, script
from tests.router.redis_server import Server

from wherry_router.response_cache.circuit import Circuit
from wherry_router.response_cache.memory import OVERHEAD
from wherry_router.response_cache.seal import Seal
from wherry_router.response_cache.shared import LARGEST, TIMEOUT_S, RedisStore

SECRET = "worker-token-0123456789"
SEALED = 32  # bytes that a seal adds
ENTRY = OVERHEAD + SEALED + 100


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


class Kept:
    """Two routers' stores over one Redis."""

    def __init__(self, server: Server, room: int = 4 * ENTRY, ttl_s: float = 60, secret: str = SECRET) -> None:
        server.client.flushall()
        self.stores = [RedisStore(server.url, "w", room, ttl_s, Seal(secret), time.monotonic) for _ in range(2)]

    async def put(self, name: str, size: int = 100, by: int = 0) -> None:
        """`a1`: the answer 1 of tenant a."""
        self.stores[by].put(name[0], name.encode(), name.encode().ljust(size))
        await asyncio.gather(*self.stores[by]._tasks)

    async def has(self, name: str, by: int = 1) -> bool:
        value = await self.stores[by].get(name[0], name.encode())
        assert value is None or value.strip() == name.encode()
        return value is not None

    async def close(self) -> None:
        for store in self.stores:
            await store.close()


@pytest.fixture
async def kept(server: Server) -> AsyncIterator[Kept]:
    kept = Kept(server)
    yield kept
    await kept.close()


@pytest.mark.parametrize(
    "puts, left",
    [
        ("a1 a2 a3 a4 a5", "a2 a3 a4 a5"),
        ("a1 b1 b2 b3 b4", "a1 b2 b3 b4"),
        ("a1 a2 a3 a4 b1 c1 d1", "a4 b1 c1 d1"),
        ("a1 a2 a3 a4 b1 b2 b3", "a3 a4 b2 b3"),
        ("a1 a2 a3 ?a1 a4 a5", "a1 a3 a4 a5"),
        ("a1 a1 a1 a1 a1 a2", "a1 a2"),
    ],
)
async def test_who_takes_the_most_gives_way_in_redis_too(kept: Kept, puts: str, left: str) -> None:
    seen = set()
    for turn, name in enumerate(puts.split()):
        await asyncio.sleep(0.002)  # Redis' clock counts milliseconds
        if name.startswith("?"):
            assert await kept.has(name[1:])
        else:
            await kept.put(name, by=turn % 2)
            seen.add(name)
    assert {name for name in seen if await kept.has(name)} == set(left.split())
    assert max(store.used for store in kept.stores) <= 4 * ENTRY


async def test_what_takes_more_than_all_is_not_kept(kept: Kept) -> None:
    await kept.put("a1")
    await kept.put("b1", size=5 * ENTRY)
    assert not await kept.has("b1")


async def test_what_takes_too_long_to_send_is_not_kept(server: Server) -> None:
    kept = Kept(server, room=10 * LARGEST)
    await kept.put("a1", size=LARGEST + 1)
    assert not await kept.has("a1")
    await kept.put("a1", size=LARGEST)
    assert await kept.has("a1")
    await kept.close()


async def test_answers_end_with_their_time_and_leave_nothing(server: Server) -> None:
    kept = Kept(server, ttl_s=0.2)
    await kept.put("a1")
    assert await kept.has("a1")
    eventually(lambda: not server.client.keys("*"))
    assert not await kept.has("a1")
    await kept.close()


@pytest.mark.parametrize("lost", ["order", "sizes", "tenants", "bytes"])
async def test_what_redis_itself_evicts_is_put_right(kept: Kept, server: Server, lost: str) -> None:
    for n in range(3):
        await kept.put(f"a{n}")
    for key in server.client.keys(f"*:{lost}*"):
        server.client.delete(key)
    for n in range(40):
        await asyncio.sleep(0.002)
        await kept.put(f"b{n}")
    assert await kept.has("b39")
    assert kept.stores[0].used <= 4 * ENTRY
    # Answers that nobody counts any more are there until their time is over.
    assert len(server.client.keys("*:answer:*")) <= 4 + 3


async def test_nothing_in_redis_can_be_read_forged_or_exchanged(kept: Kept, server: Server) -> None:
    await kept.put("a1")
    [answer] = server.client.keys("*:answer:*")
    everything = b" ".join(server.client.keys("*")) + server.client.get(answer)
    assert b"a1    " not in everything
    other = Seal("another secret")
    assert other.open(b"a1", server.client.get(answer)) is None
    assert Seal(SECRET).open(b"a2", server.client.get(answer)) is None
    server.client.set(answer, other.close(b"a1", b"forged"))
    assert not await kept.has("a1")
    server.client.set(answer, b"short")
    assert not await kept.has("a1")


@pytest.mark.parametrize("fault", [signal.SIGSTOP, signal.SIGKILL])
async def test_without_redis_nothing_is_found_and_one_request_waits_at_most(
    kept: Kept, server: Server, fault: signal.Signals
) -> None:
    await kept.put("a1")
    store = kept.stores[0]
    running = asyncio.create_task(store.run())
    server.process.send_signal(fault)
    try:
        began = time.monotonic()
        found = await asyncio.gather(*(store.get("a", b"a1") for _ in range(200)))
        took = time.monotonic() - began
        assert found == [None] * 200
        assert store.lost
        assert took < TIMEOUT_S + 1
        began = time.monotonic()
        for _ in range(500):
            assert await store.get("a", b"a1") is None
            store.put("a", b"a2", b"x")
        assert time.monotonic() - began < TIMEOUT_S
        assert not store._tasks
    finally:
        if fault == signal.SIGKILL:
            server.kill()
            server.start()
        else:
            server.process.send_signal(signal.SIGCONT)
    await asyncio.to_thread(eventually, lambda: not store.lost)
    running.cancel()
    await kept.put("a3")
    assert await kept.has("a3", by=0)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    "failures, story",
    [
        # f: a failure, s: an answer, a number: seconds pass, o/c: it is open/closed now, d/n: a probe is due or not
        (1, "c f o n 0.4 n 0.2 d n 0.9 n 0.2 d f o 1.9 n 0.2 d s c"),
        (3, "f f c s f f c f o 0.6 d s c n f c"),
        (1, "f 0.6 d 1 d 2 d 4 d 8 d 10 d 9.9 n 0.2 d"),
    ],
)
def test_a_circuit_opens_and_asks_again(failures: int, story: str) -> None:
    clock = Clock()
    circuit = Circuit(failures, clock)
    for word in story.split():
        if word in "oc":
            assert circuit.open is (word == "o"), story
        elif word in "dn":
            assert circuit.due() is (word == "d"), (story, clock.now)
        elif word == "f":
            circuit.failed()
        elif word == "s":
            circuit.succeeded()
        else:
            clock.now += float(word)


class Fronts(NamedTuple):
    routers: tuple[Process, Process]
    mock: Mock
    redis: Server


KEYS = {name: f"wk-{name}-{'x' * 32}" for name in ("one", "two")}


@pytest.fixture(scope="module")
def fronts(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Iterator[Fronts]:
    folder: Path = tmp_path_factory.mktemp("keys")
    for name, key in KEYS.items():
        (folder / name).write_text(key)
    with ExitStack() as stack:
        mock = stack.enter_context(mock_worker("a", "--token", SECRET))
        args = ("--response-cache-bytes", "1048576", "--api-keys", str(folder))
        env = {"WHERRY_WORKER_TOKEN": SECRET, "WHERRY_RESPONSE_CACHE_REDIS_URL": server.url}
        one, two = (stack.enter_context(router(mock.url, args=args, env=env)) for _ in range(2))
        yield Fronts((one, two), mock, server)


def ask(process: Process, text: str, tenant: str = "one", **more: object) -> httpx.Response:
    headers = {"authorization": f"Bearer {KEYS[tenant]}"}
    response = post(process.url, chat(script(tokens=3, text=text), temperature=0, **more), headers=headers)
    assert response.status_code == 200
    return response


def result(response: httpx.Response) -> str:
    return response.headers["x-wherry-cache"]


def test_one_router_tells_what_another_has_kept_to_the_same_tenant(fronts: Fronts) -> None:
    one, two = fronts.routers
    first = ask(one, "shared ")
    assert result(first) == "miss"
    eventually(lambda: result(ask(two, "shared ")) == "hit")
    executed = fronts.mock.state()["executed"]
    for process in fronts.routers:
        again = ask(process, "shared ")
        assert (result(again), again.json()["choices"]) == ("hit", first.json()["choices"])
        assert "shared" in ask(process, "shared ", stream=True).text
    assert fronts.mock.state()["executed"] == executed
    assert result(ask(two, "shared ", "two")) == "miss"


def test_neither_prompts_nor_answers_nor_tenants_are_to_be_seen_in_redis(fronts: Fronts) -> None:
    client = fronts.redis.client
    ask(fronts.routers[0], "xylophone ")
    eventually(lambda: result(ask(fronts.routers[1], "xylophone ")) == "hit")
    found = b""
    for key in client.keys("*"):
        found += key + (client.dump(key) or b"")
        if client.type(key) == b"string":
            found += client.get(key)
    assert found
    for secret in (b"xylophone", b"one", KEYS["one"].encode(), SECRET.encode()):
        assert secret not in found.replace(b"answers:chat", b"")


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_redis_costs_hits_and_nothing_else(fronts: Fronts, fault: signal.Signals) -> None:
    one, redis = fronts.routers[0], fronts.redis
    text = f"lost by {fault.name} "
    ask(one, text)
    eventually(lambda: result(ask(one, text)) == "hit")
    redis.process.send_signal(fault)
    try:
        responses = [ask(one, text) for _ in range(20)]
        slowest, *others = sorted((r.elapsed.total_seconds() for r in responses), reverse=True)
        assert {result(r) for r in responses} == {"miss"}
        # One may have waited; probes are nobody's.
        assert slowest < TIMEOUT_S + 1
        assert max(others) < TIMEOUT_S
        assert 'wherry_router_response_cache_up{what="redis"} 0.0' in httpx.get(one.url + "/metrics").text
    finally:
        if fault == signal.SIGKILL:
            redis.kill()
            redis.start()
        else:
            redis.process.send_signal(signal.SIGCONT)
    eventually(lambda: 'cache_up{what="redis"} 1.0' in httpx.get(one.url + "/metrics").text)
    eventually(lambda: result(ask(one, text)) == "hit")
    assert one.messages("Redis is lost; no answer is found or kept")
    assert redis.url not in one.log()
