"""An install that serves one namespace, with no rights elsewhere."""

import pytest
from e2e.conftest import SYSTEM, Install
from e2e.kube import Cluster, CommandError, example
from e2e.load import QUESTION, client

pytestmark = pytest.mark.timeout(420)
OPERATOR = f"--as=system:serviceaccount:{SYSTEM}:wherry-operator"


@pytest.fixture(scope="module")
def installed(cluster: Cluster, install: Install, namespace: str) -> str:
    install(f"watchNamespaces={{{namespace}}}", "replicas=2", "podDisruptionBudget.enabled=true")
    return namespace


def may(cluster: Cluster, namespace: str, verb: str, *what: str) -> bool:
    try:
        return cluster.kubectl("-n", namespace, "auth", "can-i", verb, *what, OPERATOR).strip() == "yes"
    except CommandError:
        return False


def test_its_rights_end_at_the_namespace(cluster: Cluster, installed: str) -> None:
    assert may(cluster, installed, "get", "secrets")
    assert not may(cluster, installed, "list", "secrets")
    assert not may(cluster, "kube-system", "get", "secrets")
    assert not may(cluster, "default", "list", "pods")
    assert not may(cluster, installed, "create", "pods", "--subresource=exec")


def test_it_runs_a_model_there_and_only_there(cluster: Cluster, installed: str, namespace: str) -> None:
    cluster.apply("default", example(replicas=1))
    try:
        cluster.apply(installed, example(replicas=1))
        cluster.wait_ready(installed, "chat", 1)
        with cluster.service(installed, "chat") as url, client(url) as openai_client:
            answer = openai_client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=8)
        assert answer.choices[0].message.content
        assert not cluster.status("default", "chat")
        assert not cluster.pods("default")
    finally:
        cluster.kubectl("-n", "default", "delete", "llmd", "chat", "--timeout=30s")


def test_one_of_its_two_operators_leads(cluster: Cluster, installed: str) -> None:
    pods = {pod["metadata"]["name"] for pod in cluster.pods(SYSTEM, "app.kubernetes.io/name=wherry-operator")}
    holder = cluster.get(SYSTEM, "lease", "wherry-operator")["spec"]["holderIdentity"]
    assert len(pods) == 2
    assert holder.rpartition("_")[0] in pods
