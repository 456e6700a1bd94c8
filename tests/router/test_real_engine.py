"""The router in front of real engines: concurrency, cancellation, odd input."""

import asyncio
import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.router.harness import MODEL, TINY, Process, chat, eventually, post, router, text_of, worker

from wherry_protocol.engine_config import fingerprint, from_args


@pytest.fixture(scope="module")
def three(tiny_worker: Process) -> Iterator[Process]:
    """A router over three real workers, one of them the shared one."""
    with ExitStack() as stack:
        urls = [tiny_worker.url, *(stack.enter_context(worker("--max-running", "32")).url for _ in range(2))]
        yield stack.enter_context(router(*urls))


def load(process: Process) -> dict[str, Any]:
    return dict(httpx.get(process.url + "/load", timeout=10).json())


def test_answers_of_replicas_with_another_model_are_passed_on_and_not_kept() -> None:
    """As during a rollout: two workers whose settings differ, and a router that is of the one's version."""
    with worker("--kv-cache-dtype=float32") as new, worker("--kv-cache-dtype=int8") as old:
        uri = f"--model-uri=file://{TINY}"
        version = fingerprint(from_args([f"--model-name={MODEL}", uri, "--dtype=float32", "--kv-cache-dtype=float32"]))
        args = ("--response-cache-bytes", "1048576", "--response-cache-version", version)
        for process, expected in ((new, ["miss", "hit"]), (old, ["miss", "miss"])):
            with router(process.url, args=args) as front:
                body = chat("Tell me about boats.", max_tokens=5, temperature=0)
                assert [post(front.url, body).headers["x-wherry-cache"] for _ in range(2)] == expected


async def test_a_hundred_real_streams_give_the_sequential_answers(three: Process) -> None:
    topics = (
        "boats",
        "cooking rice",
        "a C compiler",
        "licences",
        "mountains",
        "tax",
        "Linux",
        "music",
        "printers",
        "love",
    )
    questions = [f"Explain {topic} to me." for topic in topics]
    options: dict[str, Any] = {"max_tokens": 10, "temperature": 0}
    alone = [post(three.url, chat(q, **options)).json()["choices"][0]["message"]["content"] for q in questions]
    assert len(set(alone)) > 3
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=100), trust_env=False) as client:

        async def one(number: int) -> None:
            body = chat(questions[number % 10], stream=True, **options)
            text = last = ""
            async with client.stream("POST", three.url + "/v1/chat/completions", json=body) as response:
                assert response.status_code == 200
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        text += text_of([json.loads(line[6:])])
                    last = line or last
            assert last == "data: [DONE]"
            assert text == alone[number % 10]

        await asyncio.gather(*(one(number) for number in range(100)))


def test_a_client_that_leaves_frees_the_engine(tiny_worker: Process, tiny_router: Process) -> None:
    body = chat("Tell me everything.", stream=True, ignore_eos=True, n=3)
    with httpx.stream("POST", tiny_router.url + "/v1/chat/completions", json=body, timeout=30) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data:")
        eventually(lambda: load(tiny_worker)["running"] == 3)
    eventually(lambda: load(tiny_worker)["running"] + load(tiny_worker)["waiting"] == 0, 5)
    assert load(tiny_worker)["kv_tokens_used"] >= 0


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1),
    "top_k": st.integers(-1, 2**31 - 1),
    "min_p": st.floats(0, 1),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0, 10),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "stop": st.one_of(st.text(max_size=5), st.lists(st.text(max_size=5), max_size=5)),
    "stop_token_ids": st.lists(st.integers(0, 2**31 - 1), max_size=3),
    "logit_bias": st.dictionaries(st.integers(0, 10_000).map(str), st.floats(-100, 100), max_size=4),
    "min_tokens": st.integers(0, 2**31 - 1),
    "ignore_eos": st.booleans(),
    "n": st.integers(1, 3),
    "logprobs": st.booleans(),
    "top_logprobs": st.integers(0, 20),
    "stream": st.booleans(),
    "user": st.text(max_size=10),
}
OPTIONAL = st.fixed_dictionaries({}, optional={name: st.none() | value for name, value in VALUES.items()})
CONTENT = st.text(st.characters(codec="utf-8"), max_size=40) | st.sampled_from(
    ["", "\x00", "<|im_end|>", "<|endoftext|>", "{{ 7*7 }}", "\u202e", "a" * 3000, "\U0001f600" * 50, "\ufffd\ufeff"]
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(change=OPTIONAL, content=CONTENT)
def test_no_field_ends_the_engine(tiny_router: Process, change: dict[str, Any], content: str) -> None:
    response = post(tiny_router.url, chat(content, max_tokens=3, **change), timeout=60)
    assert response.status_code in (200, 400), response.text
    if change.get("stream") and response.status_code == 200:
        assert response.text.endswith("data: [DONE]\n\n"), response.text
    elif response.status_code == 200:
        logprobs = [c["logprobs"] for c in response.json()["choices"] if c["logprobs"]]
        assert all(math.isfinite(position["logprob"]) for entry in logprobs for position in entry["content"])


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompt=CONTENT | st.lists(st.integers(0, 2**31 - 1), max_size=4) | st.lists(CONTENT, max_size=3),
    logprobs=st.none() | st.integers(0, 20),
)
def test_no_prompt_ends_the_engine(tiny_router: Process, prompt: Any, logprobs: int | None) -> None:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 2, "logprobs": logprobs}
    response = httpx.post(tiny_router.url + "/v1/completions", json=body, timeout=60)
    assert response.status_code in (200, 400), response.text


def test_the_engine_still_answers_after_all_that(tiny_worker: Process, tiny_router: Process) -> None:
    assert post(tiny_router.url, chat("Hello", max_tokens=4)).json()["usage"]["completion_tokens"] > 0
    assert httpx.get(tiny_worker.url + "/health").status_code == 200
