"""The main job on a real cluster: install, apply, chat, scale, lose a pod, roll out, fail visibly, delete."""

from collections.abc import Iterator
from typing import Any

import pytest
from e2e.conftest import SYSTEM, Install
from e2e.kube import RUNTIME, Cluster, CommandError, eventually, example, is_ready
from e2e.load import QUESTION, Load, client

pytestmark = pytest.mark.timeout(420)


@pytest.fixture(scope="module")
def chat(cluster: Cluster, install: Install, namespace: str) -> str:
    """The example LLMDeployment, ready."""
    install()
    cluster.apply(namespace, example())
    cluster.wait_ready(namespace, "chat", 2)
    return "chat"


@pytest.fixture
def url(cluster: Cluster, namespace: str, chat: str) -> Iterator[str]:
    """The router's Service, from here."""
    with cluster.service(namespace, chat) as address:
        yield address


def identities(pods: list[dict[str, Any]]) -> dict[str, tuple[str, int]]:
    return {p["metadata"]["name"]: (p["metadata"]["uid"], restarts(p)) for p in pods}


def restarts(pod: dict[str, Any]) -> int:
    return sum(status["restartCount"] for status in pod["status"].get("containerStatuses", []))


def test_two_replicas_run_on_two_workers(cluster: Cluster, namespace: str, chat: str) -> None:
    pods = cluster.pods(namespace)
    assert len({pod["spec"]["nodeName"] for pod in pods}) == 2
    assert all(is_ready(pod) for pod in pods)


def test_kubectl_shows_and_explains_it(cluster: Cluster, namespace: str, chat: str) -> None:
    header, row = cluster.kubectl("-n", namespace, "get", "llmd").splitlines()
    for column in ("NAME", "PHASE", "READY", "DESIRED", "UP-TO-DATE", "MODEL", "URL", "AGE"):
        assert column in header
    assert row.split()[:1] == ["chat"]
    assert f"http://chat.{namespace}.svc:8000" in row
    assert "minReplicas" in cluster.kubectl("explain", "llmdeployment.spec.scaling")
    assert "chat" in cluster.kubectl("-n", namespace, "get", "all")


def test_openai_client(url: str) -> None:
    with client(url) as openai_client:
        assert [model.id for model in openai_client.models.list()] == ["tiny"]
        whole = openai_client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=24, temperature=0)
        chunks = list(
            openai_client.chat.completions.create(
                model="tiny", messages=QUESTION, max_tokens=24, temperature=0, stream=True
            )
        )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text
    assert text == whole.choices[0].message.content


def test_port_forward(cluster: Cluster, namespace: str, chat: str) -> None:
    with cluster.forward(namespace, f"service/{chat}", 8000) as address, client(address) as openai_client:
        assert [model.id for model in openai_client.models.list()] == ["tiny"]


def test_from_a_pod_through_dns_and_the_service(cluster: Cluster, namespace: str, chat: str) -> None:
    models = f"http://chat.{namespace}.svc:8000/v1/models"
    code = f"import urllib.request; print(urllib.request.urlopen({models!r}, timeout=20).read().decode())"
    container = {
        "name": "asker",
        "image": cluster.images["router"],
        "command": ["python", "-c", code],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "asker"},
        "spec": {
            "restartPolicy": "OnFailure",
            "containers": [container],
            "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        },
    }
    cluster.apply(namespace, pod)
    cluster.kubectl("-n", namespace, "wait", "pod/asker", "--for=jsonpath={.status.phase}=Succeeded", "--timeout=90s")
    assert '"tiny"' in cluster.kubectl("-n", namespace, "logs", "asker")
    cluster.kubectl("-n", namespace, "delete", "pod", "asker")


def test_scale_up_and_down(cluster: Cluster, namespace: str, chat: str) -> None:
    cluster.kubectl("-n", namespace, "scale", "llmd/chat", "--replicas=3")
    cluster.wait_ready(namespace, chat, 3)
    cluster.kubectl("-n", namespace, "scale", "llmd/chat", "--replicas=1")
    cluster.wait_ready(namespace, chat, 1)
    cluster.kubectl("-n", namespace, "scale", "llmd/chat", "--replicas=2")
    cluster.wait_ready(namespace, chat, 2)


def test_a_pod_deleted_under_load_costs_no_request(cluster: Cluster, namespace: str, url: str) -> None:
    victim = cluster.pods(namespace)[0]["metadata"]["name"]
    with Load(url) as load:
        eventually("answers", lambda: load.answered >= 4)
        cluster.kubectl("-n", namespace, "delete", "pod", victim, "--wait=false")
        eventually("the pod to be replaced", lambda: len([p for p in cluster.pods(namespace) if is_ready(p)]) == 2)
        before = load.answered
        eventually("answers afterwards", lambda: load.answered >= before + 4)
    assert not load.failures
    assert victim not in identities(cluster.pods(namespace))
    cluster.wait_ready(namespace, "chat", 2)


def test_the_operator_can_go_without_disturbing_anything(cluster: Cluster, namespace: str, url: str) -> None:
    before = identities(cluster.pods(namespace, "app.kubernetes.io/part-of=wherry"))
    with Load(url, clients=2) as load:
        old = cluster.pods(SYSTEM, "app.kubernetes.io/name=wherry-operator")[0]["metadata"]["name"]
        cluster.kubectl("-n", SYSTEM, "delete", "pod", old)
        cluster.kubectl("-n", SYSTEM, "rollout", "status", "deployment/wherry-operator", "--timeout=90s")
        # It works again: it sees an edit, and undoes it as asked.
        cluster.kubectl("-n", namespace, "scale", "llmd/chat", "--replicas=3")
        eventually("the new operator to act", lambda: len(cluster.pods(namespace)) == 3)
        cluster.kubectl("-n", namespace, "scale", "llmd/chat", "--replicas=2")
        cluster.wait_ready(namespace, "chat", 2)
    assert not load.failures
    after = identities(cluster.pods(namespace, "app.kubernetes.io/part-of=wherry"))
    assert len(before.items() & after.items()) >= len(before) - 1  # the surplus replica may be an old one


def test_a_rollout_replaces_every_pod_and_costs_no_request(cluster: Cluster, namespace: str, url: str) -> None:
    before = identities(cluster.pods(namespace))
    with Load(url, clients=2) as load:
        eventually("answers", lambda: load.answered >= 2)
        cluster.patch(namespace, "chat", {"spec": {"batching": {"maxRunning": 16}}})
        cluster.wait_ready(namespace, "chat", 2, timeout=300)
    assert not load.failures
    after = cluster.pods(namespace)
    assert not set(before) & set(identities(after))
    assert all("--max-running=16" in pod["spec"]["containers"][0]["args"] for pod in after)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("no-image", {"image": "localhost/wherry-nothing:none"}, ["Image", "wherry-nothing"]),
        ("no-model", {"model": {"name": "tiny", "uri": "file:///models/nowhere"}}, ["/models/nowhere"]),
        ("no-room", {"resources": {"requests": {"memory": "900Gi"}}}, ["memory"]),
    ],
)
def test_a_condition_names_the_cause(
    cluster: Cluster, namespace: str, install: Install, chat: str, name: str, change: dict[str, Any], words: list[str]
) -> None:
    manifest = example(replicas=1, **change)
    manifest["metadata"]["name"] = name
    cluster.apply(namespace, manifest)

    def named() -> bool:
        ready = cluster.condition(namespace, name, "Ready")
        text = f"{ready.get('reason')}: {ready.get('message')}"
        assert ready.get("status") == "False"
        assert all(word in text for word in words), text
        return True

    eventually(f"{name} to say why", named, 120)
    cluster.kubectl("-n", namespace, "delete", "llmd", name, "--timeout=90s")


def test_a_wrong_manifest_is_refused_at_once(cluster: Cluster, namespace: str, chat: str) -> None:
    with pytest.raises(CommandError, match="scaling"):
        cluster.apply(namespace, example(scaling={"minReplicas": 1, "maxReplicas": 2}))


def test_delete_leaves_nothing_behind(cluster: Cluster, namespace: str, chat: str) -> None:
    cluster.kubectl("-n", namespace, "delete", "llmd", chat, "--timeout=120s")
    kinds = "pods,services,secrets,serviceaccounts,roles,rolebindings,deployments,replicasets,endpointslices"

    def gone() -> bool:
        left = cluster.get(namespace, kinds, "-l", "app.kubernetes.io/part-of=wherry")["items"]
        assert not left, [f"{o['kind']}/{o['metadata']['name']}" for o in left]
        return True

    eventually("nothing to be left", gone, 60)
    secrets = cluster.get(namespace, "secrets")["items"]
    assert not secrets
    assert not cluster.pods(namespace, RUNTIME)
