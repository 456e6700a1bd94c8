"""`/v1/embeddings` with real processes: router before a real worker, and `wherry serve`; the `openai` client."""

import http.client
import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import openai
import pytest
from tests.router import embedders
from tests.router.embedders import expected, post, vectors
from tests.router.harness import MODEL, Process, chat, eventually, router, serve, worker, workers
from tests.router.volume import Volume

from wherry_protocol.openai.embeddings import MAX_INPUTS
from wherry_router.response_cache.embedding import Embedder as CacheEmbedder
from wherry_runtime.embedding.model import Embedder

bert, heavy, reference = embedders.bert, embedders.heavy, embedders.reference
TEXTS = ["The old wherry sails to town.", "coal", "A boat on the river, and corn on the boat.", "coal"]


@pytest.fixture(scope="module")
def embedder(bert: Path) -> Iterator[Process]:
    with worker("--max-batched-tokens", "96", uri=f"file://{bert}") as process:
        yield process


@pytest.fixture(scope="module")
def front(embedder: Process) -> Iterator[Process]:
    with router(embedder.url) as process:
        yield process


@pytest.fixture(scope="module")
def served(bert: Path) -> Iterator[Process]:
    with serve(model=str(bert)) as process:
        yield process


@pytest.fixture(params=["front", "served"])
def url(request: pytest.FixtureRequest) -> str:
    process: Process = request.getfixturevalue(request.param)
    return process.url


def scraped(process: Process) -> dict[str, float]:
    lines = [line.rpartition(" ") for line in httpx.get(process.url + "/metrics").text.splitlines() if line[0] != "#"]
    return {name: float(value) for name, _, value in lines}


def test_every_shape_of_input(url: str, reference: Embedder) -> None:
    tokens = [reference.encode(text) for text in TEXTS]
    for given, texts in ((TEXTS, TEXTS), (TEXTS[0], TEXTS[:1]), (tokens, TEXTS), (tokens[2], TEXTS[2:3])):
        for encoding in ("float", "base64"):
            response = post(url, input=given, encoding_format=encoding, user="u")
            np.testing.assert_allclose(vectors(response), expected(reference, texts), atol=1e-6)
            body = response.json()
            count = sum(len(reference.encode(text)) for text in texts)
            assert body["usage"] == {"prompt_tokens": count, "total_tokens": count}
            assert (body["object"], body["model"], body["data"][0]["object"]) == ("list", MODEL, "embedding")


def test_the_openai_client(url: str, reference: Embedder) -> None:
    with openai.OpenAI(base_url=url + "/v1", api_key="unused", max_retries=0, timeout=60) as client:
        answer = client.embeddings.create(model=MODEL, input=TEXTS)
        found = np.array([one.embedding for one in answer.data])
        np.testing.assert_allclose(found, expected(reference, TEXTS), atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
        assert [model.id for model in client.models.list()] == [MODEL]
        with pytest.raises(openai.BadRequestError, match="it generates no text; send texts to /v1/embeddings"):
            client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hello"}])
        with pytest.raises(openai.BadRequestError, match="it generates no text"):
            list(client.completions.create(model=MODEL, prompt="Hello", stream=True))


def test_a_model_that_generates_says_where_texts_go(tiny_router: Process, tiny_serve: Process) -> None:
    for process in (tiny_router, tiny_serve):
        response = post(process.url, input="Hello")
        assert (response.status_code, response.json()["error"]["code"]) == (400, "unsupported_task")
        assert "/v1/chat/completions" in response.json()["error"]["message"]
        done = httpx.post(process.url + "/v1/chat/completions", json=chat("Hello", max_tokens=1), timeout=60)
        assert done.status_code == 200


REFUSED: list[tuple[dict[str, Any], int, str, str]] = [
    ({}, 400, "missing_required_parameter", "`input` is missing"),
    ({"input": ""}, 400, "invalid_value", "input 0 is empty"),
    ({"input": []}, 400, "invalid_value", "must be a string, a list"),
    ({"input": ["a", ""]}, 400, "invalid_value", "input 1 is empty"),
    ({"input": [[]]}, 400, "invalid_value", "input 0 is empty"),
    ({"input": [1, "a"]}, 400, "invalid_value", "must be a string, a list"),
    ({"input": {"text": "a"}}, 400, "invalid_value", "must be a string, a list"),
    ({"input": ["a"] * (MAX_INPUTS + 1)}, 400, "invalid_value", "at most 2048"),
    ({"input": [96]}, 400, "invalid_token", "token id 96 is not in the vocabulary, 0 to 95"),
    ({"input": [-1]}, 400, "invalid_value", "must be a string, a list"),
    ({"input": ["a", "river " * 60]}, 400, "context_length_exceeded", "input 1 has 62 tokens and the model takes 48"),
    ({"input": [5] * 49}, 400, "context_length_exceeded", "input 0 has 49 tokens"),
    ({"input": "a", "dimensions": 9}, 400, "unsupported_dimensions", "the model has 32, and it can be cut to (8, 16)"),
    ({"input": "a", "dimensions": 33}, 400, "unsupported_dimensions", "dimensions 33"),
    ({"input": "a", "dimensions": 0}, 400, "invalid_value", "dimensions"),
    ({"input": "a", "encoding_format": "int8"}, 400, "invalid_value", "encoding_format"),
    ({"input": "a", "truncate_prompt_tokens": 49}, 400, "invalid_value", "must be 1 to 48, or -1"),
    ({"input": "a", "truncate_prompt_tokens": 0}, 400, "invalid_value", "must be 1 to 48, or -1"),
    ({"input": "a", "stream": True}, 400, "unknown_parameter", "There is no parameter `stream`"),
    ({"input": "a", "model": "other"}, 404, "model_not_found", "The model `other` is not served here"),
    ({"input": "\ud800"}, 400, "invalid_json", "not JSON"),
]


@pytest.mark.parametrize(("body", "status", "code", "message"), REFUSED)
def test_refusals(front: Process, body: dict[str, Any], status: int, code: str, message: str) -> None:
    response = httpx.post(front.url + "/v1/embeddings", content=json.dumps({"model": MODEL, **body}), timeout=60)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code), error
    assert message in error["message"]
    assert post(front.url, input="coal").status_code == 200, "and it goes on"


def test_long_texts_are_cut_where_asked(url: str, reference: Embedder) -> None:
    text = "the old boat sails on the river " * 20
    for cut, length in ((-1, 48), (48, 48), (9, 9)):
        response = post(url, input=[text, "coal"], truncate_prompt_tokens=cut)
        assert response.json()["usage"]["prompt_tokens"] == length + 3 + sum(c not in "coal" for c in "coal")
        told = reference.embed([reference.encode(text, length)], [None])[0]
        np.testing.assert_allclose(vectors(response)[0], np.frombuffer(told or b"", "<f4"), atol=1e-6)


def test_vectors_that_may_be_cut(url: str) -> None:
    whole = vectors(post(url, input=TEXTS))
    cut = vectors(post(url, input=TEXTS, dimensions=8, encoding_format="base64"))
    np.testing.assert_allclose(cut, whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1)[:, None], atol=1e-6)
    assert vectors(post(url, input=TEXTS, dimensions=32)).shape == (4, 32)


def test_many_at_once_get_each_their_own(front: Process, embedder: Process, reference: Embedder) -> None:
    texts = [f"{'boat ' * (n % 30)} {n % 3}" for n in range(200)]
    before, batches = scraped(front), httpx.get(embedder.url + "/load").json()["steps_total"]

    def one(n: int) -> None:
        mine = texts[n::40]
        np.testing.assert_allclose(vectors(post(front.url, input=mine)), expected(reference, mine), atol=1e-6)

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(one, range(40)))
    after, load = scraped(front), httpx.get(embedder.url + "/load").json()
    name = 'wherry_router_requests_total{code="200",route="embeddings"}'
    assert after[name] - before.get(name, 0) == 40
    assert (load["running"], load["waiting"], load["tokens_owed"]) == (0, 0, 0)
    assert load["steps_total"] - batches < 200, "several texts went into a batch"
    told = scraped(embedder)
    assert told[f'wherry_prompt_tokens_total{{model_name="{MODEL}"}}'] == load["prompt_tokens_total"]
    assert told[f'wherry_request_success_total{{finished_reason="stop",model_name="{MODEL}"}}'] >= 40
    assert told[f'wherry_request_queue_time_seconds_count{{model_name="{MODEL}"}}'] >= 40
    (line,) = [one for one in front.messages("request") if one["route"] == "embeddings"][-1:]
    assert line["status"] == 200


def many(count: int) -> list[str]:
    return [f"{'boat ' * 40} {n % 3}" for n in range(count)]


@pytest.fixture(scope="module")
def one_by_one(heavy: Path) -> Iterator[Process]:
    """A worker that takes long, a text at a time; two requests take turns and one waits."""
    args = ("--max-batched-tokens", "1", "--max-running", "2", "--max-queued", "1")
    with worker(*args, uri=f"file://{heavy}") as process:
        yield process


def running(process: Process) -> int:
    return int(httpx.get(process.url + "/load").json()["running"])


def embed(process: Process, name: str, inputs: list[str]) -> httpx.Response:
    body = {"id": name, "model": MODEL, "inputs": inputs}
    return httpx.post(process.url + "/embed", json=body, timeout=60)


def cancel(process: Process, name: str) -> bool:
    return bool(httpx.post(process.url + "/cancel", json={"id": name}).json()["cancelled"])


def test_a_query_does_not_wait_for_a_thousand_documents(one_by_one: Process) -> None:
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(embed, one_by_one, "long", many(1000))
        eventually(lambda: running(one_by_one))
        assert embed(one_by_one, "short", ["coal"]).status_code == 200
        assert not long.done()
        assert cancel(one_by_one, "long")
        assert '"finish_reason":"cancelled"' in long.result().text
        assert not cancel(one_by_one, "long")
        assert not running(one_by_one)


def test_a_full_queue_is_429(one_by_one: Process) -> None:
    with ThreadPoolExecutor(3) as pool:
        names = ["a", "b", "c"]
        sent = [pool.submit(embed, one_by_one, name, many(1000)) for name in names]
        eventually(lambda: httpx.get(one_by_one.url + "/load").json()["waiting"])
        refused = embed(one_by_one, "d", ["coal"])
        assert (refused.status_code, refused.json()["code"]) == (429, "queue_full")
        assert refused.headers["retry-after"] == "1"
        assert all(cancel(one_by_one, name) for name in names)
        assert [one.result().status_code for one in sent] == [200, 200, 200]
        assert embed(one_by_one, "d", ["coal"]).status_code == 200


def test_a_client_that_leaves_frees_the_worker(one_by_one: Process) -> None:
    with router(one_by_one.url) as front:
        body = json.dumps({"model": MODEL, "input": many(1000)})
        parts = urlsplit(front.url)
        client = http.client.HTTPConnection(parts.hostname or "", parts.port or 0)
        client.request("POST", "/v1/embeddings", body)
        eventually(lambda: running(one_by_one))
        client.close()
        eventually(lambda: not running(one_by_one))
        assert eventually(lambda: one_by_one.messages("client gone, cancelled"))
        assert scraped(front)["wherry_router_client_disconnects_total"] == 1


def test_sigterm_lets_running_requests_finish(heavy: Path) -> None:
    with worker(uri=f"file://{heavy}") as process, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(embed, process, "one", many(100))
        eventually(lambda: running(process))
        process.signal(signal.SIGTERM)
        eventually(lambda: process.messages("state")[-1]["state"] == "draining")
        assert embed(process, "late", ["coal"]).status_code == 503
        assert asked.result().text.count("event: embedding") == 100
        assert process.wait() == 0


def test_no_request_is_lost_when_a_worker_is_killed(bert: Path, reference: Embedder) -> None:
    texts = many(60)
    want = expected(reference, texts)
    with ExitStack() as stack:
        one, other = stack.enter_context(workers(2, "--max-batched-tokens", "1", uri=f"file://{bert}"))
        front, pool = stack.enter_context(router(one.url, other.url)), stack.enter_context(ThreadPoolExecutor(8))
        sent = [pool.submit(post, front.url, input=texts) for _ in range(24)]
        eventually(lambda: running(one) and running(other))
        one.kill()
        for answer in sent:
            np.testing.assert_allclose(vectors(answer.result()), want, atol=1e-6)
        lost = [line for line in front.messages("try failed") if line["replica"] == one.url]
        assert lost, "it had some of them"
        told = scraped(front)
        assert sum(v for name, v in told.items() if name.startswith("wherry_router_retries_total")) == len(lost)


def test_keys_and_limits(embedder: Process, tmp_path: Path) -> None:
    key = "wk-one-0123456789abcdef"
    volume = Volume(tmp_path / "keys", **{"one.yaml": f"key: {key}\nlimits: {{tokensPerMinute: 60}}"})
    with router(embedder.url, args=("--api-keys", str(volume.path))) as front:
        assert post(front.url, input="coal").status_code == 401
        known = {"Authorization": f"Bearer {key}"}
        first = post(front.url, input=[[5] * 20, [6] * 10], headers=known)
        assert first.status_code == 200
        assert first.headers["x-ratelimit-limit-tokens"] == "60"
        second = post(front.url, input=[[5] * 40], headers=known)
        assert (second.status_code, second.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert int(second.headers["retry-after"]) > 0
        third = post(front.url, input=[[5] * 20], headers=known)
        assert third.status_code == 200, "what was counted is what it took, and what is refused takes nothing"
        refused = post(front.url, input=[[5] * 9], headers=known | {"x-wherry-priority": "nobody"})
        assert refused.status_code == 400


async def test_the_response_cache_finds_meanings_with_it(url: str, reference: Embedder) -> None:
    """What a router asks to find answers by what a question means: docs/response-cache.md."""
    results: list[str] = []
    asking = CacheEmbedder(url + "/v1/embeddings", MODEL, "key", 30.0, time.monotonic, results.append)
    try:
        found = await asking.embed("the old boat")
        assert await asking.embed("river " * 100) is None, "longer than the model takes"
        assert not asking.lost
    finally:
        await asking.close()
    np.testing.assert_allclose(np.asarray(found), expected(reference, ["the old boat"])[0], atol=1e-6)
    assert results == ["ok", "error"]


def test_the_description_has_it(front: Process) -> None:
    description = httpx.get(front.url + "/openapi.json").json()
    assert description["paths"]["/v1/embeddings"]["post"]["summary"] == "Turn texts into vectors"
    assert set(description["components"]["schemas"]["EmbeddingRequest"]["properties"]) == {
        *("model", "input", "encoding_format", "dimensions", "user", "truncate_prompt_tokens")
    }
