"""`wherry plan` against a real API server, beside what the operator then does."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.operator.control_plane import ControlPlane
from tests.operator.harness import Kube, Kubelet, OperatorProcess, eventually, manifest

from wherry_operator.cluster.preview import differences, manifests, three_way


def run(plane: ControlPlane, kube: Kube, body: Any, *args: str) -> tuple[int, Any]:
    text = body if isinstance(body, str) else yaml.safe_dump(body)
    command = [sys.executable, "-m", "wherry_cli.main", "plan", "-", f"--namespace={kube.namespace}"]
    done = subprocess.run(
        [*command, f"--kubeconfig={plane.kubeconfig()}", *args], input=text, capture_output=True, text=True, timeout=60
    )
    if "json" in args and done.returncode < 3 and done.stdout:
        return done.returncode, json.loads(done.stdout)
    return done.returncode, done.stdout + done.stderr


def test_it_foretells_what_the_operator_does(
    plane: ControlPlane, kube: Kube, operator: OperatorProcess, kubelet: Kubelet
) -> None:
    status, [new] = run(plane, kube, manifest(replicas=2), "-o", "json")
    assert status == 1
    assert not new["exists"]
    made = [(action["verb"], action["kind"]) for action in new["actions"]]
    assert made.count(("create", "Pod")) == 2
    assert kube.items("llmdeployments") == []
    assert kube.items("pods") == []

    kube.deployment(replicas=2)
    kube.wait_ready()
    assert run(plane, kube, manifest(replicas=2), "-o", "json")[0] == 0
    status, text = run(plane, kube, manifest(replicas=2))
    assert (status, "nothing to do" in text) == (0, True)

    before = kube.items("pods")
    status, [scaled] = run(plane, kube, manifest(replicas=3), "-o", "json")
    assert status == 1
    assert scaled["changes"] == [{"field": "spec.replicas", "before": 2, "after": 3}]
    assert [(a["verb"], a["kind"], a["reason"]) for a in scaled["actions"]] == [
        ("apply", "PodDisruptionBudget", "what is wanted of it changed"),
        ("create", "Pod", "3 replicas are wanted"),
    ]
    status, text = run(plane, kube, manifest(replicas=2, image="x:2"))
    assert status == 1
    assert "rollout to revision" in text
    assert 'spec.image: unset → "x:2"' in text
    assert "later: DeletePod" in text
    assert kube.items("pods") == before


def test_the_api_servers_answer_shows(plane: ControlPlane, kube: Kube) -> None:
    both = manifest(replicas=2, scaling={"maxReplicas": 2})
    status, text = run(plane, kube, both)
    assert status == 2
    assert "exclude each other" in " ".join(text.split())
    status, [entry] = run(plane, kube, manifest(replica=2), "-o", "json")
    assert status == 2
    assert entry["refused"] == 'unknown field "spec.replica"'
    kube.deployment()
    eventually(lambda: kube.items("llmdeployments"), "it exists")
    status, [entry] = run(plane, kube, manifest(replica=2), "-o", "json")
    assert (status, entry["refused"]) == (2, 'unknown field "spec.replica"')


def test_a_problem_of_the_spec_shows(plane: ControlPlane, kube: Kube) -> None:
    bad = manifest(podTemplate={"spec": {"containers": [{"image": "x"}]}})
    status, text = run(plane, kube, bad)
    assert status == 2
    assert "InvalidSpec" in text


@pytest.mark.parametrize(
    "body, message",
    [("a: [", "not YAML"), ("kind: Pod", "no LLMDeployment"), ("", "no LLMDeployment")],
)
def test_files_of_no_use(plane: ControlPlane, kube: Kube, body: str, message: str) -> None:
    status, text = run(plane, kube, body)
    assert status == 2
    assert message in text
    assert "Traceback" not in text


def test_no_cluster(plane: ControlPlane, kube: Kube, tmp_path: Path) -> None:
    status, text = run(plane, kube, manifest(), f"--kubeconfig={tmp_path / 'none'}")
    assert status == 2
    assert "error:" in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    "last, live, new, patch",
    [
        ({}, {"a": 1}, {"a": 1}, {}),
        ({}, {"a": 1}, {"a": 2}, {"a": 2}),
        ({"a": 1}, {"a": 1, "b": 2}, {}, {"a": None}),
        ({"a": 1}, {"b": 2}, {}, {}),
        ({"a": {"x": 1}}, {"a": {"x": 1, "y": 2}}, {"a": {}}, {"a": {"x": None}}),
        ({}, {"l": [1]}, {"l": [2]}, {"l": [2]}),
        ({}, {}, {"a": {"b": 1}}, {"a": {"b": 1}}),
    ],
)
def test_three_way(last: Any, live: Any, new: Any, patch: Any) -> None:
    assert three_way(last, live, new) == patch


def test_differences_name_fields() -> None:
    found = list(differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "d": 4}))
    assert found == [("spec.a.b", 1, 3), ("spec.c", 2, None), ("spec.d", None, 4)]


def test_manifests_are_found_among_others() -> None:
    text = yaml.safe_dump_all([{"kind": "Pod"}, manifest("one"), None, manifest("two")])
    assert [m["metadata"]["name"] for m in manifests(text)] == ["one", "two"]
