"""Answers of questions that mean the same, over real sockets: two routers, a real Redis, and an embedding endpoint that
fails in every way."""

import itertools
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
from tests.router.embedding_server import embed
from tests.router.harness import MODEL, Mock, Process, eventually, mock_worker, router, running
from tests.router.redis_server import Server

RESET = "How do I reset the password of my account?"
RESET_TOO = "How can I reset my account password?"
DELETE = "How do I delete my account?"
THRESHOLD = 0.9


class Fronts(NamedTuple):
    routers: tuple[Process, Process]
    mock: Mock
    embedding: Process
    redis: Server


SECRET = "worker-token-0123456789"
KEYS = {name: f"wk-{name}-{'x' * 32}" for name in ("one", "two")}
TIMEOUT_S = 0.3


def _url(process: Process) -> str:
    return next((line for line in process.log().splitlines() if line.startswith("http://")), "")


@pytest.fixture(scope="module")
def fronts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fronts]:
    folder: Path = tmp_path_factory.mktemp("keys")
    for name, key in KEYS.items():
        (folder / name).write_text(key)
    with ExitStack() as stack:
        redis = Server()
        stack.callback(redis.stop)
        embedding = stack.enter_context(running(Process("tests.router.embedding_server", []), _url))
        mock = stack.enter_context(mock_worker("a", "--token", SECRET))
        args = ("--response-cache-bytes", "1048576", "--api-keys", str(folder))
        args += ("--embedding-url", embedding.url + "/v1/embeddings", "--embedding-model", "grams")
        args += ("--embedding-timeout-s", str(TIMEOUT_S), "--similarity-threshold", str(THRESHOLD))
        env = {"WHERRY_WORKER_TOKEN": SECRET, "WHERRY_EMBEDDING_KEY": "sk-embedding"}
        env["WHERRY_RESPONSE_CACHE_REDIS_URL"] = redis.url
        one, two = (stack.enter_context(router(mock.url, args=args, env=env)) for _ in range(2))
        fail(embedding, key="sk-embedding")
        yield Fronts((one, two), mock, embedding, redis)


def fail(embedding: Process, **how: Any) -> dict[str, int]:
    return dict(httpx.post(embedding.url + "/mock", json=how, timeout=5).json())


def ask(process: Process, text: str, tenant: str = "one", system: str = "", **headers: str) -> httpx.Response:
    messages = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": text}]
    body = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 5}
    headers["authorization"] = f"Bearer {KEYS[tenant]}"
    response = httpx.post(process.url + "/v1/chat/completions", json=body, headers=headers, timeout=30)
    assert response.status_code == 200
    return response


def result(response: httpx.Response) -> str:
    return response.headers["x-wherry-cache"]


def content(response: httpx.Response) -> str:
    return str(response.json()["choices"][0]["message"]["content"])


_count = itertools.count()


def unheard() -> str:
    """A question that nobody has asked, of the group of `RESET`: numbers would make it another."""
    return RESET_TOO + " " + "please " * next(_count)


def metric(process: Process, name: str) -> float:
    lines = httpx.get(process.url + "/metrics").text.splitlines()
    return next((float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + " ")), 0.0)


def test_one_router_answers_what_another_was_asked_in_other_words(fronts: Fronts) -> None:
    one, two = fronts.routers
    first = ask(one, RESET)
    assert result(first) == "miss"
    eventually(lambda: metric(two, "wherry_router_response_cache_questions") == 1)
    near = ask(two, RESET_TOO)
    assert (result(near), content(near)) == ("semantic_hit", content(first))
    assert 0.97 < float(near.headers["x-wherry-cache-similarity"]) < 0.99
    assert result(ask(two, DELETE)) == "miss"
    assert result(ask(two, RESET_TOO, "two")) == "miss"
    assert result(ask(two, RESET_TOO, system="Be brief.")) == "miss"
    assert result(ask(two, RESET_TOO, **{"x-wherry-cache": "exact"})) == "miss"
    assert metric(two, 'wherry_router_response_cache_requests_total{result="semantic_hit"}') == 1


def test_words_that_are_equal_are_not_embedded(fronts: Fronts) -> None:
    one, _ = fronts.routers
    ask(one, "Which colours has the rainbow over the sea?")
    eventually(lambda: result(ask(one, "Which colours has the rainbow over the sea?")) == "hit")
    before = eventually(lambda: settled(lambda: fail(fronts.embedding)["asked"]))
    for _ in range(5):
        assert result(ask(one, "Which colours has the rainbow over the sea?")) == "hit"
    assert fail(fronts.embedding)["asked"] == before


def settled(read: Callable[[], int]) -> int:
    value = read()
    time.sleep(0.2)
    return value if read() == value else 0


def test_neither_questions_nor_vectors_are_to_be_seen_in_redis(fronts: Fronts) -> None:
    one, _ = fronts.routers
    text = "Where do platypuses sleep?"
    before = metric(one, "wherry_router_response_cache_questions")
    ask(one, text)
    eventually(lambda: metric(one, "wherry_router_response_cache_questions") > before)
    client = fronts.redis.client
    name = eventually(lambda: client.keys("*:news"))[0]
    found = b"".join(value for _, fields in client.xrange(name) for value in fields.values())
    assert found
    assert b"platypus" not in found
    assert np.array(embed(text)[:8], dtype="<f4").tobytes() not in found


@pytest.mark.parametrize(
    "how",
    [
        {"status": 500},
        {"status": 302},
        {"key": "another"},
        {"body": "[]"},
        {"body": '{"data": []}'},
        {"body": '{"data": [{"embedding": [0, 0]}]}'},
        {"body": '{"data": [{"embedding": [1, "x"]}]}'},
        {"body": f'{{"data": [{{"embedding": [1{",1" * 9000}]}}]}}'},
        {"delay_s": 1.0},
        {"signal": signal.SIGSTOP},
    ],
    ids=["500", "redirect", "401", "a list", "nothing", "no direction", "text", "endless", "slow", "frozen"],
)
def test_an_endpoint_that_fails_costs_hits_and_little_time(fronts: Fronts, how: dict[str, Any]) -> None:
    one, _ = fronts.routers
    embedding = fronts.embedding
    # Something must be known, or nobody would be asked.
    eventually(lambda: result(ask(one, RESET)) == "hit")
    stop = how.get("signal")
    if stop:
        embedding.signal(stop)
    else:
        fail(embedding, **how)
    try:
        took = []
        for _ in range(8):
            response = ask(one, unheard())
            assert result(response) == "miss"
            took.append(response.elapsed.total_seconds())
        assert max(took) < TIMEOUT_S + 1
        # After three failures nobody waits.
        assert sorted(took)[-4] < TIMEOUT_S
        assert metric(one, 'wherry_router_response_cache_up{what="embedding"}') == 0
    finally:
        if stop:
            embedding.signal(signal.SIGCONT)
        fail(embedding, status=200, body="", delay_s=0.0, key="sk-embedding")
    eventually(lambda: metric(one, 'wherry_router_response_cache_up{what="embedding"}') == 1)
    assert fail(embedding)["redirected"] == 0
    assert "sk-embedding" not in one.log()


def test_a_text_that_the_endpoint_refuses_says_nothing_about_the_endpoint(fronts: Fronts) -> None:
    one, _ = fronts.routers
    fail(fronts.embedding, status=413)
    try:
        for _ in range(6):
            assert result(ask(one, unheard())) == "miss"
        assert metric(one, 'wherry_router_response_cache_up{what="embedding"}') == 1
    finally:
        fail(fronts.embedding, status=200)


def test_with_a_dead_endpoint_requests_are_answered(fronts: Fronts) -> None:
    """The last one: it does not come back."""
    one, _ = fronts.routers
    fronts.embedding.kill()
    began = time.monotonic()
    for _ in range(10):
        assert result(ask(one, unheard())) == "miss"
    assert time.monotonic() - began < 5
    assert one.messages("the embedding endpoint is lost; answers are found by exact words only")


@pytest.mark.parametrize(
    "args, message",
    [
        (("--embedding-url", "http://e"), "needs --response-cache-bytes"),
        (("--embedding-url", "e", "--response-cache-bytes", "1048576"), "must begin with http"),
        (("--similarity-threshold", "0.2"), "not from 0.5 to 1"),
        (
            ("--embedding-url", "http://e", "--response-cache-bytes", "1048576", "--similarity-questions", "0"),
            "above 0",
        ),
    ],
)
def test_settings_that_cannot_be(args: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    from wherry_router.__main__ import main

    with pytest.raises(SystemExit) as ended:
        main(["--endpoints", "http://127.0.0.1:1", "--model", "m", *args])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
