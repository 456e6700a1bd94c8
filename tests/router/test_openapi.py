"""The router keeps to its own description, whatever it is sent."""

from tests.router.fuzz import KEY, complaints, fuzz
from tests.router.harness import Process, post, router


def test_schemathesis_finds_nothing(tiny_worker: Process) -> None:
    with router(tiny_worker.url, env={"WHERRY_API_KEY": KEY}) as front:
        before = complaints([tiny_worker])
        assert fuzz(front.url, "--max-examples", "40", "--seed", "1") == ""
        assert complaints([front]) == []
        assert complaints([tiny_worker]) == before
        body = {"model": "chat", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
        assert post(front.url, body, headers={"authorization": f"Bearer {KEY}"}).status_code == 200
