"""Which engine a model gets, in this process, and by what name its answers are known."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
from tests.runtime.encoders import BERT
from tests.runtime.engines import TINY

from wherry_protocol.engine_config import EngineConfig, fingerprint
from wherry_protocol.worker import (
    Embedding,
    EmbedRequest,
    End,
    Event,
    ExecuteRequest,
    Metrics,
    Prompt,
    SamplingParams,
    Started,
    Token,
)
from wherry_runtime.embedding.model import load_embedder
from wherry_runtime.engine import model_engine
from wherry_runtime.engine.model_engine import ModelEngine
from wherry_runtime.server.surface import refusal

ELSEWHERE = "hf://org/model"


def downloaded(monkeypatch: pytest.MonkeyPatch, directory: Path) -> EngineConfig:
    """Settings of a model that is elsewhere, and that a download brings to `directory`."""

    def local(config: EngineConfig, progress: object = None) -> EngineConfig:
        return msgspec.structs.replace(config, model_uri=str(directory))

    monkeypatch.setattr(model_engine, "with_local_models", local)
    return EngineConfig(model_name="m", model_uri=ELSEWHERE, dtype="float32", threads=1, kv_cache_bytes=0)


async def asked(engine: ModelEngine, request: ExecuteRequest | EmbedRequest) -> list[Event]:
    events = engine.embed(request) if isinstance(request, EmbedRequest) else engine.generate(request)
    return [event async for event in events]


EMBED = EmbedRequest(id="e", model="m", inputs=["the old boat", [5, 6, 7]])
EXECUTE = ExecuteRequest(id="x", model="m", prompt=Prompt(text="A boat"), sampling=SamplingParams(max_tokens=2))


async def test_an_embedding_model_embeds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    BERT.build(tmp_path)
    config = downloaded(monkeypatch, tmp_path)
    engine = ModelEngine(config)
    await engine.start()
    try:
        assert engine.embeds
        assert engine.max_model_len == 64
        started, first, second, metrics, end = await asked(engine, EMBED)
        assert isinstance(started, Started)
        assert started.version == fingerprint(config), "not that of the download's place"
        model = load_embedder(msgspec.structs.replace(config, model_uri=str(tmp_path)))
        expected = model.embed([model.encode("the old boat"), [5, 6, 7]], [None, None])
        for place, event in enumerate((first, second)):
            assert isinstance(event, Embedding)
            assert event.index == place
            want = np.frombuffer(expected[place] or b"", "<f4")
            np.testing.assert_allclose(np.frombuffer(event.vector, "<f4"), want, atol=1e-6)
        assert isinstance(metrics, Metrics)
        assert end == End(finish_reason="stop", prompt_tokens=started.prompt_tokens, completion_tokens=0)
        assert engine.load().prompt_tokens_total == started.prompt_tokens
        assert engine.prefixes_since(None) == (None, None)
        with pytest.raises(Exception, match="send texts to /v1/embeddings") as refused:
            await asked(engine, EXECUTE)
        assert refusal(refused.value) is not None
    finally:
        await engine.close()
    with pytest.raises(Exception, match="not loaded"):
        await asked(engine, EMBED)


async def test_a_model_that_generates_generates(monkeypatch: pytest.MonkeyPatch) -> None:
    config = msgspec.structs.replace(downloaded(monkeypatch, TINY), kv_cache_bytes=1 << 22, max_model_len=64)
    engine = ModelEngine(config)
    await engine.start()
    try:
        assert not engine.embeds
        events = await asked(engine, EXECUTE)
        assert isinstance(events[0], Started)
        assert events[0].version == fingerprint(config)
        assert sum(len(event.ids) for event in events if isinstance(event, Token)) == 2
        with pytest.raises(Exception, match="generates text and embeds none") as refused:
            await asked(engine, EMBED)
        told = refusal(refused.value)
        assert told is not None
        assert (told[0], told[1].code) == (400, "unsupported_task")
    finally:
        await engine.close()
