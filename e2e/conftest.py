"""The cluster, the installed chart, a namespace of the module's own, and a diagnosis of what fails."""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from e2e.kube import ROOT, Cluster, CommandError, eventually

STATE = ROOT / ".wherry" / "e2e"
SYSTEM = "wherry-system"
RESTRICTED = "pod-security.kubernetes.io/enforce=restricted"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.e2e)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    values = getattr(item, "funcargs", {})
    if report.failed and "cluster" in values:  # type: ignore[attr-defined]
        text = values["cluster"].diagnosis(values.get("namespace", SYSTEM))
        report.sections.append(("the cluster when it failed", text))  # type: ignore[attr-defined]
    return report


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    """The running cluster; `e2e/cluster/up` makes it."""
    images = STATE / "images.json"
    if not images.exists():
        pytest.exit("no e2e cluster: run e2e/cluster/up first (`make e2e` does)", returncode=2)
    binaries = subprocess.run(
        [ROOT / ".venv/bin/wherry", "local", "assets", "--for", "kind"], capture_output=True, check=True
    )
    return Cluster(STATE / "kubeconfig", Path(binaries.stdout.decode().strip()), json.loads(images.read_text()))


def make_namespace(cluster: Cluster, name: str) -> None:
    """A namespace that admits only what meets Pod Security `restricted`."""
    cluster.kubectl("delete", "namespace", name, "--ignore-not-found", "--wait=true", "--timeout=120s")
    cluster.kubectl("create", "namespace", name)
    cluster.kubectl("label", "namespace", name, RESTRICTED, "pod-security.kubernetes.io/warn=restricted")


def clear(cluster: Cluster) -> None:
    """Removes what a run that was cut off left behind, with no operator to take its finalizers off."""
    cluster.run("helm", "uninstall", "wherry", "-n", SYSTEM, "--ignore-not-found", "--wait")
    if "llmdeployments.inference.wherry.dev" not in cluster.kubectl("get", "crds", "-o", "name"):
        return
    for left in json.loads(cluster.kubectl("get", "llmd", "-A", "-o", "json"))["items"]:
        where = left["metadata"]["namespace"]
        cluster.patch(where, left["metadata"]["name"], {"metadata": {"finalizers": None}})
        cluster.kubectl("-n", where, "delete", "llmd", left["metadata"]["name"], "--ignore-not-found")


Install = Callable[..., None]


@pytest.fixture(scope="module")
def install(cluster: Cluster) -> Iterator[Install]:
    """Installs or upgrades the chart with more settings; uninstalled after the module, and nothing of it may stay."""
    clear(cluster)
    make_namespace(cluster, SYSTEM)

    def helm_install(*settings: str) -> None:
        chosen = []
        for target, reference in cluster.images.items():
            repository, _, tag = reference.rpartition(":")
            chosen += [f"images.{target}.repository={repository}", f"images.{target}.tag={tag}"]
        arguments = [f"--set={setting}" for setting in (*chosen, *settings)]
        chart = str(ROOT / "charts" / "wherry")
        cluster.run(
            "helm", "upgrade", "--install", "wherry", chart, "-n", SYSTEM, "--wait", "--timeout=180s", *arguments
        )

    yield helm_install
    cluster.run("helm", "uninstall", "wherry", "-n", SYSTEM, "--wait")
    kinds = "deployments,pods,services,serviceaccounts,roles,rolebindings"
    labels = "app.kubernetes.io/instance=wherry"

    def gone() -> bool:
        left = cluster.get(SYSTEM, kinds, "-l", labels)["items"]
        left += json.loads(cluster.kubectl("get", "clusterroles,clusterrolebindings", "-l", labels, "-o", "json"))[
            "items"
        ]
        assert not left, [f"{o['kind']}/{o['metadata']['name']}" for o in left]
        return True

    eventually("helm uninstall to leave nothing", gone, 60)


@pytest.fixture(scope="module")
def namespace(cluster: Cluster, install: Install, request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace of the module's own. It goes before the operator does, which has to take its finalizers off."""
    name = request.module.__name__.rpartition(".")[2].replace("_", "-")
    make_namespace(cluster, name)
    yield name
    try:
        cluster.kubectl("-n", name, "delete", "llmd", "--all", "--timeout=120s")
    except CommandError:
        print(cluster.diagnosis(name))
        raise
    cluster.kubectl("delete", "namespace", name, "--wait=false")
