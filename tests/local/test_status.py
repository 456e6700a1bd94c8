"""Status names the cause, with a real scheduler, real processes and real broken models."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.local.harness import TestCluster, eventually

from wherry_local.paths import project_root

TINY = project_root() / "examples" / "models" / "tiny"


@pytest.fixture(scope="module")
def wherry(three_nodes: TestCluster) -> TestCluster:
    return three_nodes


def llmd(name: str, uri: str = "sample://tiny", **spec: Any) -> dict[str, Any]:
    batching = {"kvCacheMemory": "32Mi"}
    return {
        "apiVersion": "inference.wherry.dev/v1alpha1",
        "kind": "LLMDeployment",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"model": {"name": name, "uri": uri}, "batching": batching, **spec},
    }


def conditions(cluster: TestCluster, name: str) -> dict[str, dict[str, str]]:
    status = cluster.get("llmdeployment", name).get("status", {})
    return {entry["type"]: entry for entry in status.get("conditions", [])}


def nowhere(path: Path) -> str:
    return f"file://{path}/nowhere"


def unknown_architecture(path: Path) -> str:
    shutil.copytree(TINY, path / "odd")
    config = path / "odd" / "config.json"
    fields = json.loads(config.read_text()) | {"architectures": ["LlamoForCausalLM"], "model_type": "llamo"}
    config.write_text(json.dumps(fields))
    return f"file://{path}/odd"


def truncated(path: Path) -> str:
    shutil.copytree(TINY, path / "short")
    weights = path / "short" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1_000_000])
    return f"file://{path}/short"


BROKEN_MODELS: dict[str, tuple[Callable[[Path], str], list[str]]] = {
    "missing": (nowhere, ["/nowhere"]),
    "unknown": (unknown_architecture, ["LlamoForCausalLM", "LlamaForCausalLM", "Qwen3ForCausalLM"]),
    "truncated": (truncated, ["model.safetensors"]),
}


@pytest.mark.parametrize("name", BROKEN_MODELS)
def test_a_broken_model_is_named(wherry: TestCluster, tmp_path: Path, name: str) -> None:
    make, words = BROKEN_MODELS[name]
    wherry.apply(llmd(name, make(tmp_path)))

    def named() -> bool:
        found = conditions(wherry, name)
        degraded = found.get("Degraded", {"status": "False", "message": ""})
        return degraded["status"] == "True" and all(word in degraded["message"] for word in words)

    eventually(named, f"Degraded to name {words}", 60)
    found = conditions(wherry, name)
    assert found["Ready"]["status"] == "False"
    assert found["ModelLoaded"]["status"] == "False"
    wherry.kubectl("delete", "llmdeployment", name, "--timeout=60s")


CAUSES: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "no-memory": (
        {"resources": {"requests": {"memory": "100Ti"}, "limits": {"memory": "100Ti"}}},
        "InsufficientCapacity",
        ["Insufficient memory"],
    ),
    "no-image": ({"image": "registry.invalid/wherry:1"}, "Degraded", ["registry.invalid/wherry:1"]),
    "no-node": ({"nodeSelector": {"accelerator": "none-such"}}, "InsufficientCapacity", ["node"]),
}


@pytest.mark.parametrize("name", CAUSES)
def test_a_pod_that_cannot_run_is_explained(wherry: TestCluster, name: str) -> None:
    spec, condition, words = CAUSES[name]
    wherry.apply(llmd(name, **spec))

    def named() -> bool:
        found = conditions(wherry, name).get(condition, {"status": "False", "message": ""})
        return found["status"] == "True" and all(word in found["message"] for word in words)

    eventually(named, f"{condition} to name {words}", 60)
    assert conditions(wherry, name)["Ready"]["status"] == "False"
    wherry.kubectl("delete", "llmdeployment", name, "--timeout=60s")


def test_a_claim_that_is_missing_is_named(wherry: TestCluster) -> None:
    wherry.apply(llmd("no-claim", "pvc://weights/tiny"))

    def named() -> bool:
        found = conditions(wherry, "no-claim")
        return any("weights" in entry["message"] for entry in found.values())

    eventually(named, "a condition that names the claim", 60)
    wherry.kubectl("delete", "llmdeployment", "no-claim", "--timeout=60s")


def test_loading_is_said_and_ends_in_ready(wherry: TestCluster) -> None:
    wherry.apply(llmd("good"))
    seen: set[tuple[str, str]] = set()

    def ready() -> bool:
        found = conditions(wherry, "good")
        loaded = found.get("ModelLoaded")
        if loaded is not None:
            seen.add((loaded["status"], loaded["reason"]))
        return found.get("Ready", {}).get("status") == "True"

    eventually(ready, "the model to be served", 90)
    assert ("False", "Loading") in seen
    assert ("True", "Loaded") in seen
    wherry.kubectl("delete", "llmdeployment", "good", "--timeout=60s")


def test_what_rounding_costs_is_told(wherry: TestCluster) -> None:
    """Measured by the worker, once it is ready, and asked for by the operator's probes."""
    wherry.apply(llmd("rounded", quantization={"method": "int4"}))

    def told() -> dict[str, Any]:
        found: dict[str, Any] = wherry.get("llmdeployment", "rounded").get("status", {}).get("quantization", {})
        assert not found.get("message", "").startswith("not measured:"), found
        return found

    eventually(lambda: "divergence" in told(), "the status tells what int4 costs", 120)
    found = told()
    assert found["method"] == "int4"
    assert 0.0004 < float(found["divergence"]) < 0.005
    assert found["perplexityChange"].endswith("%")
    assert found["tokens"] == 255
    assert "nats per token" in found["message"]
    wherry.kubectl("delete", "llmdeployment", "rounded", "--timeout=60s")
