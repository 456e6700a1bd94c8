"""A deployment of an embedding model: nothing but the model says that it is one."""

import json
from pathlib import Path

import numpy as np
import openai
import pytest
from tests.local.harness import TestCluster
from tests.runtime.encoders import BERT, save_modules

from wherry_protocol.engine_config import EngineConfig
from wherry_runtime.embedding.model import load_embedder


def deployment(directory: Path, **spec: object) -> str:
    whole = {"model": {"name": "bert", "uri": directory.as_uri()}, "replicas": 1, "dtype": "float32", **spec}
    return json.dumps(
        {
            "apiVersion": "inference.wherry.dev/v1alpha1",
            "kind": "LLMDeployment",
            "metadata": {"name": "embeddings"},
            "spec": whole,
        }
    )


def test_an_embedding_model_is_served_without_a_field_for_it(three_nodes: TestCluster, tmp_path: Path) -> None:
    BERT.build(tmp_path)
    save_modules(tmp_path)
    texts = ["the old boat", "coal and corn on the river"]
    try:
        three_nodes.kubectl("apply", "-f", "-", stdin=deployment(tmp_path))
        three_nodes.kubectl("wait", "--for=condition=Ready", "llmdeployment/embeddings", "--timeout=120s")
        url = three_nodes.get("llmdeployment", "embeddings")["status"]["url"] + "/v1"
        with openai.OpenAI(base_url=url, api_key="none", timeout=60) as client:
            found = [one.embedding for one in client.embeddings.create(model="bert", input=texts).data]
            with pytest.raises(openai.BadRequestError, match="send texts to /v1/embeddings"):
                client.completions.create(model="bert", prompt="a boat")
        model = load_embedder(EngineConfig(model_name="bert", model_uri=str(tmp_path), dtype="float32"))
        expected = model.embed([model.encode(text) for text in texts], [None, None])
        np.testing.assert_allclose(found, [np.frombuffer(one or b"", "<f4") for one in expected], atol=1e-6)
    finally:
        three_nodes.kubectl("delete", "llmdeployment/embeddings", "--ignore-not-found")
