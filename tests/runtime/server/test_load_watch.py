"""A worker's load as it is pushed: at once, whole, and true of its prefix cache."""

import time
from collections.abc import Iterator

import httpx
import pytest
from tests.router.harness import MODEL, Process, eventually, worker

from wherry_protocol.prefix import prefix_keys, unpack_keys, written_out
from wherry_protocol.sse import decode_load
from wherry_protocol.worker import LoadReport, Prompt

TOKEN = {"Authorization": "Bearer worker-secret"}
TEXT = "The ferry goes across the river. " * 20


@pytest.fixture(scope="module")
def one() -> Iterator[Process]:
    # A cache of 2048 tokens, so that a few prompts fill it.
    args = ("--kv-cache-bytes", str(2048 * 8192), "--max-model-len", "1024")
    with worker(*args, env={"WHERRY_WORKER_TOKEN": "worker-secret"}) as process:
        yield process


class Watch:
    """What a router makes of the stream."""

    def __init__(self, response: httpx.Response) -> None:
        self._lines = response.iter_text()
        self._rest = ""
        self.keys: set[int] | None = None
        self.load: LoadReport | None = None
        self.comments = 0

    def read(self) -> None:
        """The next event or comment."""
        while "\n\n" not in self._rest:
            self._rest += next(self._lines)
        frame, self._rest = self._rest.split("\n\n", 1)
        update = decode_load(frame.encode())
        if update is None:
            self.comments += 1
            return
        self.load = update.load
        if update.prefixes is not None:
            before = set() if update.prefixes.whole or self.keys is None else self.keys
            self.keys = (before - set(unpack_keys(update.prefixes.removed))) | set(unpack_keys(update.prefixes.added))

    def to_the_end(self) -> None:
        for _ in self._lines:
            pass

    def until(self, met: object) -> None:
        for _ in range(400):
            if met():  # type: ignore[operator]
                return
            self.read()
        raise AssertionError(f"not within 400 events; {self.keys} {self.load}")


def execute(process: Process, text: str) -> httpx.Response:
    body = {"id": text[-20:], "model": MODEL, "prompt": {"text": text}, "sampling": {"max_tokens": 4}}
    return httpx.post(process.url + "/execute", json=body, headers=TOKEN, timeout=60)


def test_load_and_prefixes_are_told_as_they_change(one: Process) -> None:
    keys = prefix_keys(written_out(Prompt(text=TEXT)), MODEL)
    with httpx.stream("GET", one.url + "/load/watch", headers=TOKEN, timeout=20) as response:
        assert response.status_code == 200
        watch = Watch(response)
        watch.read()
        assert watch.keys is not None, "the first event has all prefixes"
        assert not watch.keys & set(keys)
        assert execute(one, TEXT).status_code == 200
        # All but the last, whose block has the last tokens and need not be full.
        watch.until(lambda: watch.keys is not None and watch.keys >= set(keys[:-1]))
        watch.until(lambda: watch.load is not None and watch.load.running == 0)
        watch.until(lambda: watch.comments)
        number = 0
        while watch.keys & set(keys):
            number += 1
            assert number < 40, "evicted blocks stay in the digest"
            assert execute(one, f"{number} is another prompt. " * 35).status_code == 200
            seen = prefix_keys(written_out(Prompt(text=f"{number} is another prompt. " * 35)), MODEL)
            watch.until(lambda seen=seen: watch.keys is not None and seen[0] in watch.keys)
    with httpx.stream("GET", one.url + "/load/watch", headers=TOKEN, timeout=20) as response:
        late = Watch(response)
        late.read()
        assert late.keys == watch.keys, "who comes later learns the same"


def test_a_stream_needs_the_token_and_ends_when_the_worker_is_told_to_stop() -> None:
    with worker(env={"WHERRY_WORKER_TOKEN": "worker-secret"}) as process:
        assert httpx.get(process.url + "/load/watch").status_code == 401
        assert httpx.post(process.url + "/load/watch", headers=TOKEN).status_code == 405
        with httpx.stream("GET", process.url + "/load/watch", headers=TOKEN, timeout=20) as response:
            watch = Watch(response)
            watch.read()
            began = time.monotonic()
            process.signal(15)
            watch.to_the_end()
        process.wait()
        assert time.monotonic() - began < 10
        eventually(lambda: process.messages("state")[-1]["state"] == "draining")
