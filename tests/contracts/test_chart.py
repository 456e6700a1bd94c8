"""The Helm chart: what it renders as golden files, what its schema refuses, and what its RBAC does not allow."""

import copy
import difflib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hack.generate_values import PAGE, page

from wherry_operator.settings import argument_parser

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "wherry"
GOLDEN = Path(__file__).parent / "golden" / "chart"
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA = yaml.safe_load((CHART / "values.schema.json").read_text())

CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "namespaced": {"watchNamespaces": ["team-a", "team-b"], "rbac": {"aggregate": False}},
    "namespaced-with-nodes": {"watchNamespaces": ["team-a"], "rbac": {"aggregate": False, "nodes": True}},
    "everything": {
        "fullnameOverride": "llm",
        "images": {
            "registry": "registry.example.com/wherry/",
            "pullPolicy": "Always",
            "operator": {"digest": "sha256:" + "0" * 64},
            "runtime": {"repository": "gpu/runtime", "tag": "1.2-cuda"},
        },
        "imagePullSecrets": [{"name": "pull"}],
        "replicas": 2,
        "serviceUrl": "ip",
        "log": {"level": "debug", "format": "text"},
        "podLabels": {"team": "search"},
        "podAnnotations": {"example.com/note": "yes"},
        "nodeSelector": {"pool": "system"},
        "tolerations": [{"key": "system", "operator": "Exists"}],
        "affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": []}},
        "topologySpreadConstraints": [
            {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway"}
        ],
        "priorityClassName": "system-cluster-critical",
        "serviceAccount": {"name": "operator", "annotations": {"example.com/role": "llm"}},
        "metrics": {"service": {"enabled": True, "annotations": {"prometheus.io/scrape": "true"}}},
        "podDisruptionBudget": {"enabled": True},
        "networkPolicy": {"enabled": True, "metricsFrom": [{"namespaceSelector": {}}]},
    },
}

REFUSED = [
    ({"replica": 2}, "replica"),
    ({"images": {"operator": {"version": "1"}}}, "version"),
    ({"images": {"operator": {"digest": "0123"}}}, "digest"),
    ({"images": {"operator": {"repository": ""}}}, "repository"),
    ({"images": {"pullPolicy": "Sometimes"}}, "pullPolicy"),
    ({"replicas": "2"}, "replicas"),
    ({"replicas": -1}, "replicas"),
    ({"watchNamespaces": "team-a"}, "watchNamespaces"),
    ({"watchNamespaces": ["Team A"]}, "watchNamespaces"),
    ({"watchNamespaces": ["a", "a"]}, "watchNamespaces"),
    ({"log": {"level": "loud"}}, "level"),
    ({"serviceUrl": "http"}, "serviceUrl"),
    ({"imagePullSecrets": ["pull"]}, "imagePullSecrets"),
    ({"podAnnotations": {"a": 1}}, "podAnnotations"),
    ({"metrics": {"service": {"port": 0}}}, "port"),
    ({"resyncSeconds": 0}, "resyncSeconds"),
    ({"replicas": 2, "leaderElection": {"enabled": False}}, "leaderElection.enabled"),
    ({"podDisruptionBudget": {"enabled": True}}, "podDisruptionBudget.enabled"),
    ({"serviceAccount": {"create": False}}, "serviceAccount.name"),
]


@pytest.fixture(scope="session")
def helm() -> str:
    """Helm from PATH, else the one that local mode and the e2e cluster use."""
    if found := shutil.which("helm"):
        return found
    wherry = Path(sys.executable).with_name("wherry")
    directory = subprocess.run([wherry, "local", "assets", "helm"], stdout=subprocess.PIPE, text=True, check=True)
    return str(Path(directory.stdout.strip()) / "helm")


def template(helm: str, values: dict[str, Any], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump(values))
    command = [helm, "template", "wherry", CHART, "--namespace", "wherry-system", "--values", file]
    environment = os.environ | {"HELM_CACHE_HOME": str(tmp_path), "HELM_CONFIG_HOME": str(tmp_path)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def objects(helm: str, values: dict[str, Any], tmp_path: Path) -> list[dict[str, Any]]:
    result = template(helm, values, tmp_path)
    assert result.returncode == 0, result.stderr
    return [document for document in yaml.safe_load_all(result.stdout) if document]


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str, helm: str, tmp_path: Path, regenerate: bool) -> None:
    # Parsed and written again, so that a helm that orders or indents differently makes no difference.
    found = sorted(objects(helm, CASES[name], tmp_path), key=lambda o: (o["kind"], o["metadata"]["name"]))
    text = yaml.safe_dump_all(found, sort_keys=False, width=120)
    golden = GOLDEN / f"{name}.yaml"
    if regenerate:
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text)
    old = golden.read_text()
    difference = "".join(difflib.unified_diff(old.splitlines(True), text.splitlines(True), str(golden), "rendered"))
    assert not difference, f"{difference}\nrun `make generate` if this is meant"


def test_lint(helm: str) -> None:
    result = subprocess.run([helm, "lint", "--strict", CHART], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(("values", "named"), REFUSED, ids=[str(values) for values, _ in REFUSED])
def test_wrong_values_are_refused_by_name(values: dict[str, Any], named: str, helm: str, tmp_path: Path) -> None:
    result = template(helm, values, tmp_path)
    assert result.returncode != 0
    assert named in result.stderr


def test_the_schema_knows_every_value_and_no_other() -> None:
    def paths(value: Any, schema: dict[str, Any], path: str = "") -> None:
        assert "type" in schema or "enum" in schema, path
        if schema.get("additionalProperties") is False:
            assert set(value) == set(schema["properties"]) - {"global"} or path in {"resources", "affinity"}, path
            for key in value:
                paths(value[key], schema["properties"][key], f"{path}.{key}".lstrip("."))

    paths(VALUES, SCHEMA)
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    jsonschema.validate(VALUES, SCHEMA)


def test_a_namespaced_install_has_no_cluster_wide_rights(helm: str, tmp_path: Path) -> None:
    found = objects(helm, CASES["namespaced"], tmp_path)
    assert not [o["metadata"]["name"] for o in found if o["kind"].startswith("Cluster")]
    assert {o["metadata"]["namespace"] for o in found if o["kind"] == "Role"} == {"team-a", "team-b", "wherry-system"}


@pytest.mark.parametrize(("name", "may"), [("default", True), ("namespaced", False), ("namespaced-with-nodes", True)])
def test_nodes_are_read_where_that_was_allowed_and_never_changed(
    name: str, may: bool, helm: str, tmp_path: Path
) -> None:
    found = objects(helm, CASES[name], tmp_path)
    rules = [(o, rule) for o in found for rule in o.get("rules", []) if {"nodes", "leases"} & set(rule["resources"])]
    nodes = [rule for o, rule in rules if rule["resources"] == ["nodes"] and o["kind"] == "ClusterRole"]
    leases = [rule for o, rule in rules if o["metadata"].get("namespace") == "kube-node-lease"]
    assert bool(nodes) == bool(leases) == may
    assert all(set(rule["verbs"]) <= {"get", "list", "watch"} for rule in nodes + leases)


@pytest.mark.parametrize("name", CASES)
def test_rights_are_spelled_out_and_few(name: str, helm: str, tmp_path: Path) -> None:
    for role in objects(helm, CASES[name], tmp_path):
        for rule in role.get("rules", []):
            assert "*" not in rule["verbs"] + rule["resources"] + rule["apiGroups"], role["metadata"]["name"]
            assert not {"escalate", "bind", "impersonate"} & set(rule["verbs"])
            if "secrets" in rule["resources"]:
                assert not {"list", "watch", "update", "patch"} & set(rule["verbs"])


@pytest.mark.parametrize("name", CASES)
def test_the_operator_understands_its_arguments(name: str, helm: str, tmp_path: Path) -> None:
    [deployment] = [o for o in objects(helm, CASES[name], tmp_path) if o["kind"] == "Deployment"]
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    given = argument_parser().parse_args(container["args"])
    assert given.namespace == CASES[name].get("watchNamespaces", [])
    assert re.fullmatch(r"[\w./:-]+", given.runtime_image)


@pytest.mark.parametrize("name", CASES)
def test_pods_meet_pod_security_restricted(name: str, helm: str, tmp_path: Path) -> None:
    [deployment] = [o for o in objects(helm, CASES[name], tmp_path) if o["kind"] == "Deployment"]
    pod = deployment["spec"]["template"]["spec"]
    assert pod["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    assert pod["containers"][0]["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_the_reference_page_is_current() -> None:
    assert PAGE.read_text() == page(), "run `make generate`"


def test_every_value_can_be_left_at_its_default() -> None:
    assert all(jsonschema.Draft7Validator(SCHEMA).is_valid(VALUES | copy.deepcopy(case)) for case in CASES.values())
