"""Answers that are kept: which, for whom, how long, and that what is found is what was told."""

from collections.abc import AsyncGenerator, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from tests.router.harness import Mock, Process, chat, mock_worker, post, router, script, sse, text_of

from wherry_protocol.worker import (
    ChatMessage,
    End,
    ErrorEvent,
    Event,
    ExecuteRequest,
    Metrics,
    PositionLogprobs,
    Prompt,
    SamplingParams,
    Started,
    Token,
    TokenLogprob,
)
from wherry_router.ledger import SEVERAL
from wherry_router.response_cache.cache import ResponseCache, key_of, replay
from wherry_router.response_cache.fair import Fair
from wherry_router.response_cache.memory import OVERHEAD, Memory

DAY = 86_400
START = Started(id="r", prompt_tokens=3, cached_tokens=0, seed=7)
END = End(finish_reason="stop", prompt_tokens=3, completion_tokens=2)
ANSWER: list[Event] = [START, Token(0, [5], "Hel"), Token(1, [6], "lo"), Metrics(0, 0, 0), END]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def request(text: str = "hi", sampling: dict[str, Any] | None = None, **fields: Any) -> ExecuteRequest:
    params = SamplingParams(**({"temperature": 0.0} if sampling is None else sampling))
    return ExecuteRequest(**({"id": "r", "model": "m", "prompt": Prompt(text=text), "sampling": params} | fields))


def cache(max_bytes: int = 100_000, clock: Clock | None = None, **settings: Any) -> tuple[ResponseCache, Memory]:
    memory = Memory(max_bytes, 60, clock or Clock())
    return ResponseCache(memory, **({"max_entry_bytes": 10_000} | settings)), memory


async def found(kept: ResponseCache, *asked: ExecuteRequest) -> list[list[Event]] | None:
    return (await kept.look(asked)).kept


async def tell(kept: ResponseCache, asked: ExecuteRequest, events: Sequence[Event] = ANSWER) -> list[Event]:
    return [event async for event in kept.recorded(asked, replay(events))]


@pytest.mark.parametrize(
    "sampling, control, first, second",
    [
        ({"temperature": 0}, None, "miss", "hit"),
        ({"temperature": 0.7}, None, "", ""),
        ({"temperature": 0.7, "seed": 1}, None, "miss", "hit"),
        ({}, None, "", ""),
        ({"temperature": 0}, b"no-store", "", ""),
        ({"temperature": 0}, b"max-age=0, No-Cache", "miss", "miss"),
        ({"temperature": 0}, b"max-age=0", "miss", "hit"),
    ],
)
async def test_only_answers_that_are_the_same_each_time(
    sampling: dict[str, Any], control: bytes | None, first: str, second: str
) -> None:
    kept, _ = cache()
    asked = request(sampling=sampling)
    looked = await kept.look([asked], control)
    assert looked.result == first
    if looked.keeps:
        await tell(kept, asked)
    assert (await kept.look([asked], control)).result == second


async def test_what_is_found_is_what_was_told() -> None:
    kept, _ = cache()
    assert await tell(kept, request()) == ANSWER
    assert await found(kept, request(id="another")) == [[START, Token(0, [5, 6], "Hello"), END]]


async def test_log_probabilities_are_kept() -> None:
    kept, _ = cache()
    place = PositionLogprobs(TokenLogprob(5, -0.5, "Hel", [72]), [])
    await tell(kept, request(), [START, Token(0, [5], "Hel", [place]), Token(1, [6], "lo", [place]), END])
    assert await found(kept, request()) == [[START, Token(0, [5, 6], "Hello", [place, place]), END]]


async def test_choices_are_found_together_or_not_at_all() -> None:
    kept, _ = cache()
    one, other = (request(sampling={"seed": seed}) for seed in (1, 2))
    await tell(kept, one)
    assert await found(kept, one, other) is None
    await tell(kept, other)
    assert await found(kept, one, other) == [[START, Token(0, [5, 6], "Hello"), END]] * 2


@pytest.mark.parametrize(
    "change, same",
    [
        ({"id": "x", "priority": 3}, True),
        ({"created": DAY // 2}, True),
        ({"created": DAY}, False),
        ({"text": "ho"}, False),
        ({"model": "n"}, False),
        ({"sampling": {"temperature": 0.0, "max_tokens": 9}}, False),
        ({"sampling": {"temperature": 0.0, "seed": 1}}, False),
        ({"sampling": {"temperature": 0.0, "logprobs": 0}}, False),
        ({"sampling": {"temperature": 0.0, "stop": ["x"]}}, False),
        ({"sampling": {"temperature": 0.0, "logit_bias": {1: 2.0}}}, False),
        ({"prompt": Prompt(token_ids=[1])}, False),
        ({"prompt": Prompt(messages=[ChatMessage(role="user", content="hi")])}, False),
    ],
)
def test_all_that_decides_an_answer_is_in_its_name(change: dict[str, Any], same: bool) -> None:
    assert (key_of(request(**change)) == key_of(request())) is same


def test_another_version_answers_otherwise() -> None:
    assert key_of(request(), "a") != key_of(request(), "b")


def test_names_do_not_depend_on_the_order_of_a_bias() -> None:
    one, other = ({"logit_bias": {1: 2.0, 3: 4.0}}, {"logit_bias": {3: 4.0, 1: 2.0}})
    assert key_of(request(sampling=one)) == key_of(request(sampling=other))


@pytest.mark.parametrize(
    "events",
    [
        ANSWER[:-1],
        [START, ErrorEvent(code="x", message="it broke")],
        [*ANSWER[:-1], End(finish_reason="cancelled", prompt_tokens=3, completion_tokens=2)],
        [START, Token(0, [5], "x" * 20_000), END],
    ],
    ids=["broken off", "failed", "cancelled", "too large"],
)
async def test_what_is_not_whole_or_too_large_is_not_kept(events: list[Event]) -> None:
    kept, memory = cache()
    assert await tell(kept, request(), events) == events
    assert len(memory) == 0


@pytest.mark.parametrize(
    ("cached", "told", "kept"),
    [("new", "new", 1), ("new", "old", 0), ("new", SEVERAL, 0), ("new", "", 1), ("", "old", 1), ("", "", 1)],
)
async def test_during_a_rollout_only_answers_of_the_new_model_are_kept(cached: str, told: str, kept: int) -> None:
    """`cached`: the version of the cache; `told`: that of who answers, which older workers do not tell."""
    held, memory = cache(version=cached)
    events = [msgspec.structs.replace(START, version=told), *ANSWER[1:]]
    assert await tell(held, request(), events) == events
    assert len(memory) == kept


async def test_an_answer_that_began_anew_is_kept_from_there() -> None:
    kept, _ = cache()
    await tell(kept, request(), [START, Token(0, [9], "no"), *ANSWER])
    assert await found(kept, request()) == [[START, Token(0, [5, 6], "Hello"), END]]


async def test_a_client_that_leaves_leaves_nothing() -> None:
    kept, memory = cache()
    closed = []

    async def events() -> AsyncGenerator[Event, None]:
        try:
            for event in ANSWER:
                yield event
        finally:
            closed.append(True)

    stream = kept.recorded(request(), events())
    await anext(stream)
    await stream.aclose()
    assert (len(memory), closed) == (0, [True])


async def test_entries_end_with_their_time() -> None:
    clock = Clock()
    kept, memory = cache(clock=clock)
    await tell(kept, request())
    clock.now += 59.9
    assert await found(kept, request())
    clock.now += 0.1
    assert await found(kept, request()) is None
    assert memory.used == 0


async def test_the_least_recently_used_goes_first_and_the_bound_holds() -> None:
    clock = Clock()
    room = 3 * (OVERHEAD + 100)
    memory = Memory(room, 60, clock)
    for name in (b"a", b"b", b"c"):
        memory.put("t", name, b"x" * 100)
    assert await memory.get("t", b"a")
    memory.put("t", b"d", b"x" * 100)
    assert [bool(await memory.get("t", name)) for name in (b"a", b"b", b"c", b"d")] == [True, False, True, True]
    memory.put("t", b"d", b"x" * 90)
    assert memory.used == room - 10
    memory.put("t", b"e", b"x" * 2000)
    assert await memory.get("t", b"e") is None
    assert len(memory) == 3


@pytest.mark.parametrize(
    "puts, left",
    [
        ("a1 a2 a3 a4 a5", "a2 a3 a4 a5"),
        ("a1 b1 b2 b3 b4", "a1 b2 b3 b4"),
        ("a1 a2 b1 b2 b3 a3", "a2 a3 b2 b3"),
        ("a1 a2 a3 a4 b1 b2 b3", "a3 a4 b2 b3"),
        ("a1 a2 a3 a4 b1 c1 d1", "a4 b1 c1 d1"),
        ("a1 a2 a3 a4 a1 a5", "a3 a4 a1 a5"),
    ],
)
def test_who_takes_the_most_gives_way(puts: str, left: str) -> None:
    fair: Fair[str] = Fair(4)
    kept: set[str] = set()
    for name in puts.split():
        gone = fair.put(name[0], name[1:], 1)
        assert gone is not None
        kept = kept - {of + key for of, key in gone} | {name}
        assert fair.used == len(kept)
    assert kept == set(left.split())


def test_many_tenants_come_and_go_and_the_room_is_never_exceeded() -> None:
    fair: Fair[int] = Fair(50)
    there: dict[tuple[str, int], int] = {}
    for step in range(5000):
        tenant, key, size = f"t{step * 7 % 90}", step * 13 % 11, 1 + step % 5
        there.pop((tenant, key), None)
        if step % 3 == 0:
            fair.drop(tenant, key)
            continue
        gone = fair.put(tenant, key, size)
        assert gone is not None
        for entry in gone:
            del there[entry]
        there[tenant, key] = size
        assert fair.used == sum(there.values()) <= 50
    assert len(fair._most) < 300


async def test_what_cannot_be_read_is_not_there() -> None:
    kept, memory = cache()
    memory.put("", key_of(request()), b"\xc1 of another version")
    assert await found(kept, request()) is None


@pytest.fixture(scope="module")
def front() -> Iterator[tuple[Mock, Process]]:
    with mock_worker("a") as mock, router(mock.url, args=("--response-cache-bytes", "1048576")) as process:
        yield mock, process


def ask(front: tuple[Mock, Process], content: str, stream: bool, **more: Any) -> tuple[str, str, int]:
    """What the router says of its cache, the answer's text, and how many requests the worker has had for it."""
    mock, process = front
    before = mock.state()["executed"]
    response = post(process.url, chat(content, stream=stream, **({"temperature": 0} | more)))
    chunks = list(sse(response)) if stream else [response.json()]
    if stream:
        assert chunks[-1] == {}
        text = text_of(chunks)
    else:
        text = "".join(choice["message"]["content"] for choice in chunks[0]["choices"])
    return response.headers.get("x-wherry-cache", ""), text, mock.state()["executed"] - before


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("second", [True, False])
def test_the_second_client_gets_the_first_ones_answer(front: tuple[Mock, Process], first: bool, second: bool) -> None:
    content = script(tokens=5, text=f"{first}-{second} ")
    expected = f"{first}-{second} " * 5
    assert ask(front, content, first) == ("miss", expected, 1)
    assert ask(front, content, second) == ("hit", expected, 0)


def test_usage_and_choices_are_as_the_first_time(front: tuple[Mock, Process]) -> None:
    body = chat(script(tokens=3), temperature=1, seed=5, n=2)
    first, second = (post(front[1].url, body).json() for _ in range(2))
    assert first["usage"] == second["usage"]
    assert first["choices"] == second["choices"]
    assert first["id"] != second["id"]


def test_what_differs_each_time_is_computed_each_time(front: tuple[Mock, Process]) -> None:
    assert [ask(front, script(tokens=2), False, temperature=1)[::2] for _ in range(2)] == [("", 1)] * 2


def test_an_answer_that_failed_is_computed_again(front: tuple[Mock, Process]) -> None:
    mock, process = front
    content = script(tokens=5, error_after=2)
    before = mock.state()["executed"]
    for _ in range(2):
        assert post(process.url, chat(content, temperature=0)).status_code == 500
    assert mock.state()["executed"] - before >= 2


def test_a_full_queue_keeps_no_kept_answer(front: tuple[Mock, Process]) -> None:
    """While the only worker refuses everybody."""
    mock, _ = front
    content = script(tokens=4)
    assert ask(front, content, False)[0] == "miss"
    mock.set(ready=False)
    try:
        assert ask(front, content, True)[0] == "hit"
    finally:
        mock.set(ready=True)


def test_metrics_tell(front: tuple[Mock, Process]) -> None:
    ask(front, script(tokens=2, text="m"), False)
    ask(front, script(tokens=2, text="m"), False)
    text = httpx.get(front[1].url + "/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("wherry_router_response_cache"))
    assert float(lines['wherry_router_response_cache_requests_total{result="hit"}']) >= 1
    assert float(lines["wherry_router_response_cache_bytes"]) > 250


def test_tenants_have_answers_of_their_own(tmp_path: Path) -> None:
    keys = {name: f"wk-{name}-{'x' * 32}" for name in ("one", "two")}
    for name, key in keys.items():
        (tmp_path / name).write_text(key)
    args = ("--response-cache-bytes", "1048576", "--api-keys", str(tmp_path))
    with mock_worker("a") as mock, router(mock.url, args=args, env={"WHERRY_WORKER_TOKEN": "t"}) as process:

        def result(name: str) -> str:
            headers = {"authorization": f"Bearer {keys[name]}"}
            response = post(process.url, chat(script(tokens=2), temperature=0), headers=headers)
            assert response.status_code == 200
            return response.headers["x-wherry-cache"]

        assert [result(name) for name in ("one", "two", "one", "two")] == ["miss", "miss", "hit", "hit"]
