"""Local mode's decisions that need no cluster: case tables."""

import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from wherry_local.addresses import Addresses, free_address
from wherry_local.assets.gobuild import staging_replacements
from wherry_local.components import Component
from wherry_local.errors import LocalError
from wherry_local.forwarder import routes
from wherry_local.node.container import Backoff
from wherry_local.node.environment import ConfigError, resolve
from wherry_local.node.logs import LogOptions, last_lines, parse_time, read
from wherry_local.node.mounts import Paths, expand
from wherry_local.node.status import ContainerStatus, phase, waiting
from wherry_local.supervisor import _stop_order
from wherry_protocol.quantity import parse_quantity

MOUNTS = Paths({"/models/a": "/real/a", "/models": "/real/m", "/tmp": "/real/tmp"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/models/a", "/real/a"),
        ("/models/a/b.txt", "/real/a/b.txt"),
        ("/models/ab", "/real/m/ab"),
        ("--uri=file:///models/a/x", "--uri=file:///real/a/x"),
        ("cat /models/x>/tmp/y", "cat /real/m/x>/real/tmp/y"),
        ("/var/tmp/x", "/var/tmp/x"),
        ("/modelsx", "/modelsx"),
        ("http://host/models", "http://host/models"),
        ("a:/models/a:/tmp", "a:/real/a:/real/tmp"),
        ("'/tmp'", "'/real/tmp'"),
        ("", ""),
    ],
)
def test_paths(text: str, expected: str) -> None:
    assert MOUNTS.replace(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$(A)", "1"),
        ("$(B)", "$(B)"),
        ("$$(A)", "$(A)"),
        ("$A", "$A"),
        ("x$(A)$(A)", "x11"),
        ("$$$(A)", "$1"),
        ("$(", "$("),
    ],
)
def test_expansion(text: str, expected: str) -> None:
    assert expand(text, {"A": "1"}) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", 1),
        ("500m", Decimal("0.5")),
        ("2Gi", 2 << 30),
        ("1e3", 1000),
        ("1k", 1000),
        ("0", 0),
        ("128974848000m", 128974848),
    ],
)
def test_quantities(text: str, expected: object) -> None:
    assert parse_quantity(text) == expected


@pytest.mark.parametrize("text", ["", "Gi", "1Zi", "lots"])
def test_what_is_no_quantity(text: str) -> None:
    with pytest.raises(ValueError, match="is not a quantity"):
        parse_quantity(text)


POD = {"metadata": {"name": "p", "namespace": "n", "uid": "u", "labels": {"a": "b"}}, "spec": {"containers": []}}
FACTS = {"pod_ip": "127.0.0.9", "host_ip": "127.0.0.8", "allocatable": {"memory": "4Gi", "cpu": "2"}}


async def nothing(_: str, __: str) -> None:
    return None


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"value": "v"}, "v"),
        ({"valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['a']"}}}, "b"),
        ({"valueFrom": {"fieldRef": {"fieldPath": "status.hostIP"}}}, "127.0.0.8"),
        ({"valueFrom": {"resourceFieldRef": {"resource": "limits.memory"}}}, str(4 << 30)),
        ({"valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}}, "2"),
        ({"valueFrom": {"resourceFieldRef": {"resource": "requests.cpu"}}}, "0"),
        ({"valueFrom": {"secretKeyRef": {"name": "s", "key": "k", "optional": True}}}, None),
    ],
)
async def test_environment(entry: dict[str, Any], expected: str | None) -> None:
    env = await resolve(POD, {"env": [{"name": "X"} | entry]}, nothing, FACTS)
    assert env.get("X") == expected


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"secretKeyRef": {"name": "s", "key": "k"}}, 'secret "s" not found'),
        ({"fieldRef": {"fieldPath": "status.phase"}}, "not known"),
        ({"fileKeyRef": {"path": "x"}}, "not known in local mode"),
    ],
)
async def test_environment_that_does_not_resolve(source: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        await resolve(POD, {"env": [{"name": "X", "valueFrom": source}]}, nothing, FACTS)


def container(state: str, *, restarts: int = 0) -> ContainerStatus:
    states = {"waits": waiting("X"), "runs": {"running": {}}, "ok": {"terminated": {"exitCode": 0}}}
    status = ContainerStatus("c", "i", states.get(state, {"terminated": {"exitCode": 1}}))
    if restarts:
        status.last_state = {"terminated": {"exitCode": 1}}
    return status


@pytest.mark.parametrize(
    ("policy", "init", "main", "expected"),
    [
        ("Always", [], ["waits"], "Pending"),
        ("Always", [], ["runs"], "Running"),
        ("Always", [], ["runs", "waits"], "Pending"),
        ("Always", [], ["ok"], "Running"),
        ("Never", [], ["ok", "ok"], "Succeeded"),
        ("Never", [], ["ok", "bad"], "Failed"),
        ("OnFailure", [], ["bad"], "Running"),
        ("OnFailure", [], ["ok"], "Succeeded"),
        ("Always", ["waits"], ["waits"], "Pending"),
        ("Always", ["ok"], ["runs"], "Running"),
        ("Never", ["bad"], ["waits"], "Failed"),
        ("Always", ["bad"], ["waits"], "Pending"),
    ],
)
def test_phase(policy: str, init: list[str], main: list[str], expected: str) -> None:
    assert phase(policy, [container(state) for state in init], [container(state) for state in main]) == expected


def test_a_crash_looping_pod_is_running() -> None:
    assert phase("Always", [], [container("waits", restarts=1)]) == "Running"


def test_backoff_doubles_to_five_minutes_and_is_forgotten_after_a_long_run() -> None:
    backoff = Backoff(1.0)
    assert [backoff.next() for _ in range(8)] == [0, 10, 20, 40, 80, 160, 300, 300]
    assert backoff.next(ran_s=601) == 0
    assert backoff.next() == 10


def service(**spec: Any) -> dict[str, Any]:
    base = {"clusterIP": "127.1.0.5", "selector": {"a": "b"}, "ports": [{"port": 80, "targetPort": "http"}]}
    return {"metadata": {"namespace": "n", "name": "s"}, "spec": base | spec}


def backend(ip: str, *, ready: bool = True, namespace: str = "n", going: bool = False) -> dict[str, Any]:
    metadata: dict[str, Any] = {"namespace": namespace, "labels": {"a": "b", "c": "d"}}
    metadata |= {"deletionTimestamp": "now"} if going else {}
    conditions = [{"type": "Ready", "status": "True" if ready else "False"}]
    ports = [{"name": "http", "containerPort": 8000}]
    return {
        "metadata": metadata,
        "spec": {"containers": [{"ports": ports}]},
        "status": {"podIP": ip, "conditions": conditions},
    }


@pytest.mark.parametrize(
    ("spec", "pods", "expected"),
    [
        (
            {},
            [backend("127.2.0.2"), backend("127.2.0.1")],
            {("127.1.0.5", 80): [("127.2.0.1", 8000), ("127.2.0.2", 8000)]},
        ),
        ({}, [backend("127.2.0.1", ready=False)], {}),
        ({}, [backend("127.2.0.1", going=True)], {}),
        ({}, [backend("127.2.0.1", namespace="other")], {}),
        ({"selector": {"a": "x"}}, [backend("127.2.0.1")], {}),
        ({"selector": None}, [backend("127.2.0.1")], {}),
        ({"clusterIP": "None"}, [backend("127.2.0.1")], {}),
        (
            {"publishNotReadyAddresses": True},
            [backend("127.2.0.1", ready=False)],
            {("127.1.0.5", 80): [("127.2.0.1", 8000)]},
        ),
        ({"ports": [{"port": 9}]}, [backend("127.2.0.1")], {("127.1.0.5", 9): [("127.2.0.1", 9)]}),
        ({"ports": [{"port": 9, "protocol": "UDP"}]}, [backend("127.2.0.1")], {}),
        ({"ports": [{"port": 9, "targetPort": "gone"}]}, [backend("127.2.0.1")], {}),
    ],
)
def test_routes(spec: dict[str, Any], pods: list[dict[str, Any]], expected: dict[Any, Any]) -> None:
    assert routes([service(**spec)], pods) == expected


def write_log(path: Path, lines: int) -> None:
    stamp = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    text = []
    for index in range(lines):
        at = stamp + datetime.timedelta(seconds=index)
        text.append(f"{at:%Y-%m-%dT%H:%M:%S}.000000000Z stdout F line {index}\n")
    path.write_text("".join(text))


@pytest.mark.parametrize("lines", [0, 1, 2, 5000])
@pytest.mark.parametrize("tail", [-1, 0, 1, 2, 4999, 9999])
async def test_tail(tmp_path: Path, lines: int, tail: int) -> None:
    write_log(tmp_path / "0.log", lines)
    got = b"".join([piece async for piece in read(tmp_path / "0.log", LogOptions(tail=tail), lambda: False)])
    wanted = [f"line {index}\n" for index in range(lines)]
    assert got.decode() == "".join(wanted if tail < 0 else wanted[max(0, lines - tail) :])


async def test_since_and_partial_lines(tmp_path: Path) -> None:
    write_log(tmp_path / "0.log", 10)
    with (tmp_path / "0.log").open("a") as file:
        file.write("2026-01-01T01:00:00.000000001Z stderr P long \n2026-01-01T01:00:00.5Z stderr F line\n")
    options = LogOptions(since=parse_time("2026-01-01T00:00:09Z"))
    got = b"".join([piece async for piece in read(tmp_path / "0.log", options, lambda: False)])
    assert got == b"line 9\nlong line\n"
    assert last_lines(tmp_path / "0.log", 3) == "line 9\nlong line\n"
    assert last_lines(tmp_path / "none.log", 3) == ""


def test_addresses_of_clusters_do_not_overlap() -> None:
    networks = [a for slot in range(56) for a in (Addresses(slot, *[0] * 5).services, Addresses(slot, *[0] * 5).pods)]
    assert len(set(networks)) == 112
    assert not [network for network in networks if network.startswith("127.0.")]


def test_a_freed_pod_address_is_not_given_out_at_once() -> None:
    network = "127.9.1.0/29"
    assert free_address(network, []) == "127.9.1.1"
    assert free_address(network, ["127.9.1.2"], after="127.9.1.1") == "127.9.1.3"
    assert free_address(network, [], after="127.9.1.6") == "127.9.1.1"
    with pytest.raises(LocalError, match="no address is free"):
        free_address(network, [f"127.9.1.{number}" for number in range(1, 7)])


def test_clients_stop_before_servers() -> None:
    desired = [Component("etcd", []), Component("api", [], after=["etcd"])]
    desired += [Component(name, [], after=["api"]) for name in ("node", "operator")]
    assert _stop_order(desired) == [["node", "operator"], ["api"], ["etcd"]]


def test_kubernetes_own_libraries_are_pinned_to_their_published_versions() -> None:
    text = "replace (\n\tk8s.io/api => ./staging/src/k8s.io/api\n\tother => example.com/other v1.0.0\n)\n"
    assert staging_replacements(text, "1.36.3") == ["\tk8s.io/api => k8s.io/api v0.36.3"]
