"""up, down, and what happens when parts of the cluster die."""

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from tests.local.harness import TestCluster, eventually, local_cluster, pod, python, server
from typer.testing import CliRunner

from wherry_cli.local import app
from wherry_local.errors import LocalError
from wherry_local.paths import ENV_HOME, ENV_MARK_NODE
from wherry_local.processes import Identity, marked


def component(cluster: TestCluster, name: str) -> dict[str, Any]:
    return dict(cluster.cluster.state()["components"][name])


def node_ready(cluster: TestCluster, name: str) -> str:
    conditions = cluster.get("node", name)["status"]["conditions"]
    return str(next(c["status"] for c in conditions if c["type"] == "Ready"))


def process_of(cluster: TestCluster, name: str) -> Identity:
    identity = Identity.from_json(component(cluster, name))
    assert identity is not None
    return identity


def test_up_again_changes_nothing(cluster: TestCluster) -> None:
    before = {name: entry["pid"] for name, entry in cluster.cluster.state()["components"].items()}
    cluster.up()
    assert {name: entry["pid"] for name, entry in cluster.cluster.state()["components"].items()} == before


@pytest.mark.parametrize("name", ["kube-apiserver", "kube-scheduler", "service-forwarder"])
def test_a_killed_component_is_started_again(cluster: TestCluster, name: str) -> None:
    old = process_of(cluster, name)
    assert old.send(signal.SIGKILL)
    eventually(
        lambda: component(cluster, name)["ready"] and component(cluster, name)["pid"] != old.pid, f"{name} again"
    )
    assert component(cluster, name)["last_exit"] in ("signal SIGKILL", "ended while adopted")
    eventually(lambda: "node-1" in cluster.kubectl("get", "nodes", check=False), "the API to answer")


def test_a_new_supervisor_adopts_what_runs(cluster: TestCluster) -> None:
    before = {name: entry["pid"] for name, entry in cluster.cluster.state()["components"].items()}
    supervisor = cluster.cluster.supervisor()
    assert supervisor is not None
    supervisor.send(signal.SIGKILL)
    eventually(lambda: not cluster.cluster.running(), "the supervisor to end")
    cluster.up()
    assert {name: entry["pid"] for name, entry in cluster.cluster.state()["components"].items()} == before
    old = process_of(cluster, "kube-scheduler")
    old.send(signal.SIGKILL)
    eventually(lambda: component(cluster, "kube-scheduler")["pid"] not in (0, old.pid), "an adopted component again")


def test_a_restarted_node_adopts_its_pods(cluster: TestCluster) -> None:
    code = "import sys, time, os\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.05)\nexit(7)"
    flag = cluster.home.root / "flag-adopt"
    cluster.apply(server("kept"), pod("ends", *python(code), str(flag), restartPolicy="Never"))
    kept = cluster.wait_ready("kept")
    cluster.wait_ready("ends")
    containers = [cluster.container("kept")["containerID"], cluster.container("ends")["containerID"]]
    ended_on = cluster.get("pod", "ends")["spec"]["nodeName"]
    for name in ("node-1", "node-2"):
        node = process_of(cluster, name)
        if name == ended_on:
            node.send(signal.SIGSTOP)
            flag.touch()  # it ends while its node is not there to see it
            eventually(lambda: not _runs(cluster, "ends"), "the process to end")
        node.send(signal.SIGKILL)
    eventually(lambda: cluster.get("pod", "ends")["status"]["phase"] == "Failed", "the exit code to be found")
    assert cluster.container("ends")["state"]["terminated"]["exitCode"] == 7
    again = cluster.wait_ready("kept")
    assert again["status"]["podIP"] == kept["status"]["podIP"]
    assert [cluster.container("kept")["containerID"], cluster.container("ends")["containerID"]] == containers
    assert cluster.container("kept")["restartCount"] == 0


def _runs(cluster: TestCluster, name: str) -> bool:
    uid = cluster.get("pod", name)["metadata"]["uid"]
    node = cluster.get("pod", name)["spec"]["nodeName"]
    directory = cluster.home.node(node) / "pods" / uid / "containers" / "main" / "0"
    return bool(marked("WHERRY_LOCAL_CONTAINER", str(directory)))


def test_a_killed_node_is_lost_and_comes_back(cluster: TestCluster) -> None:
    cluster.apply(server("there", nodeName="node-2"))
    cluster.wait_ready("there")
    cluster.cluster.kill_node("2")
    assert marked(ENV_MARK_NODE, str(cluster.home.node("node-2"))) == []
    eventually(lambda: node_ready(cluster, "node-2") == "Unknown", "the node to be NotReady")
    ready = lambda: {c["type"]: c["status"] for c in cluster.get("pod", "there")["status"]["conditions"]}["Ready"]  # noqa: E731
    eventually(lambda: ready() == "False", "its pod not to be ready")
    assert component(cluster, "node-2")["state"] == "stopped"

    cluster.cluster.start_node("node-2")
    eventually(lambda: node_ready(cluster, "node-2") == "True", "the node to be Ready")
    cluster.wait_ready("there")
    status = cluster.container("there")
    assert status["restartCount"] == 1
    assert status["lastState"]["terminated"]["reason"] == "ContainerStatusUnknown"


def test_a_frozen_node_stands_still_and_goes_on(cluster: TestCluster) -> None:
    cluster.apply(server("still", nodeName="node-1"))
    cluster.wait_ready("still")
    pid = process_of(cluster, "node-1").pid
    cluster.cluster.freeze_node("node-1")
    eventually(lambda: node_ready(cluster, "node-1") == "Unknown", "the node to be NotReady")
    cluster.cluster.start_node("node-1")
    eventually(lambda: node_ready(cluster, "node-1") == "True", "the node to be Ready")
    cluster.wait_ready("still")
    assert process_of(cluster, "node-1").pid == pid
    assert cluster.container("still")["restartCount"] == 0


def test_a_pod_deleted_while_its_node_is_away_ends_when_it_is_back(cluster: TestCluster) -> None:
    cluster.apply(server("orphan", nodeName="node-1"))
    uid = cluster.wait_ready("orphan")["metadata"]["uid"]
    cluster.cluster.freeze_node("node-1")
    cluster.kubectl("delete", "pod", "orphan", "--force", "--grace-period=0")
    directory = cluster.home.node("node-1") / "pods" / uid
    assert directory.exists()
    cluster.cluster.start_node("node-1")
    eventually(lambda: not directory.exists(), "the pod's processes and files to go")
    assert marked("WHERRY_LOCAL_CONTAINER", str(directory / "containers" / "main" / "0")) == []


@pytest.fixture(scope="module")
def second() -> Iterator[TestCluster]:
    """A second cluster beside the shared one."""
    with local_cluster(nodes=1, operator=False, backoff_scale=0.05) as running:
        running.kubectl("wait", "--for=create", "serviceaccount/default", "--timeout=30s")
        yield running


def test_two_clusters_side_by_side_and_data_survives_down(second: TestCluster, shared_cluster: TestCluster) -> None:
    second.apply(server("mine"), {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "kept"}})
    first_ip = second.wait_ready("mine")["status"]["podIP"]
    assert shared_cluster.get("pod", "mine") == {}
    shared_networks = {item["status"]["addresses"][0]["address"] for item in shared_cluster.get("nodes")["items"]}
    assert first_ip.split(".")[1] not in {address.split(".")[1] for address in shared_networks}

    second.cluster.down()
    assert second.processes() == []
    second.cluster.down()  # nothing runs, and that is no error

    second.up()
    assert second.get("configmap", "kept")
    eventually(lambda: second.container("mine")["restartCount"] == 1, "the pod to be started again")
    assert second.wait_ready("mine")["status"]["podIP"] == first_ip


def test_commands(second: TestCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_HOME, str(second.home.root))
    second.up()
    run = CliRunner()
    status = run.invoke(app, ["status"])
    assert status.exit_code == 0, status.output
    for word in ("etcd", "kube-apiserver", "node-1", "running", "yes"):
        assert word in status.output
    assert f"KUBECONFIG={second.home.kubeconfig}" in run.invoke(app, ["env"]).output
    assert "registered as node-1" in run.invoke(app, ["logs", "node-1"]).output
    missing = run.invoke(app, ["logs", "nothing"])
    assert missing.exit_code == 1
    assert "there are" in missing.output
    wrong = run.invoke(app, ["kill-node", "9"])
    assert (wrong.exit_code, "there is no node 'node-9'; there are node-1" in wrong.output) == (1, True)


def test_errors_say_what_to_do(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_HOME, str(tmp_path / "none"))
    run = CliRunner()
    for command in ("status", "env"):
        result = run.invoke(app, [command])
        assert result.exit_code == 1
        assert "wherry local up" in result.output
    assert run.invoke(app, ["down"]).exit_code == 0


def test_a_component_that_cannot_start_is_named_with_its_log(tmp_path: Any) -> None:
    from wherry_local.components import Options
    from wherry_local.lifecycle import Cluster

    for name in ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler"):
        fake = tmp_path / "bin" / name
        fake.parent.mkdir(exist_ok=True)
        fake.write_text("#!/bin/sh\necho the disk is on fire >&2\nexit 1\n")
        fake.chmod(0o755)
    cluster = Cluster(tmp_path / "home")
    try:
        with pytest.raises(LocalError, match=r"etcd does not start(.|\n)*the disk is on fire"):
            cluster.up(Options(nodes=1, operator=False), tmp_path / "bin", [])
    finally:
        cluster.down(purge=True)
    assert not (tmp_path / "home").exists()


def test_an_identity_is_not_fooled_by_a_reused_process_id() -> None:
    own = Identity.of(os.getpid())
    assert own is not None
    assert own.alive()
    stranger = Identity(own.pid, "another-boot/1")
    assert not stranger.alive()
    assert not stranger.send(signal.SIGKILL)
