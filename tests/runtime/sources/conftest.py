"""A small model on a hub, and a cache."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.runtime.sources.servers import Content, Hub

from wherry_runtime.sources import http

BIG = 600_000
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b'{"model": {}}' * 100,
    "model.safetensors": random.Random(1).randbytes(BIG),
    "pytorch_model.bin": b"the same again",
    "README.md": b"# A model",
    ".gitattributes": b"*",
}
WANTED = {"config.json", "tokenizer.json", "model.safetensors"}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of this machine's own credentials and settings, and no long pauses between tries."""
    for name in ("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "WHERRY_MODEL_SECRET", "AWS_ENDPOINT_URL", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "no-docker"))
    monkeypatch.setattr(http, "FIRST_PAUSE_S", 0.01)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    content = Content()
    # Another host name, so another origin.
    with content.running("localhost") as content_url:
        found = Hub(dict(FILES), content, content_url)
        with found.running() as url:
            monkeypatch.setenv("HF_ENDPOINT", url)
            yield found


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"
