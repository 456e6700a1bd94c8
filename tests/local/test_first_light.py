"""The whole of Wherry on the local control plane: from `kubectl apply` to tokens in an OpenAI client."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
from tests.local.harness import TestCluster, eventually

from wherry_local.paths import project_root
from wherry_local.processes import marked

EXAMPLE = project_root() / "examples" / "llmdeployment.yaml"
SELECTOR = "inference.wherry.dev/deployment=chat"
PROMPTS = [f"Explain the number {number} in one sentence." for number in range(10)]
TOKENS = 24


@pytest.fixture(scope="module")
def wherry(three_nodes: TestCluster) -> Iterator[TestCluster]:
    three_nodes.kubectl("apply", "-f", str(EXAMPLE))
    three_nodes.kubectl("wait", "--for=condition=Ready", "llmdeployment/chat", "--timeout=120s")
    yield three_nodes
    three_nodes.kubectl("delete", "llmdeployment/chat", "--ignore-not-found", "--wait=false")


@pytest.fixture
async def client(wherry: TestCluster) -> object:
    url = wherry.get("llmdeployment", "chat")["status"]["url"]
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as opened:
        yield opened


@dataclass
class Answer:
    ids: set[str]
    text: str
    finish: str | None


async def stream(client: openai.AsyncOpenAI, prompt: str) -> Answer:
    answer = Answer(set(), "", None)
    chunks = await client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": prompt}], max_tokens=TOKENS, temperature=0, stream=True
    )
    async for chunk in chunks:
        answer.ids.add(chunk.id)
        for choice in chunk.choices:
            answer.text += choice.delta.content or ""
            answer.finish = choice.finish_reason or answer.finish
    return answer


def runtimes(cluster: TestCluster) -> list[str]:
    """Names of the runtime pods that are Ready."""
    found = []
    for item in cluster.get("pods", "-l", f"{SELECTOR},app.kubernetes.io/component=runtime").get("items", []):
        ready = {c["type"]: c["status"] for c in item["status"].get("conditions", [])}.get("Ready") == "True"
        if ready and "deletionTimestamp" not in item["metadata"]:
            found.append(item["metadata"]["name"])
    return found


def processes(cluster: TestCluster, name: str) -> list[int]:
    """Processes of the pod's container, without the shim that watches over them."""
    item = cluster.get("pod", name)
    directory = cluster.home.node(item["spec"]["nodeName"]) / "pods" / item["metadata"]["uid"]
    run = directory / "containers" / "runtime" / str(item["status"]["containerStatuses"][0]["restartCount"])
    pids = marked("WHERRY_LOCAL_CONTAINER", str(run))
    return [pid for pid in pids if b"shim.py" not in Path(f"/proc/{pid}/cmdline").read_bytes()]


async def test_models_and_a_chat(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["tiny"]
    answer = await client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": PROMPTS[0]}], max_tokens=TOKENS, temperature=0
    )
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= TOKENS


async def test_a_hundred_streams_over_three_replicas(wherry: TestCluster, client: openai.AsyncOpenAI) -> None:
    wherry.kubectl("scale", "llmdeployment/chat", "--replicas=3")
    eventually(lambda: len(runtimes(wherry)) == 3, "three ready replicas", 60)
    wherry.kubectl("wait", "--for=condition=Ready", "llmdeployment/chat", "--timeout=60s")
    alone = {prompt: (await stream(client, prompt)).text for prompt in PROMPTS}
    assert len(set(alone.values())) > 1

    prompts = [PROMPTS[number % len(PROMPTS)] for number in range(100)]
    answers = await asyncio.gather(*(stream(client, prompt) for prompt in prompts))
    assert all(len(answer.ids) == 1 for answer in answers)
    assert len(set.union(*(answer.ids for answer in answers))) == 100
    assert {answer.finish for answer in answers} <= {"stop", "length"}
    assert [answer.text for answer in answers] == [alone[prompt] for prompt in prompts]
    served = sum('"message":"answered"' in wherry.kubectl("logs", name) for name in runtimes(wherry))
    assert served == 3, "every replica took its share"


async def test_a_replica_that_freezes_and_is_killed_costs_no_request(
    wherry: TestCluster, client: openai.AsyncOpenAI
) -> None:
    eventually(lambda: len(runtimes(wherry)) >= 2, "two ready replicas", 60)
    victim = runtimes(wherry)[0]
    pids = processes(wherry, victim)
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)  # it takes requests but gives no token
    try:
        answers = await asyncio.gather(*(stream(client, prompt) for prompt in PROMPTS * 2))
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    assert all(answer.finish in ("stop", "length") and answer.text for answer in answers)

    def seen() -> bool:
        return victim not in runtimes(wherry) or wherry.container(victim)["restartCount"] > 0

    eventually(seen, "the kill to be seen")


def test_the_command_line_agrees(wherry: TestCluster) -> None:
    env = os.environ | {"WHERRY_LOCAL_HOME": str(wherry.home.root)}
    command = [sys.executable, "-m", "wherry_cli.main", "local", "status"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=True)
    assert "wherry-operator" in done.stdout
    assert "default/chat-" in done.stdout


def test_delete_leaves_nothing(wherry: TestCluster) -> None:
    wherry.kubectl("delete", "llmdeployment", "chat", "--timeout=60s")
    kinds = "pods,deployments,replicasets,services,secrets,configmaps,serviceaccounts,roles,rolebindings,pdb"

    def left() -> list[str]:
        names = wherry.kubectl("get", kinds, "-o", "name").split()
        return [name for name in names if name not in _PRESENT_IN_EVERY_NAMESPACE]

    eventually(lambda: not left(), "everything to be gone", 60)
    for number in (1, 2, 3):
        assert list((wherry.home.node(f"node-{number}") / "pods").glob("*")) == []


_PRESENT_IN_EVERY_NAMESPACE = ("configmap/kube-root-ca.crt", "serviceaccount/default", "service/kubernetes")
