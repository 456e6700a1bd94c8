"""Fixtures of the integration tests: one control plane for all of them, a namespace for each."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from tests.operator.control_plane import ControlPlane
from tests.operator.harness import Kube, Kubelet, OperatorProcess, eventually, grant

ROOT = Path(__file__).resolve().parents[2]
CRD = ROOT / "crds" / "inference.wherry.dev_llmdeployments.yaml"


@pytest.fixture(scope="session")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A control plane that knows LLMDeployments."""
    plane = ControlPlane(tmp_path_factory.mktemp("control-plane"))
    try:
        plane.start()
        kube = Kube(plane, "default")
        kube.create("customresourcedefinitions", yaml.safe_load(CRD.read_text()))
        eventually(lambda: kube.items("llmdeployments") == [], "the CRD is served")
        kube.http.close()
        yield plane
    finally:
        plane.stop()


@pytest.fixture
def kube(plane: ControlPlane, request: pytest.FixtureRequest) -> Iterator[Kube]:
    """A client in a new namespace that enforces Pod Security `restricted`."""
    name = "t-" + re.sub(r"[^a-z0-9]+", "-", request.node.name.lower())[:50].strip("-")
    kube = Kube(plane, name)
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    kube.create("namespaces", {"metadata": {"name": name, "labels": labels}})
    grant(kube)
    yield kube
    kube.http.close()


@pytest.fixture
def start_operator(plane: ControlPlane, kube: Kube) -> Iterator[Callable[..., OperatorProcess]]:
    """Starts operators; they are killed at the end, and their logs must name no fault of their own."""
    started: list[OperatorProcess] = []

    def start(user: str = "operator-a", *more: str) -> OperatorProcess:
        operator = OperatorProcess(plane, kube.namespace, user, *more)
        started.append(operator)
        return operator.start()

    yield start
    for operator in started:
        operator.kill()
        assert "a fault of the operator" not in operator.text(), operator.text()[-5000:]
        assert "Traceback" not in operator.text(), operator.text()[-5000:]


@pytest.fixture
def operator(start_operator: Callable[..., OperatorProcess]) -> OperatorProcess:
    """One operator that serves the namespace."""
    return start_operator()


@pytest.fixture
def kubelet(kube: Kube) -> Iterator[Kubelet]:
    """Pods get ready as soon as they exist."""
    with Kubelet(kube) as kubelet:
        yield kubelet
