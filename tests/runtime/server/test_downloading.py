"""A worker whose model is on a hub: alive while it downloads, and what it says meanwhile and when it cannot."""

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.router.harness import TINY, Process, eventually, running
from tests.runtime.sources.servers import Content, Hub, status

MODEL = {path.name: path.read_bytes() for path in TINY.iterdir() if path.is_file()}


@pytest.fixture
def hub() -> Iterator[tuple[Hub, str]]:
    content = Content()
    with content.running("localhost") as content_url:
        found = Hub(MODEL, content, content_url)
        with found.running() as url:
            yield found, url


def worker(tmp_path: Path, url: str) -> Process:
    env = {
        "HF_ENDPOINT": url,
        "HF_TOKEN_PATH": str(tmp_path / "none"),
        "WHERRY_TERMINATION_LOG": str(tmp_path / "termination"),
    }
    args = ["--model-name=tiny", "--model-uri=hf://org/model", f"--model-cache={tmp_path / 'cache'}", "--port=0"]
    return Process("wherry_runtime", args, env)


def test_a_worker_is_alive_and_tells_how_far_it_is_while_it_downloads(tmp_path: Path, hub: tuple[Hub, str]) -> None:
    served, url = hub
    served.content.gate.clear()
    served.content.gate_after = 131_072
    with running(worker(tmp_path, url)) as process:
        eventually(lambda: httpx.get(process.url + "/health").json().get("download", {}).get("bytes", 0) > 131_072, 60)
        health = httpx.get(process.url + "/health")
        ready = httpx.get(process.url + "/ready")
        assert health.status_code == 200
        total = health.json()["download"]["total"]
        assert health.json()["state"] == "downloading"
        assert 131_072 < health.json()["download"]["bytes"] < total
        assert ready.status_code == 503
        assert ready.json()["state"] == "downloading"
        assert ready.json()["reason"] == "Downloading"
        assert "% of" in ready.json()["message"]
        metrics = httpx.get(process.url + "/metrics").text
        [value] = re.findall(r'^wherry_model_download_total_bytes\{model_name="tiny"\} (\S+)', metrics, re.MULTILINE)
        assert float(value) == total
        served.content.gate.set()
        eventually(lambda: httpx.get(process.url + "/ready").status_code == 200, 60)
        body = {"id": "r", "model": "tiny", "prompt": {"text": "A boat"}, "sampling": {"max_tokens": 2}}
        assert httpx.post(process.url + "/execute", json=body, timeout=60).status_code == 200


def test_a_worker_that_cannot_download_ends_with_the_reason(tmp_path: Path, hub: tuple[Hub, str]) -> None:
    served, url = hub
    served.content.blobs.clear()
    served.faults["/api/models/org/model/revision/main"] = [status(404, x_error_code="RevisionNotFound")]
    process = worker(tmp_path, url)
    assert process.wait(60) == 1, process.log()
    assert (tmp_path / "termination").read_text() == "model_not_found: hf://org/model: org/model has no revision main"
