"""Streams over real engines whose workers are killed, frozen and told to stop: every answer is the undisturbed one."""

import signal
import threading
from typing import Any

import httpx
import pytest
from tests.router.harness import MODEL, Process, chat, eventually, post, router, sse, workers

pytestmark = pytest.mark.alone

LONG: dict[str, Any] = {"max_tokens": 900, "ignore_eos": True}  # some seconds of work, in which three workers go
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", chat("Tell me of boats.", temperature=0, **LONG)),
    ("/v1/chat/completions", chat("Tell me of rice.", seed=1, n=2, **LONG)),
    ("/v1/chat/completions", chat("Tell me of tax.", seed=2, presence_penalty=1, frequency_penalty=0.5, **LONG)),
    ("/v1/chat/completions", chat("Tell me of love.", seed=3, logprobs=True, top_logprobs=2, top_p=0.9, **LONG)),
    ("/v1/chat/completions", chat("Über 日本 😀?", seed=4, stop=["zebra crossing"], repetition_penalty=1.2, **LONG)),
    ("/v1/completions", {"model": MODEL, "prompt": "1 2 3 4", "seed": 5, "logprobs": 1, **LONG}),
    ("/v1/completions", {"model": MODEL, "prompt": ["def f(", "class A:"], "seed": 6, "min_tokens": 840, **LONG}),
]
Answer = dict[int, tuple[str, str | None, list[str]]]


def answer_of(chunks: list[dict[str, Any]]) -> Answer:
    """By choice: text, finish reason, and the tokens of the log-probabilities."""
    found: Answer = {}
    for chunk in chunks:
        if "error" in chunk:
            raise AssertionError(chunk)
        for choice in chunk.get("choices", []):
            text, reason, tokens = found.get(choice["index"], ("", None, []))
            text += choice.get("text") or choice.get("delta", {}).get("content") or ""
            logprobs = choice.get("logprobs") or {}
            tokens = [*tokens, *logprobs.get("tokens", ()), *(p["token"] for p in logprobs.get("content") or ())]
            found[choice["index"]] = text, choice["finish_reason"] or reason, tokens
    return found


class Reader(threading.Thread):
    def __init__(self, front: Process, path: str, body: dict[str, Any]) -> None:
        super().__init__()
        self.chunks: list[dict[str, Any]] = []
        self._url, self._body = front.url + path, body | {"stream": True}
        self.start()

    def run(self) -> None:
        with httpx.stream("POST", self._url, json=self._body, timeout=120) as response:
            for chunk in sse(response):
                self.chunks.append(chunk)


def undisturbed(front: Process) -> list[Answer]:
    readers = [Reader(front, path, body) for path, body in REQUESTS]
    for reader in readers:
        reader.join(120)
    return [answer_of(reader.chunks) for reader in readers]


def resumed(front: Process) -> float:
    lines = httpx.get(front.url + "/metrics").text.splitlines()
    return sum(float(x.rsplit(" ", 1)[1]) for x in lines if x.startswith("wherry_router_streams_resumed_total"))


def busy(processes: list[Process]) -> Process:
    """The one with most running requests."""

    def most() -> Process | None:
        loads = [(httpx.get(p.url + "/load", timeout=10).json()["running"], i, p) for i, p in enumerate(processes)]
        return max(loads)[2] if max(loads)[0] else None

    return eventually(most)


def test_every_answer_is_the_undisturbed_one() -> None:
    with workers(4, "--drain-timeout-s", "0") as alive, router(*(process.url for process in alive)) as front:
        expected = undisturbed(front)
        assert sum(len(answer) for answer in expected) == 9
        readers = [Reader(front, path, body) for path, body in REQUESTS]
        eventually(lambda: min(len(reader.chunks) for reader in readers) > 10, 60)
        for how in (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP):
            victim = busy(alive)
            before = resumed(front)
            victim.signal(how)
            alive.remove(victim)
            eventually(lambda b=before: resumed(front) > b, 30)
        for reader in readers:
            reader.join(120)
        for (path, body), reader, answer in zip(REQUESTS, readers, expected, strict=True):
            assert answer_of(reader.chunks) == answer, (path, body)
            assert reader.chunks[-1] == {}
        assert resumed(front) >= 3


def test_a_whole_answer_goes_on_elsewhere() -> None:
    with workers(2) as pair, router(*(process.url for process in pair)) as front:
        body = chat("Tell me of boats.", seed=1, logprobs=True, **LONG)
        expected = post(front.url, body).json()["choices"][0]
        answers: list[dict[str, Any]] = []
        thread = threading.Thread(target=lambda: answers.append(post(front.url, body, timeout=60).json()))
        thread.start()
        victim = busy(pair)
        eventually(lambda: httpx.get(victim.url + "/load").json()["completion_tokens_total"] > 20)
        victim.kill()
        thread.join(60)
        choice = answers[0]["choices"][0]
        assert choice["message"] == expected["message"]
        assert [p["token"] for p in choice["logprobs"]["content"]] == [
            p["token"] for p in expected["logprobs"]["content"]
        ]
        assert answers[0]["usage"]["completion_tokens"] == LONG["max_tokens"]
