"""Answers of questions that mean the same: which may be told, and which never are."""

import asyncio
import random
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from tests.router.embedding_server import embed

from wherry_protocol.worker import ChatMessage, End, Event, ExecuteRequest, Prompt, SamplingParams, Started, Token
from wherry_router.response_cache.cache import Lookup, ResponseCache, replay
from wherry_router.response_cache.memory import Memory
from wherry_router.response_cache.question import question_of
from wherry_router.response_cache.semantic import Semantic, SemanticSettings
from wherry_router.response_cache.vectors import Vector, Vectors, unit

RESET = "How do I reset the password of my account?"
RESET_TOO = "How can I reset my account password?"
DELETE = "How do I delete my account?"
THRESHOLD = 0.9


def turns(*contents: str, roles: str = "") -> list[ChatMessage]:
    """The last one is the user's; before it they take turns, unless `roles` says so (s, u or a)."""
    named = {"s": "system", "u": "user", "a": "assistant"}
    letters = roles or ("ua" * len(contents))[: len(contents)] if len(contents) % 2 else roles or "s" + "u"
    return [ChatMessage(role=named[r], content=c) for r, c in zip(letters, contents, strict=True)]  # type: ignore[arg-type]


def request(
    *contents: str, roles: str = "", sampling: dict[str, Any] | None = None, salt: str = "", **fields: Any
) -> ExecuteRequest:
    params = SamplingParams(**{"temperature": 0.0, **(sampling or {})})
    prompt = fields.pop("prompt", None) or Prompt(messages=turns(*(contents or (RESET,)), roles=roles))
    return ExecuteRequest(
        id="r", model=fields.pop("model", "m"), prompt=prompt, sampling=params, cache_salt=salt, **fields
    )


NAMED = Prompt(messages=[ChatMessage(role="user", content=RESET_TOO, name="bob")])


@pytest.mark.parametrize(
    "other, together",
    [
        (request(RESET_TOO), True),
        (request(DELETE), True),
        (request("  " + RESET_TOO + "\n"), True),
        (request(RESET_TOO, salt="another tenant's"), False),
        (request(RESET_TOO, model="n"), False),
        (request(RESET_TOO, created=86_400), False),
        (request(RESET_TOO, sampling={"max_tokens": 9}), False),
        (request(RESET_TOO, sampling={"stop": ["x"]}), False),
        (request(RESET_TOO, sampling={"seed": 1}), False),
        (request(RESET_TOO, sampling={"logit_bias": {1: 2.0}}), False),
        (request("Be brief.", RESET_TOO, roles="su"), False),
        (request("hi", "hello", RESET_TOO), False),
        (request(prompt=NAMED), False),
        (request(RESET_TOO + " I have 2."), False),
    ],
)
def test_what_is_compared_by_meaning_is_equal_in_all_the_rest(other: ExecuteRequest, together: bool) -> None:
    one, two = question_of(request(), "v", 1000), question_of(other, "v", 1000)
    assert one is not None
    assert two is not None
    assert (one.group == two.group) is together


@pytest.mark.parametrize(
    "one, other, together",
    [
        ("hits in 2019", "hits of 2019?", True),
        ("hits in 2019", "hits in 2020", False),
        ("what is 2 + 3", "what is 2 - 3", False),
        ("what is 2+3", "what is 2 + 3", True),
        ("what is 6 / 3", "what is 6 * 3", False),
        ("from 3 to 5", "from 5 to 3", False),
        ("is it over 9.5?", "is it over 95?", False),
        ("version 1.2.3", "version 1.2.4", False),
        ("10%", "10", False),
    ],
)
def test_numbers_are_never_nearly_the_same(one: str, other: str, together: bool) -> None:
    groups = [question_of(request(text), "v", 1000) for text in (one, other)]
    assert (groups[0].group == groups[1].group) is together  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "asked",
    [
        request(prompt=Prompt(text=RESET)),
        request(prompt=Prompt(token_ids=[1, 2])),
        request("x" * 1001),
        request("  "),
        request(RESET, sampling={"logprobs": 0}),
        request("hi", "Sure, it is", roles="ua"),
        request("hi", "be brief", roles="us"),
    ],
    ids=["text", "tokens", "long", "empty", "log probabilities", "begun answer", "system"],
)
def test_what_is_not_compared_by_meaning(asked: ExecuteRequest) -> None:
    assert question_of(asked, "v", 1000) is None


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def vector(*numbers: float) -> Vector:
    found = unit(list(numbers))
    assert found is not None
    return found


@pytest.mark.parametrize("numbers", [[0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_what_has_no_direction_is_no_vector(numbers: list[float]) -> None:
    assert unit(numbers) is None


def test_the_nearest_is_the_one_that_a_plain_search_finds() -> None:
    rng = random.Random(5)
    clock = Clock()
    vectors = Vectors(1000, clock)
    there: dict[bytes, tuple[Vector, float]] = {}
    for step in range(600):
        key = b"%d" % rng.randrange(80)
        if rng.random() < 0.3:
            vectors.drop("t", b"g", key)
            there.pop(key, None)
        else:
            there[key] = (vector(*(rng.gauss(0, 1) for _ in range(8))), clock.now + rng.randrange(200))
            vectors.put("t", b"g", key, *there[key])
        clock.now += 1
        asked = vector(*(rng.gauss(0, 1) for _ in range(8)))
        alive = {k: float(v @ asked) for k, (v, until) in there.items() if until > clock.now}
        near = vectors.nearest("t", b"g", asked)
        assert vectors.knows(b"g") is bool(alive), step
        if not alive:
            assert near is None
            continue
        assert near is not None
        best = max(alive, key=lambda k: alive[k])
        assert (near.key, near.similarity) == (best, pytest.approx(alive[best], abs=1e-6))
    assert len(vectors) == len(there)


def test_groups_are_never_compared_and_the_room_is_shared() -> None:
    vectors = Vectors(4, Clock())
    ahead = vector(1, 0)
    vectors.put("a", b"ga", b"1", ahead, 200)
    for n in range(20):
        vectors.put("b", b"gb", b"%d" % n, vector(1, n), 200)
    assert len(vectors) == 4
    assert vectors.nearest("a", b"ga", ahead) == (b"1", 1.0)
    assert vectors.nearest("c", b"gc", ahead) is None
    near = vectors.nearest("b", b"gb", ahead)
    assert near is not None
    assert near.key == b"17"


def test_vectors_of_another_size_begin_anew() -> None:
    vectors = Vectors(4, Clock())
    vectors.put("a", b"g", b"1", vector(1, 0), 200)
    assert vectors.nearest("a", b"g", vector(1, 0, 0)) is None
    vectors.put("a", b"g", b"2", vector(1, 0, 0), 200)
    assert vectors.nearest("a", b"g", vector(1, 0, 0)) == (b"2", 1.0)
    assert vectors.nearest("a", b"g", vector(1, 0)) is None
    assert len(vectors) == 1


class Embedding:
    """The test server's embedding, without a server."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.lost = False

    async def embed(self, text: str) -> Vector | None:
        self.asked.append(text)
        return None if self.lost else unit(embed(text))


class Told:
    """News between routers, without Redis: everybody is told at once."""

    def __init__(self) -> None:
        self.told_: list[bytes] = []

    def tell(self, plain: bytes, most: int) -> None:
        self.told_.append(plain)

    async def told(self) -> AsyncGenerator[tuple[bytes, float], None]:
        for plain in [b"of another version", *self.told_]:
            yield plain, 60.0


class World:
    def __init__(self, threshold: float = THRESHOLD, news: Told | None = None) -> None:
        self.clock = Clock()
        self.embedding = Embedding()
        settings = SemanticSettings(space="e", threshold=threshold, ttl_s=60)
        self.semantic = Semantic(settings, self.embedding, self.clock, news)
        self.store = Memory(1_000_000, 60, self.clock)
        self.cache = ResponseCache(self.store, 10_000, "v", self.semantic)

    async def ask(self, *asked: ExecuteRequest, **how: bytes) -> tuple[str, str]:
        """What the cache said, and the answer that was told: kept, or `answer to QUESTION`."""
        lookup = await self.cache.look(asked, **how)
        if lookup.kept is not None:
            return lookup.result, "".join(e.text for e in lookup.kept[0] if isinstance(e, Token))
        for one in asked:
            messages = one.prompt.messages
            text = f"answer to {messages[-1].content if messages else one.prompt.text}"
            await self.answer(one, text, lookup)
        await asyncio.gather(*self.semantic._tasks)
        return lookup.result, text

    async def answer(self, one: ExecuteRequest, text: str, lookup: Lookup) -> None:
        events: list[Event] = [Started("r", 3, 0, 7), Token(0, [5], text), End("stop", 3, 1)]
        generation = self.cache.recorded(one, replay(events), lookup) if lookup.keeps else replay(events)
        async for _ in generation:
            pass


async def test_the_answer_of_a_question_that_means_the_same() -> None:
    world = World()
    assert await world.ask(request(RESET)) == ("miss", f"answer to {RESET}")
    assert await world.ask(request(RESET_TOO)) == ("semantic_hit", f"answer to {RESET}")
    assert await world.ask(request(DELETE)) == ("miss", f"answer to {DELETE}")
    assert await world.ask(request(RESET)) == ("hit", f"answer to {RESET}")
    # What was found by meaning is not found by its words later: it stays another question's answer.
    assert (await world.ask(request(RESET_TOO)))[0] == "semantic_hit"


async def test_headers_tell_how_near_it_was() -> None:
    world = World()
    await world.ask(request(RESET))
    near = await world.cache.look([request(RESET_TOO)])
    assert near.headers() == [(b"x-wherry-cache", b"semantic_hit"), (b"x-wherry-cache-similarity", b"0.9793")]
    assert (await world.cache.look([request(RESET)])).headers() == [(b"x-wherry-cache", b"hit")]


@pytest.mark.parametrize(
    "first, second, how, result",
    [
        ({}, {}, {}, "semantic_hit"),
        ({"salt": "a"}, {"salt": "b"}, {}, "miss"),
        ({"salt": "a"}, {}, {}, "miss"),
        ({"salt": "a"}, {"salt": "a"}, {}, "semantic_hit"),
        ({}, {}, {"control": b"no-cache"}, "miss"),
        ({}, {}, {"control": b"no-store"}, ""),
        ({}, {}, {"wish": b" Exact"}, "miss"),
        ({}, {}, {"wish": b"something"}, "semantic_hit"),
        ({"sampling": {"temperature": 0.7}}, {"sampling": {"temperature": 0.7}}, {}, ""),
        (
            {"sampling": {"temperature": 0.7, "seed": 1}},
            {"sampling": {"temperature": 0.7, "seed": 1}},
            {},
            "semantic_hit",
        ),
        ({"sampling": {"temperature": 0.7, "seed": 1}}, {"sampling": {"temperature": 0.7, "seed": 2}}, {}, "miss"),
        ({"sampling": {"logprobs": 1}}, {"sampling": {"logprobs": 1}}, {}, "miss"),
    ],
)
async def test_who_gets_it(first: dict[str, Any], second: dict[str, Any], how: dict[str, bytes], result: str) -> None:
    world = World()
    await world.ask(request(RESET, **first))
    told, answer = await world.ask(request(RESET_TOO, **second), **how)
    assert told == result
    assert answer == f"answer to {RESET if result == 'semantic_hit' else RESET_TOO}"


async def test_several_choices_are_found_by_their_words_only() -> None:
    world = World()
    await world.ask(request(RESET))
    choices = [request(RESET_TOO, sampling={"seed": n}) for n in range(2)]
    assert (await world.ask(*choices))[0] == "miss"
    assert RESET_TOO not in world.embedding.asked


async def test_embeddings_are_asked_for_only_where_they_decide_something() -> None:
    world = World()
    asked = world.embedding.asked
    lookup = await world.cache.look([request(RESET)])
    assert asked == []  # nobody waits while there is nothing to be near to
    await world.answer(request(RESET), "an answer", lookup)
    await asyncio.gather(*world.semantic._tasks)
    assert asked == [RESET]
    await world.ask(request(RESET))
    assert asked == [RESET]
    await world.ask(request(DELETE))
    assert asked == [RESET, DELETE]  # once, for the look and for keeping it


async def test_without_an_embedding_it_is_a_miss_and_is_kept_by_its_words() -> None:
    world = World()
    await world.ask(request(RESET))
    world.embedding.lost = True
    assert await world.ask(request(RESET_TOO)) == ("miss", f"answer to {RESET_TOO}")
    assert (await world.ask(request(RESET_TOO)))[0] == "hit"
    assert len(world.semantic.vectors) == 1


async def test_a_question_whose_answer_is_gone_is_forgotten() -> None:
    world = World()
    await world.ask(request(RESET))
    world.store._entries.clear()
    assert (await world.ask(request(RESET_TOO)))[0] == "miss"
    assert (await world.ask(request(RESET)))[0] == "semantic_hit"
    world.clock.now += 61
    assert (await world.ask(request(RESET_TOO)))[0] == "miss"


async def test_an_answer_that_broke_off_answers_nobody() -> None:
    world = World()
    lookup = await world.cache.look([request(RESET)])
    events: list[Event] = [Started("r", 3, 0, 7), Token(0, [5], "half an ans")]
    async for _ in world.cache.recorded(request(RESET), replay(events), lookup):
        pass
    assert not world.semantic._tasks
    assert (await world.ask(request(RESET_TOO)))[0] == "miss"


async def test_routers_tell_one_another_what_they_answered() -> None:
    news = Told()
    one, two = World(news=news), World()
    two.store = one.store
    two.cache = ResponseCache(one.store, 10_000, "v", two.semantic)
    await one.ask(request(RESET, salt="a"))
    await two.semantic.follow(news)
    assert (await two.ask(request(RESET_TOO, salt="b")))[0] == "miss"
    assert (await two.ask(request(RESET_TOO, salt="a")))[0] == "semantic_hit"
