"""Keys and TLS from Secrets, all of it real: operator, node, router. Missing first, then there, then changed."""

import ssl
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from tests.local.harness import TestCluster, eventually
from tests.router.certificates import WORKERS, Authority, pair

AUTHORITY = Authority()
ALICE, BOB = "wk-alice-0123456789abcdef", "wk-bob-0123456789abcdef"
SPEC: dict[str, Any] = {
    "model": {"name": "tiny", "uri": "sample://tiny"},
    "replicas": 1,
    "workerTLS": {"secretName": "chat-workers"},
    "dtype": "float32",
    "batching": {"kvCacheMemory": "64Mi"},
    "router": {
        "auth": {"secretName": "chat-keys"},
        "limits": {"perTenant": {"requestsPerMinute": 3}},
        "tls": {"secretName": "chat-tls"},
    },
    "resources": {"requests": {"cpu": "100m", "memory": "512Mi"}, "limits": {"memory": "1Gi"}},
}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}


@pytest.fixture(scope="module")
def wherry(three_nodes: TestCluster) -> Iterator[TestCluster]:
    body = {"apiVersion": "inference.wherry.dev/v1alpha1", "kind": "LLMDeployment"}
    three_nodes.apply(body | {"metadata": {"name": "chat"}, "spec": SPEC})
    yield three_nodes
    secrets = [f"secret/chat-{name}" for name in ("keys", "tls", "workers")]
    three_nodes.kubectl("delete", "llmdeployment/chat", *secrets, "--ignore-not-found", "--wait=false")


def secret(name: str, **entries: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": entries}


def condition(cluster: TestCluster, name: str) -> dict[str, Any]:
    found = cluster.get("llmdeployment", "chat").get("status", {}).get("conditions", [])
    return next((c for c in found if c["type"] == name), {})


def address_of(cluster: TestCluster, component: str) -> str:
    found = cluster.get("pods", "-l", f"app.kubernetes.io/component={component}")["items"]
    return str(found[0]["status"]["podIP"])


def refuses_strangers(worker: str) -> bool:
    """Whether a worker answers on its port for probes only: elsewhere nobody without TLS or without a certificate."""
    assert httpx.get(f"http://{worker}:8002/ready").status_code == 200
    for url in (f"http://{worker}:8000/ready", f"https://{worker}:8000/ready"):
        with pytest.raises(httpx.HTTPError):
            httpx.get(url, verify=False)
    return True


def test_secrets_that_are_missing_then_there_then_changed(wherry: TestCluster) -> None:
    def told(name: str, reason: str, text: str) -> bool:
        found = condition(wherry, name)
        return found.get("reason") == reason and text in found["message"]

    eventually(lambda: told("RouterReady", "SecretNotFound", "'chat-keys' of spec.router.auth"), "the missing key", 60)
    assert "'chat-tls' of spec.router.tls does not exist" in condition(wherry, "Degraded")["message"]
    assert "'chat-workers' of spec.workerTLS does not exist" in condition(wherry, "Degraded")["message"]
    found = pair()
    wherry.apply(secret("chat-keys", alice=ALICE), secret("chat-tls", **{"tls.crt": found.cert, "tls.key": found.key}))
    # The workers' is there and cannot be used: nobody starts with it, or without.
    wherry.apply(secret("chat-workers", **AUTHORITY.secret("else-workers.default.svc")))
    eventually(lambda: told("Degraded", "SecretInvalid", f"not valid for '{WORKERS}'"), "what is wrong with it", 60)
    between = AUTHORITY.secret()
    wherry.apply(secret("chat-workers", **between))
    eventually(lambda: condition(wherry, "Ready").get("status") == "True", "the deployment to be ready", 120)
    assert condition(wherry, "Degraded")["status"] == "False"
    status = wherry.get("llmdeployment", "chat")["status"]
    assert status["url"].startswith("https://")
    address = address_of(wherry, "router")
    context = ssl.create_default_context(cadata=found.cert)
    context.check_hostname = False  # it names 127.0.0.1, and a pod of local mode has another loopback address
    with httpx.Client(base_url=f"https://{address}:8080", verify=context, timeout=30) as client:

        def ask(key: str) -> int:
            headers = {"Authorization": f"Bearer {key}"}
            return client.post("/v1/chat/completions", json=CHAT, headers=headers).status_code

        assert [ask(ALICE), ask(BOB)] == [200, 401]
        wherry.kubectl("delete", "secret", "chat-keys")
        wherry.apply(secret("chat-keys", bob=BOB))
        eventually(
            lambda: client.get("/v1/models", headers={"Authorization": f"Bearer {BOB}"}).status_code == 200, "bob"
        )
        assert [ask(ALICE), ask(BOB), ask(BOB), ask(BOB), ask(BOB)] == [401, 200, 200, 200, 429]
    logs = wherry.kubectl("logs", "-l", "app.kubernetes.io/component=router", "--tail=-1")
    everything = logs + str(wherry.get("llmdeployment", "chat")) + str(wherry.get("events"))
    assert "API keys read" in logs
    assert refuses_strangers(address_of(wherry, "runtime"))
    for canary in (ALICE, BOB, found.key.splitlines()[1], between["tls.key"].splitlines()[1]):
        assert canary not in everything
