"""A deployment whose model is on a hub: downloaded once into a claim, told of in the status, served."""

import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from tests.local.harness import TestCluster, eventually
from tests.runtime.sources.servers import TOKEN, Content, Hub

from wherry_local.paths import project_root

MODEL = {p.name: p.read_bytes() for p in (project_root() / "examples/models/tiny").iterdir() if p.is_file()}


@pytest.fixture
def hub() -> Iterator[tuple[Hub, str]]:
    content = Content()
    with content.running("localhost") as content_url:
        found = Hub(MODEL, content, content_url)
        found.token = TOKEN
        with found.running() as url:
            yield found, url


def objects(url: str, directory: Path) -> list[dict[str, object]]:
    capacity = {"storage": "1Gi"}
    claim = {"accessModes": ["ReadWriteMany"], "resources": {"requests": capacity}, "storageClassName": ""}
    volume = {
        "accessModes": ["ReadWriteMany"],
        "capacity": capacity,
        "hostPath": {"path": str(directory)},
        "claimRef": {"namespace": "default", "name": "model-cache"},
    }
    spec = {
        "model": {"name": "tiny", "uri": "hf://org/model", "secretName": "hub"},
        "modelCache": {"claimName": "model-cache"},
        "replicas": 2,
        "dtype": "float32",
    }
    return [
        {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": "model-cache"}, "spec": volume},
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "model-cache"}, "spec": claim},
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "hub"},
            "stringData": {"HF_TOKEN": TOKEN, "HF_ENDPOINT": url},
        },
        {
            "apiVersion": "inference.wherry.dev/v1alpha1",
            "kind": "LLMDeployment",
            "metadata": {"name": "hub"},
            "spec": spec,
        },
    ]


def condition(cluster: TestCluster, kind: str) -> dict[str, str]:
    status = cluster.get("llmdeployment", "hub").get("status", {})
    return next((c for c in status.get("conditions", []) if c["type"] == kind), {})


def test_a_model_of_a_hub_is_downloaded_once_and_served(
    three_nodes: TestCluster, hub: tuple[Hub, str], tmp_path: Path
) -> None:
    served, url = hub
    served.content.gate.clear()
    served.content.gate_after = 131_072
    (tmp_path / "cache").mkdir()
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects(url, tmp_path / "cache")})
    try:
        three_nodes.kubectl("apply", "-f", "-", stdin=text)

        def downloading() -> bool:
            found = condition(three_nodes, "ModelLoaded")
            return found.get("reason") == "Downloading" and "% of" in found["message"]

        eventually(downloading, "the status tells of the download", 60)
        served.content.gate.set()
        three_nodes.kubectl("wait", "--for=condition=Ready", "llmdeployment/hub", "--timeout=120s")
        weights = sum(len(data) for name, data in MODEL.items() if name.endswith(".safetensors"))
        assert sum(served.content.served.values()) == weights
        client = openai.OpenAI(
            base_url=three_nodes.get("llmdeployment", "hub")["status"]["url"] + "/v1", api_key="none", timeout=60
        )
        answer = client.completions.create(model="tiny", prompt="A boat", max_tokens=4, temperature=0)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 4
        assert TOKEN not in three_nodes.kubectl("get", "llmdeployments,pods,events", "-o", "yaml")
        for pod in three_nodes.kubectl("get", "pods", "-o", "name").split():
            assert TOKEN not in three_nodes.kubectl("logs", pod)
    finally:
        served.content.gate.set()
        three_nodes.kubectl("delete", "llmdeployment/hub", "--ignore-not-found")
        three_nodes.kubectl("delete", "pvc/model-cache", "pv/model-cache", "secret/hub", "--ignore-not-found")
