"""Streams: unbuffered, held back by slow clients, cancelled when the client leaves, never mixed up."""

import asyncio
import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from urllib.parse import urlsplit

import httpx
import pytest
from tests.router.harness import Mock, Process, chat, eventually, mock_worker, post, router, script, sse, text_of


@pytest.fixture(scope="module")
def trio() -> Iterator[tuple[list[Mock], Process]]:
    with ExitStack() as stack:
        mocks = [stack.enter_context(mock_worker(name)) for name in "abc"]
        yield mocks, stack.enter_context(router(*(mock.url for mock in mocks)))


def total(mocks: list[Mock], what: str) -> int:
    return sum(mock.state()[what] for mock in mocks)


def test_the_first_chunk_comes_while_the_worker_still_generates(trio: tuple[list[Mock], Process]) -> None:
    mocks, front = trio
    body = chat(script(tokens=3, hold_after=1), stream=True)
    with httpx.stream("POST", front.url + "/v1/chat/completions", json=body, timeout=20) as response:
        chunks = sse(response)
        assert next(chunks)["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert next(chunks)["choices"][0]["delta"]["content"].endswith("|0 ")
        assert total(mocks, "running") == 1
    eventually(lambda: total(mocks, "running") == 0)


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("fields", [{"hold": True}, {"tokens": 5, "hold_after": 2}])
def test_a_client_that_leaves_cancels_upstream(
    trio: tuple[list[Mock], Process], streamed: bool, fields: dict[str, object]
) -> None:
    mocks, front = trio
    cancelled = total(mocks, "cancelled")
    data = json.dumps(chat(script(**fields), stream=streamed, n=2)).encode()
    address = urlsplit(front.url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data)
        connection.sendall(head + data)
        eventually(lambda: total(mocks, "running") == 2)
    eventually(lambda: total(mocks, "running") == 0, 5)
    assert total(mocks, "cancelled") == cancelled + 2
    metrics = httpx.get(front.url + "/metrics").text
    assert "wherry_router_outstanding_tokens 0.0" in metrics
    assert "wherry_router_requests_in_flight 0.0" in metrics


def test_a_slow_client_holds_the_worker_back(trio: tuple[list[Mock], Process]) -> None:
    mocks, front = trio
    before = total(mocks, "tokens_sent")
    data = json.dumps(chat(script(tokens=4000, text="x" * 16_000), stream=True)).encode()
    address = urlsplit(front.url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32_768)
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data)
        connection.sendall(head + data)
        assert connection.recv(100)
        previous = [-1]

        def still() -> bool:
            now = total(mocks, "tokens_sent") - before
            same = now == previous[0] > 0
            previous[0] = now
            return same

        eventually(still)
        # 64 MB were asked for; what is under way is what the sockets' buffers hold.
        assert total(mocks, "tokens_sent") - before < 2000
        assert post(front.url, chat("hello")).status_code == 200, "nobody else waits"
    eventually(lambda: total(mocks, "running") == 0, 5)


async def test_a_hundred_streams_none_lost_none_mixed_up(trio: tuple[list[Mock], Process]) -> None:
    mocks, front = trio
    executed = [mock.state()["executed"] for mock in mocks]
    limits = httpx.Limits(max_connections=100)
    async with httpx.AsyncClient(timeout=60, limits=limits, trust_env=False) as client:

        async def one(number: int) -> None:
            body = chat(f"question-{number}", stream=True)
            text = last = ""
            async with client.stream("POST", front.url + "/v1/chat/completions", json=body) as response:
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        text += text_of([json.loads(line[6:])])
                    last = line or last
            name = text[0]
            assert text == "".join(f"{name}|question-{number}|{index} " for index in range(4))
            assert last == "data: [DONE]"

        await asyncio.gather(*(one(number) for number in range(100)))
    shares = [mock.state()["executed"] - count for mock, count in zip(mocks, executed, strict=True)]
    assert sum(shares) == 100
    assert min(shares) >= 20, "the load is spread"


def test_choices_of_one_answer_run_side_by_side(trio: tuple[list[Mock], Process]) -> None:
    _, front = trio
    body = chat("hi", stream=True, n=3, stream_options={"include_usage": True})
    with httpx.stream("POST", front.url + "/v1/chat/completions", json=body, timeout=20) as response:
        chunks = list(sse(response))
    for index in range(3):
        mine = [c for chunk in chunks for c in chunk.get("choices", []) if c["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant"
        assert mine[-1]["finish_reason"] == "stop"
        assert "".join(c["delta"].get("content") or "" for c in mine).count("|hi|") == 4
    assert chunks[-1] == {}
    assert chunks[-2]["usage"]["completion_tokens"] == 12
    assert chunks[-2]["usage"]["prompt_tokens"] == 2


def test_correlation_ids_go_through_and_back(trio: tuple[list[Mock], Process]) -> None:
    mocks, front = trio
    response = post(front.url, chat("hello"), headers={"X-Correlation-Id": "mine-1"})
    assert response.headers["x-correlation-id"] == response.headers["x-request-id"] == "mine-1"
    assert any("mine-1" in mock.state()["correlation_ids"] for mock in mocks)
    eventually(lambda: any(line.get("correlation_id") == "mine-1" for line in front.lines()))  # written soon after
    made_up = post(front.url, chat("hello"), headers={"X-Correlation-Id": "bad id {}"}).headers["x-correlation-id"]
    assert made_up != "bad id {}"
    seen = [i for mock in mocks for i in mock.state()["request_ids"]]
    assert len(seen) == len(set(seen)), "ids are unique whatever clients send"
