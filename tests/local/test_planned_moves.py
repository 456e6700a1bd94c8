"""Planned moves under continuous streams, all of it real: engines, routers, operator, scheduler, kubectl drain."""

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import openai
import pytest
from tests.local.harness import TestCluster, eventually

pytestmark = pytest.mark.alone

CLIENTS = 4
TOKENS = 160
PROMPTS = [f"Tell me all about the number {number}." for number in range(CLIENTS)]
CHOSEN = "inference.wherry.dev/deployment=chat,app.kubernetes.io/component"
SPEC: dict[str, Any] = {
    "model": {"name": "tiny", "uri": "sample://tiny"},
    "replicas": 2,
    "dtype": "float32",
    "batching": {"kvCacheMemory": "64Mi"},
    "router": {"replicas": 2},
    "rolloutStrategy": {"drainTimeout": "30s"},
    "resources": {"requests": {"cpu": "100m", "memory": "512Mi"}, "limits": {"memory": "1Gi"}},
}


@pytest.fixture(scope="module")
def wherry(three_nodes: TestCluster) -> Iterator[TestCluster]:
    body = {"apiVersion": "inference.wherry.dev/v1alpha1", "kind": "LLMDeployment"}
    three_nodes.apply(body | {"metadata": {"name": "chat"}, "spec": SPEC})
    settled(three_nodes)
    yield three_nodes
    three_nodes.kubectl("delete", "llmdeployment", "chat", "--wait=false")


def settled(cluster: TestCluster) -> None:
    """Waits until nothing is left to do."""

    def done() -> bool:
        raw = cluster.get("llmdeployment", "chat")
        status = raw.get("status", {})
        ready = {c["type"]: c for c in status.get("conditions", [])}.get("Ready", {})
        current = ready.get("observedGeneration") == raw["metadata"]["generation"]
        return current and ready.get("status") == "True" and not status.get("plan")

    eventually(done, "the deployment is settled", timeout_s=120)


def pods(cluster: TestCluster, component: str) -> dict[str, dict[str, Any]]:
    items = cluster.get("pods", "-l", f"{CHOSEN}={component}").get("items", [])
    return {pod["metadata"]["uid"]: pod for pod in items if "deletionTimestamp" not in pod["metadata"]}


class Streams:
    """Clients that stream one answer after the other and compare each with the first one to the same prompt."""

    def __init__(self, url: str) -> None:
        self.client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        self.whole = 0
        self.failures: list[str] = []
        self._expected: dict[str, str] = {}
        self._stop = False

    async def _answer(self, prompt: str) -> str:
        text, finish = "", None
        chunks = await self.client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": prompt}], max_tokens=TOKENS, temperature=0, stream=True
        )
        async for chunk in chunks:
            for choice in chunk.choices:
                text += choice.delta.content or ""
                finish = choice.finish_reason or finish
        return f"{text}|{finish}"

    async def expect(self) -> None:
        for prompt in PROMPTS:
            self._expected[prompt] = await self._answer(prompt)

    async def run(self, prompt: str) -> None:
        while not self._stop:
            try:
                answer = await self._answer(prompt)
            except openai.OpenAIError as error:
                self.failures.append(repr(error))
                continue
            if answer == self._expected[prompt]:
                self.whole += 1
            else:
                self.failures.append(f"{answer[:80]!r} instead of {self._expected[prompt][:80]!r}")

    def stop(self) -> None:
        self._stop = True


@contextlib.asynccontextmanager
async def streaming(cluster: TestCluster) -> AsyncIterator[Streams]:
    streams = Streams(cluster.get("llmdeployment", "chat")["status"]["url"])
    async with streams.client:
        await streams.expect()
        tasks = [asyncio.create_task(streams.run(prompt)) for prompt in PROMPTS]
        try:
            yield streams
        finally:
            streams.stop()
            await asyncio.gather(*tasks)
    assert streams.failures == []
    assert streams.whole >= CLIENTS


def edit(cluster: TestCluster, **spec: Any) -> None:
    cluster.kubectl("patch", "llmdeployment", "chat", "--type=merge", "-p", json.dumps({"spec": spec}))
    settled(cluster)


def rolling_update(cluster: TestCluster) -> None:
    before = pods(cluster, "runtime")
    edit(cluster, batching={"maxQueued": 200})
    assert not before.keys() & pods(cluster, "runtime").keys()


def scale(cluster: TestCluster) -> None:
    for replicas in (1, 3, 2):  # to the last one, by two at once, and back
        edit(cluster, replicas=replicas)
        assert len(pods(cluster, "runtime")) == replicas


def router_rollout(cluster: TestCluster) -> None:
    before, runtime = pods(cluster, "router"), pods(cluster, "runtime")
    edit(cluster, router={"resources": {"requests": {"cpu": "50m"}}})
    eventually(lambda: not before.keys() & pods(cluster, "router").keys(), "routers are exchanged", timeout_s=120)
    cluster.kubectl("rollout", "status", "deployment/chat-router", "--timeout=120s")
    assert pods(cluster, "runtime").keys() == runtime.keys()


def drain_of_a_node(cluster: TestCluster) -> None:
    node = next(iter(pods(cluster, "runtime").values()))["spec"]["nodeName"]
    cluster.kubectl("drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=110s")
    left = [pod["spec"]["nodeName"] for pod in pods(cluster, "runtime").values()]
    assert node not in left
    cluster.kubectl("uncordon", node)
    settled(cluster)


def restart_of_the_operator(cluster: TestCluster) -> None:
    def facts() -> dict[str, int]:
        found = pods(cluster, "runtime") | pods(cluster, "router")
        return {uid: pod["status"]["containerStatuses"][0]["restartCount"] for uid, pod in found.items()}

    before = facts()
    [process] = [p for p in cluster.processes() if "wherry-operator" in command_line(p)]
    os.kill(process, signal.SIGKILL)
    eventually(lambda: any("wherry-operator" in command_line(p) for p in cluster.processes() if p != process), "again")
    edit(cluster, rolloutStrategy={"maxSurge": 2})
    assert facts() == before


def command_line(process: int) -> str:
    try:
        with open(f"/proc/{process}/cmdline", "rb") as file:
            return file.read().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


MOVES: list[Callable[[TestCluster], None]] = [
    rolling_update,
    scale,
    drain_of_a_node,
    router_rollout,
    restart_of_the_operator,
]


@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.__name__)
async def test_no_stream_notices(move: Callable[[TestCluster], None], wherry: TestCluster) -> None:
    async with streaming(wherry) as streams:
        await asyncio.to_thread(move, wherry)
    print(f"{move.__name__}: {streams.whole} streams whole")
