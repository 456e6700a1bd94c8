"""What is counted, and how: the same stories in memory and in a real Redis, then what only one of them has."""

import argparse
import asyncio
import contextlib
import inspect
import signal
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry
from tests.router.harness import eventually
from tests.router.redis_server import Server

from wherry_protocol.openai.errors import ApiError
from wherry_protocol.openai.requests import ChatCompletionRequest, CompletionRequest, parse
from wherry_protocol.worker import End, Started, Token
from wherry_router.caller import ANYBODY, Caller, LimitSet
from wherry_router.limits import shared as shared_module
from wherry_router.limits.bounds import Bound, Outcome, Rules, share
from wherry_router.limits.estimate import Estimate, PromptScale
from wherry_router.limits.flags import parse_limits
from wherry_router.limits.limiter import Limiter
from wherry_router.limits.local import LocalStore
from wherry_router.limits.shared import SharedStore
from wherry_router.limits.usage import MAX_LABELS, OTHER, Usage


def limits(requests: int = 0, tokens: int = 0, concurrent: int = 0) -> LimitSet:
    return LimitSet(requests_per_minute=requests, tokens_per_minute=tokens, concurrent=concurrent)


def bound(name: str = "a", **given: int) -> Bound:
    return Bound("key", name, limits(**given))


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


class Stories:
    """One store, whatever it counts in."""

    def __init__(self, store: Any) -> None:
        self.store = store

    async def reserve(self, name: str, *bounds: Bound, tokens: int = 10) -> Outcome:
        found = self.store.reserve(name, bounds, tokens)
        return await found if inspect.isawaitable(found) else found

    async def granted(self, name: str, *bounds: Bound, tokens: int = 10) -> bool:
        return (await self.reserve(name, *bounds, tokens=tokens)).refused < 0

    async def settle(self, name: str, tokens: int) -> None:
        self.store.settle(name, tokens)
        await self.arrived()

    async def add(self, name: str, tokens: int) -> None:
        self.store.add(name, tokens)
        await self.arrived()

    async def arrived(self) -> None:
        await asyncio.gather(*getattr(self.store, "_tasks", ()))


@pytest.fixture(params=["memory", "redis"])
async def stories(request: pytest.FixtureRequest) -> AsyncIterator[Stories]:
    if request.param == "memory":
        yield Stories(LocalStore())
        return
    server: Server = request.getfixturevalue("server")
    server.client.flushall()
    store = SharedStore(server.url, "wherry:test", "closed", LocalStore())
    yield Stories(store)
    await store.close()


async def test_requests_are_counted_to_the_limit_and_not_beyond(stories: Stories) -> None:
    held = bound(requests=3)
    assert [await stories.granted(f"r{n}", held) for n in range(5)] == [True] * 3 + [False] * 2
    outcome = await stories.reserve("r9", held)
    assert (outcome.refused, outcome.what) == (0, "requests")
    assert 59 <= outcome.wait_s <= 61
    await stories.settle("r0", 1)
    assert not await stories.granted("r10", held), "a request that has ended was a request all the same"


async def test_tokens_are_reserved_and_settled(stories: Stories) -> None:
    held = bound(tokens=100)
    assert await stories.granted("a", held, tokens=60)
    assert not await stories.granted("b", held, tokens=41)
    assert await stories.granted("c", held, tokens=40)
    await stories.settle("a", 20)
    assert not await stories.granted("d", held, tokens=41)
    assert await stories.granted("e", held, tokens=40)
    await stories.settle("c", 90)
    assert (await stories.reserve("f", held, tokens=1)).standings[0].tokens == 20 + 90 + 40


async def test_what_is_taken_beyond_the_reservation_counts_at_once(stories: Stories) -> None:
    held = bound(tokens=100)
    assert await stories.granted("a", held, tokens=50)
    await stories.add("a", 40)
    assert not await stories.granted("b", held, tokens=20)
    await stories.settle("a", 80)
    assert await stories.granted("b", held, tokens=20)
    await stories.settle("a", 0)
    assert not await stories.granted("c", held, tokens=1), "settled once is settled"


async def test_a_request_that_is_larger_than_the_limit_takes_all_of_it(stories: Stories) -> None:
    held = bound(tokens=100)
    assert await stories.granted("a", held, tokens=10)
    assert not await stories.granted("b", held, tokens=1000)
    await stories.settle("a", 0)
    assert await stories.granted("b", held, tokens=1000)
    assert not await stories.granted("c", held, tokens=1)


async def test_places_are_free_again_when_a_request_ends(stories: Stories) -> None:
    held = bound(concurrent=2)
    assert [await stories.granted(name, held) for name in "abc"] == [True, True, False]
    outcome = await stories.reserve("c", held)
    assert (outcome.what, outcome.wait_s) == ("concurrent", 1)
    await stories.settle("a", 0)
    assert await stories.granted("c", held)


async def test_what_one_bound_refuses_no_other_counts(stories: Stories) -> None:
    mine, ours = bound("mine", requests=10), bound("ours", requests=1)
    assert await stories.granted("a", mine, ours)
    for _ in range(5):
        outcome = await stories.reserve("b", mine, ours)
        assert (outcome.refused, outcome.what) == (1, "requests")
    assert outcome.standings[0].requests == 1
    assert await stories.granted("c", mine)


async def test_of_several_reasons_the_longest_is_told(stories: Stories) -> None:
    held = bound(requests=1, concurrent=1)
    assert await stories.granted("a", held)
    assert (await stories.reserve("b", held)).what == "requests"


async def test_at_the_same_time_no_more_get_in(stories: Stories) -> None:
    held = bound(requests=20, tokens=300)
    results = await asyncio.gather(*(stories.granted(f"r{n}", held, tokens=20) for n in range(60)))
    assert sum(results) == 15


def test_a_request_counts_for_60_seconds_wherever_in_a_second_it_began() -> None:
    """In no window of 60 s, however it lies, are there more than the limit."""
    clock = Clock()
    store = LocalStore(clock=clock)
    held = bound(requests=5)
    begun: list[float] = []
    for step in range(3000):
        clock.now = 1000 + step * 0.1
        name = f"r{step}"
        if store.reserve(name, [held], 0).refused < 0:
            begun.append(clock.now)
            store.settle(name, 0)
    assert all(sum(start <= t < start + 60 for t in begun) <= 5 for start in begun)
    assert len(begun) == 5 * len({int(t) for t in begun}), "and all of it is given each time"
    assert len(begun) >= 20


@pytest.mark.parametrize("need, wait", [(10, 31), (30, 31), (31, 51), (60, 51), (100, 61)])
def test_the_wait_is_until_there_is_room(need: int, wait: int) -> None:
    clock = Clock()
    store = LocalStore(clock=clock)
    for second, tokens in ((970, 30), (990, 30), (1000, 40)):
        clock.now = second
        store.reserve(f"r{second}", [bound(tokens=100)], tokens)
        store.settle(f"r{second}", tokens)
    clock.now = 1000
    assert store.reserve("x", [bound(tokens=100)], need).wait_s == wait
    clock.now += wait - 0.5
    assert store.reserve("y", [bound(tokens=100)], need).refused == (-1 if wait == int(wait - 0.5) else 0)
    clock.now += 0.5
    assert store.reserve("z", [bound(tokens=100)], need).refused == -1


def test_who_has_not_come_for_long_is_forgotten() -> None:
    clock = Clock()
    store = LocalStore(clock=clock)
    for n in range(1000):
        store.reserve(f"r{n}", [bound(f"key-{n}", requests=1)], 1)
        store.settle(f"r{n}", 1)
    clock.now += 200
    store.reserve("x", [bound("x", requests=1)], 1)
    assert len(store) == 1


def test_routers_that_count_for_themselves_have_their_part_each() -> None:
    assert share(limits(requests=10, tokens=1001, concurrent=1), 2) == limits(requests=5, tokens=500, concurrent=1)
    assert share(limits(), 2) == limits()
    store = LocalStore(routers=2)
    assert [store.reserve(f"r{n}", [bound(requests=4)], 1).refused for n in range(3)] == [-1, -1, 0]


# ---- Redis


def pair(server: Server, fallback: Any = "local") -> tuple[SharedStore, SharedStore]:
    server.client.flushall()
    one, two = (SharedStore(server.url, "wherry:test", fallback, LocalStore(routers=2)) for _ in range(2))
    return one, two


async def closed(*stores: SharedStore) -> None:
    for store in stores:
        await store.close()


async def test_two_routers_count_together(server: Server) -> None:
    one, two = pair(server)
    held = [bound(requests=30, tokens=500, concurrent=25)]

    async def ask(n: int) -> bool:
        return (await (one, two)[n % 2].reserve(f"r{n}", held, 10)).refused < 0

    assert sum(await asyncio.gather(*(ask(n) for n in range(100)))) == 25
    await closed(one, two)


async def test_in_redis_too_what_counted_ceases_to(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_module, "WINDOW_S", 1)
    one, two = pair(server)
    held = [bound(requests=2)]
    for n in range(2):
        assert (await one.reserve(f"r{n}", held, 10)).refused < 0
    outcome = await two.reserve("x", held, 10)
    assert outcome.refused == 0
    assert 1 <= outcome.wait_s <= 2
    await granted_at_last(two, "x", held)
    await closed(one, two)


async def test_places_of_a_router_that_died_are_free_after_its_lease(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_module, "LEASE_S", 1)
    one, two = pair(server)
    held = [bound(concurrent=1)]
    assert (await one.reserve("a", held, 10)).refused < 0
    await one._vouch()
    assert (await two.reserve("b", held, 10)).refused == 0
    await granted_at_last(two, "b", held)
    await closed(one, two)


async def granted_at_last(store: SharedStore, name: str, held: list[Bound]) -> None:
    for _ in range(200):
        if (await store.reserve(name, held, 10)).refused < 0:
            return
        await asyncio.sleep(0.05)
    raise AssertionError("not within 10 s")


async def answer(store: SharedStore, name: str, held: list[Bound]) -> str:
    try:
        return "granted" if (await store.reserve(name, held, 1)).refused < 0 else "refused"
    except ApiError as error:
        return f"{error.status} {error.code}"


FALLBACKS = {"local": 2, "open": 6, "closed": 0}


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("fallback, granted", FALLBACKS.items())
async def test_redis_is_lost_and_comes_back(fallback: str, granted: int, fault: signal.Signals) -> None:
    server = Server()
    one, two = pair(server, fallback)
    run = asyncio.create_task(one.run())
    held = [bound(requests=4)]
    try:
        await one.reserve("warm", [bound("other", requests=4)], 1)
        server.process.send_signal(fault)
        loop = asyncio.get_running_loop()
        began = loop.time()
        answers = [await answer(one, f"r{n}", held) for n in range(6)]
        assert answers.count("granted") == granted
        assert set(answers) <= {"granted", "503 limits_unavailable" if fallback == "closed" else "refused"}
        assert loop.time() - began < 2, "the first one waited for the time-out, the others for nothing"
        for n in range(6):
            one.settle(f"r{n}", 1)
        if fault == signal.SIGKILL:
            server.kill()
            await asyncio.to_thread(server.start)
        else:
            server.process.send_signal(signal.SIGCONT)
        await asyncio.to_thread(eventually, lambda: not one.lost)
        fresh = [bound("fresh", requests=4)]
        results = [(await store.reserve(f"s{n}", fresh, 1)).refused < 0 for n in range(3) for store in (one, two)]
        assert sum(results) == 4
    finally:
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
        server.process.send_signal(signal.SIGCONT)
        await closed(one, two)
        server.stop()


async def test_a_redis_that_takes_no_writes_is_lost_as_long(server: Server) -> None:
    one, two = pair(server, "closed")
    run = asyncio.create_task(one.run())
    held = [bound(requests=4)]
    try:
        assert await answer(one, "a", held) == "granted"
        server.client.config_set("min-replicas-to-write", 1)
        assert await answer(one, "b", held) == "503 limits_unavailable"
        await one._probe()
        assert one.lost, "it would answer a ping"
        server.client.config_set("min-replicas-to-write", 0)
        await asyncio.to_thread(eventually, lambda: not one.lost)
        assert await answer(one, "c", held) == "granted"
    finally:
        server.client.config_set("min-replicas-to-write", 0)
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
        await closed(one, two)


# ---- requests


def chat(content: str, **more: Any) -> ChatCompletionRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": content}], **more}
    return parse(ChatCompletionRequest, msgspec.json.encode(body))


ALICE = Caller(tenant="blue", key="alice")


def limiter(**rules: LimitSet) -> Limiter:
    return Limiter(CollectorRegistry(), "m", Rules(**rules), LocalStore())


def test_the_key_s_own_limits_go_before_those_of_every_key() -> None:
    rules = Rules(per_key=limits(requests=1), per_tenant=limits(requests=2), total=limits(requests=3))
    own = Caller(tenant="blue", key="alice", limits=limits(tokens=9))
    free = Caller(tenant="blue", key="alice", limits=limits())

    def scopes(caller: Caller) -> list[tuple[str, str, int]]:
        return [(b.scope, b.name, b.limits.requests_per_minute) for b in rules.bounds(caller, "m")]

    assert scopes(ALICE) == [("key", "alice", 1), ("tenant", "blue", 2), ("model", "m", 3)]
    assert scopes(own) == [("key", "alice", 0), ("tenant", "blue", 2), ("model", "m", 3)]
    assert scopes(free) == [("tenant", "blue", 2), ("model", "m", 3)]
    assert scopes(ANYBODY) == [("model", "m", 3)]


async def test_headers_say_what_is_left_of_the_tightest_limit() -> None:
    limited = limiter(per_key=limits(requests=5, tokens=1000), per_tenant=limits(requests=3))
    headers: list[tuple[bytes, bytes]] = []
    with await limited.reserve(ALICE, chat("x" * 300, max_tokens=91), "r", headers):
        pass
    assert dict(headers) == {
        b"x-ratelimit-limit-requests": b"3",
        b"x-ratelimit-remaining-requests": b"2",
        b"x-ratelimit-reset-requests": b"1m1s",
        b"x-ratelimit-limit-tokens": b"1000",
        b"x-ratelimit-remaining-tokens": b"800",
        b"x-ratelimit-reset-tokens": b"1m1s",
    }


async def test_over_a_limit_the_answer_says_when_to_come_again() -> None:
    limited = limiter(per_key=limits(requests=1))
    with await limited.reserve(ALICE, chat("x"), "a", []):
        pass
    headers: list[tuple[bytes, bytes]] = []
    with pytest.raises(ApiError) as caught:
        await limited.reserve(ALICE, chat("x"), "b", headers)
    assert (caught.value.status, caught.value.code) == (429, "rate_limit_exceeded")
    assert 59 <= (caught.value.retry_after_s or 0) <= 61
    assert (b"x-ratelimit-remaining-requests", b"0") in headers


async def test_what_can_never_fit_is_no_429() -> None:
    limited = limiter(per_key=limits(tokens=100))
    with pytest.raises(ApiError) as caught:
        await limited.reserve(ALICE, chat("x", max_tokens=60, n=2), "a", [])
    assert (caught.value.status, caught.value.param) == (400, "max_tokens")


BEGUN = [Started(id="r", prompt_tokens=7, cached_tokens=4, seed=1), Token(index=0, ids=[1, 2], text="x")]
ENDINGS: dict[str, tuple[list[Any], int | None, int]] = {
    "whole": (BEGUN, 3, 10),
    "the client left": (BEGUN, None, 9),
    "the worker refused": ([], None, 0),
}


@pytest.mark.parametrize("events, completion, taken", ENDINGS.values(), ids=ENDINGS)
async def test_what_was_taken_is_what_counts(events: list[Any], completion: int | None, taken: int) -> None:
    limited = limiter(per_key=limits(tokens=1000))
    with (
        contextlib.suppress(ZeroDivisionError),
        await limited.reserve(ALICE, chat("x", max_tokens=900), "r", []) as charge,
    ):
        for event in events:
            charge.saw(0, event)
        if completion is not None:
            charge.saw(0, End(finish_reason="stop", prompt_tokens=7, completion_tokens=completion))
        raise ZeroDivisionError
    headers: list[tuple[bytes, bytes]] = []
    with await limited.reserve(ALICE, chat("", max_tokens=1), "s", headers):
        pass
    assert dict(headers)[b"x-ratelimit-remaining-tokens"] == b"%d" % (1000 - taken - 10)
    usage = limited.usage.report().tenants[0]
    assert usage.tenant == "blue"
    assert usage.prompt_tokens + usage.completion_tokens == taken
    assert usage.cached_tokens == (4 if events else 0)


async def test_an_answer_without_a_bound_is_followed_as_it_grows() -> None:
    limited = limiter(per_key=limits(tokens=1000))
    with await limited.reserve(ALICE, chat("x"), "r", []) as charge:
        charge.saw(0, Started(id="r", prompt_tokens=7, cached_tokens=0, seed=1))
        for n in range(700):
            charge.saw(0, Token(index=n, ids=[n], text=""))
        with pytest.raises(ApiError):
            await limited.reserve(ALICE, chat("x", max_tokens=230), "s", [])


async def test_choices_share_their_prompt_and_a_restart_counts_once() -> None:
    limited = limiter()
    with await limited.reserve(ALICE, chat("x", n=2), "r", []) as charge:
        for index in (0, 1, 0):
            charge.saw(index, Started(id="r", prompt_tokens=7, cached_tokens=0, seed=1))
            charge.saw(index, Token(index=0, ids=[1, 2, 3], text=""))
    usage = limited.usage.report().tenants[0]
    assert (usage.requests, usage.prompt_tokens, usage.completion_tokens) == (1, 7, 6)


def test_what_a_request_may_take() -> None:
    scale = PromptScale()
    prompt = parse(CompletionRequest, b'{"model": "m", "prompt": [[1, 2, 3], [4, 5]], "max_tokens": 10, "n": 2}')
    assert Estimate(prompt).tokens(scale) == 5 + 1 + 4 * 10
    assert Estimate(chat("é" * 150, max_tokens=5)).tokens(scale) == 100 + 1 + 8 + 5
    assert Estimate(chat("x")).asked == 0


def test_the_scale_of_prompts_is_learned_upwards_quickly() -> None:
    scale = PromptScale()
    for _ in range(6):
        scale.note(100, 100)
    assert scale.per_byte > 0.95
    for _ in range(10):
        scale.note(100, 25)
    assert scale.per_byte > 0.8
    scale.note(1, 1000)
    scale.note(100, 10_000)
    assert scale.per_byte < 1.5


def test_usage_has_no_more_labels_than_it_may() -> None:
    registry = CollectorRegistry()
    usage = Usage(registry)
    for n in range(MAX_LABELS + 50):
        usage.add(f"tenant-{n}", 1, 0, 1)
    every = [s for family in registry.collect() for s in family.samples if s.name.endswith("_total")]
    samples = [s for s in every if s.labels.get("kind") == "completion"]
    assert len(samples) == MAX_LABELS + 1
    assert next(s.value for s in samples if s.labels["tenant"] == OTHER) == 50
    assert len(usage.report().tenants) == MAX_LABELS + 50


@pytest.mark.parametrize(
    "text",
    [
        "",
        "requests",
        "requests=",
        "requests=-1",
        "rps=1",
        "tokens=9999999999999",
        "requests=1,requests=2",
        "requests=1.5",
    ],
)
def test_flags_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        parse_limits(text)


def test_flags_of_limits() -> None:
    assert parse_limits("requests=60, tokens=1000,concurrent=2") == limits(60, 1000, 2)
