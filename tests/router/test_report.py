"""`GET /internal/replicas`: who may read it, and that it says what the router really does."""

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest
from tests.router.harness import Mock, Process, chat, eventually, mock_worker, post, router, script, sse
from tests.router.test_bounds import raw, request

PATH = "/internal/replicas"
TOKEN = {"Authorization": "Bearer the-token"}
ENV = {"WHERRY_WORKER_TOKEN": "the-token", "WHERRY_API_KEY": "the-key"}


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[list[Mock], Process]]:
    with ExitStack() as stack:
        mocks = [stack.enter_context(mock_worker(name, "--token", "the-token")) for name in "ab"]
        yield mocks, stack.enter_context(router(*(mock.url for mock in mocks), env=ENV))


def report(front: Process) -> dict[str, tuple[str, int]]:
    """Each replica's URL, state and requests in flight, as the operator reads it."""
    answer = httpx.get(front.url + PATH, headers=TOKEN).json()
    return {replica["name"]: (replica["state"], replica["in_flight"]) for replica in answer["replicas"]}


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer the-key", "the-token", "Basic the-token", "Bearer the-token2", "Bearer the-toke"],
)
def test_only_the_worker_token_opens_it(pair: tuple[list[Mock], Process], header: str) -> None:
    _, front = pair
    response = httpx.get(front.url + PATH, headers={"Authorization": header})
    assert response.status_code == 401
    assert b"replicas" not in response.content.replace(PATH.encode(), b"")


@pytest.mark.parametrize(
    "path",
    [
        "//internal/replicas",
        "/internal//replicas",
        "/internal/replicas/",
        "/Internal/Replicas",
        "/internal/%72eplicas",
        "/healthz/../internal/replicas",
        "/v1/models/../../internal/replicas",
        "/internal/replicas;x=1",
    ],
)
@pytest.mark.parametrize("key", ["", "the-key", "the-token"])
def test_no_other_spelling_of_the_path_reaches_it(pair: tuple[list[Mock], Process], path: str, key: str) -> None:
    _, front = pair
    status, body = raw(front.url, request("GET", path, "Host: x", f"Authorization: Bearer {key}"))
    assert status in (400, 401, 404)
    assert b"in_flight" not in body


def test_without_a_worker_token_there_is_nothing(pair: tuple[list[Mock], Process]) -> None:
    mocks, _ = pair
    with router(mocks[0].url, wait=0) as front:
        for headers in ({}, {"Authorization": "Bearer"}, TOKEN):
            assert httpx.get(front.url + PATH, headers=headers).status_code == 404


def test_the_worker_token_opens_nothing_else(pair: tuple[list[Mock], Process]) -> None:
    _, front = pair
    assert httpx.get(front.url + "/v1/models", headers=TOKEN).status_code == 401
    assert httpx.post(front.url + PATH, headers=TOKEN).status_code == 405


def test_it_is_no_part_of_the_public_api(pair: tuple[list[Mock], Process]) -> None:
    _, front = pair
    schema = httpx.get(front.url + "/openapi.json", headers={"Authorization": "Bearer the-key"}).text
    assert "/v1/models" in schema
    assert "internal" not in schema


def test_streams_are_counted_where_they_run_also_when_discovery_drops_the_replica(
    pair: tuple[list[Mock], Process],
) -> None:
    mocks, front = pair
    idle = {mock.url: ("routable", 0) for mock in mocks}
    assert report(front) == idle
    body = chat(script(tokens=3, hold_after=1), stream=True)
    headers = {"Authorization": "Bearer the-key"}
    with httpx.stream("POST", front.url + "/v1/chat/completions", json=body, headers=headers, timeout=20) as response:
        chunks = sse(response)
        next(chunks)
        busy = next(mock for mock in mocks if mock.state()["running"])
        assert report(front) == idle | {busy.url: ("routable", 1)}
        busy.set(ready=False)
        eventually(lambda: report(front)[busy.url] == ("draining", 1))
    # The client has gone, so nothing runs there, and the replica is not known any more.
    eventually(lambda: busy.url not in report(front))
    busy.set(ready=True)
    eventually(lambda: report(front) == idle)


def test_a_replica_that_fails_is_suspect_and_well_again_after_a_request() -> None:
    with ExitStack() as stack:
        mocks = [stack.enter_context(mock_worker(name, "--token", "the-token")) for name in "ab"]
        front = stack.enter_context(router(*(mock.url for mock in mocks), env=ENV))
        headers = {"Authorization": "Bearer the-key"}
        content = script(status=500, only="a")
        for _ in range(6):
            assert post(front.url, chat(content), headers=headers).status_code == 200
            if front.messages("breaker"):
                break
        opened = front.messages("breaker")[0]
        assert (opened["replica"], opened["to"], opened["reason"]) == (mocks[0].url, "open", "worker_error")
        # It answers `/ready`, so a request tries it, and then it is well.
        eventually(lambda: front.messages("breaker")[-1]["to"] == "half_open")
        assert report(front)[mocks[0].url][0] == "suspect"
        before = mocks[0].state()["executed"]
        assert post(front.url, chat("hello"), headers=headers).status_code == 200
        assert mocks[0].state()["executed"] == before + 1, "the next request is the one that tests it"
        assert report(front)[mocks[0].url] == ("routable", 0)
        metrics = httpx.get(front.url + "/metrics").text
        assert 'wherry_router_breaker_openings_total{reason="worker_error"} 1.0' in metrics
        assert 'wherry_router_breakers{state="closed"} 2.0' in metrics


def test_a_router_that_shuts_down_says_so(pair: tuple[list[Mock], Process]) -> None:
    mocks, _ = pair
    with ExitStack() as stack:
        front = stack.enter_context(router(mocks[0].url, env=ENV))
        body = chat(script(tokens=30, pause_s=0.05), stream=True)
        done: list[bytes] = []

        def ask() -> None:
            headers = {"Authorization": "Bearer the-key"}
            done.append(httpx.post(front.url + "/v1/chat/completions", json=body, headers=headers, timeout=20).content)

        asking = threading.Thread(target=ask)
        asking.start()
        eventually(lambda: report(front)[mocks[0].url][1] == 1)
        front.signal(15)
        eventually(lambda: httpx.get(front.url + PATH, headers=TOKEN).json()["draining"])
        assert report(front)[mocks[0].url] == ("routable", 1), "the operator must wait for what runs here"
        asking.join(20)
        assert done[0].endswith(b"data: [DONE]\n\n")
        assert front.wait() == 0
        assert "the-token" not in json.dumps(front.lines())
