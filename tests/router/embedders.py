"""A small embedding model for tests with real processes."""

import base64
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
from tests.router.harness import MODEL
from tests.runtime.encoders import BERT, save_modules

from wherry_protocol.engine_config import EngineConfig
from wherry_runtime.embedding.model import Embedder, load_embedder

Vectors = npt.NDArray[np.float32]


def build(directory: Path, **settings: Any) -> Path:
    """A BERT with [CLS] pooling that is normalized, texts of 48 tokens, and vectors that may be cut."""
    BERT.build(directory, matryoshka_dimensions=[8, 16], **settings)
    save_modules(directory, {"pooling_mode_cls_token": True}, max_seq_length=48)
    return directory


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its directory."""
    return build(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of one that takes tens of milliseconds for a text."""
    return build(tmp_path_factory.mktemp("heavy"), hidden_size=256, intermediate_size=1024, num_hidden_layers=16)


@pytest.fixture(scope="session")
def reference(bert: Path) -> Embedder:
    """The model in this process."""
    return load_embedder(EngineConfig(model_name=MODEL, model_uri=str(bert), dtype="float32", threads=1))


def expected(reference: Embedder, texts: list[str], dimensions: int | None = None) -> Vectors:
    tokens = [reference.encode(text) for text in texts]
    told = reference.embed(tokens, [dimensions] * len(texts))
    return np.stack([np.frombuffer(one or b"", dtype="<f4") for one in told])


def post(url: str, **body: Any) -> httpx.Response:
    headers = body.pop("headers", {})
    return httpx.post(url + "/v1/embeddings", json={"model": MODEL, **body}, headers=headers, timeout=60)


def vectors(response: httpx.Response) -> Vectors:
    """What an answer holds, in either encoding."""
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert [one["index"] for one in data] == list(range(len(data)))
    given = [one["embedding"] for one in data]
    rows = [np.frombuffer(base64.b64decode(v), "<f4") if isinstance(v, str) else np.array(v, "<f4") for v in given]
    return np.stack(rows)
