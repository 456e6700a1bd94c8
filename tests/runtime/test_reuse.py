"""Answers that share prefixes, and answers that must not depend on anything but prompt and seed."""

from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from tests.runtime.engines import ask, ask_all, engine_config, running
from tests.runtime.random_models import CASES

from wherry_runtime.engine.async_engine import AsyncEngine
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.server.metrics import WorkerMetrics

BLOCK = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    CASES[0].build(directory)
    return directory


def prompt_of(number: int, length: int) -> list[int]:
    return [(31 * number + 7 * i + i * i) % 300 for i in range(length)]


async def conversation(engine: AsyncEngine) -> list[tuple[int, int, list[int]]]:
    """Five turns, each sending the whole history: prompt tokens, those found in the cache, and the answer."""
    history = prompt_of(1, 50)
    turns = []
    for turn in range(5):
        answer = await ask(engine, history, seed=turn, max_tokens=20, ignore_eos=True)
        turns.append((len(history), answer.started.cached_tokens, answer.ids))
        history = history + answer.ids + prompt_of(10 + turn, 15)
    return turns


async def test_a_conversation_computes_only_what_is_new(model: Path) -> None:
    async with running(model, block_size=BLOCK, prefix_cache=False) as engine:
        plain = await conversation(engine)
        assert engine.load().prefix_hit_tokens_total == 0
    async with running(model, block_size=BLOCK) as engine:
        cached = await conversation(engine)
        load = engine.load()
        registry = CollectorRegistry()
        WorkerMetrics(registry, "m", engine.load)
        scraped = generate_latest(registry).decode()
    assert [answer for _, _, answer in cached] == [answer for _, _, answer in plain]
    assert cached[0][1] == 0
    for (length, found, _), (before, _, _) in zip(cached[1:], cached, strict=False):
        # All of the turn before, its answer included but for the last token, which was never fed, in full blocks.
        assert found == (before + 19) // BLOCK * BLOCK
        assert length - found < 15 + 1 + BLOCK
    assert load.prefix_queried_tokens_total == sum(length for length, _, _ in cached)
    assert load.prefix_hit_tokens_total == sum(found for _, found, _ in cached)
    assert load.prefix_hit_tokens_total > 0.7 * load.prefix_queried_tokens_total
    assert f'wherry_prefix_cache_queries_total{{model_name="m"}} {load.prefix_queried_tokens_total:.1f}' in scraped
    assert f'wherry_prefix_cache_hits_total{{model_name="m"}} {load.prefix_hit_tokens_total:.1f}' in scraped


SETTINGS: dict[str, dict[str, Any]] = {
    "sixteen at once": {"max_running": 16},
    "in chunks": {"max_running": 16, "max_batched_tokens": 23},
    "paced beside answers": {"max_running": 16, "max_itl_ratio": 1.0},
    "without pacing": {"max_running": 16, "max_itl_ratio": 0.0},
    "preempted": {"max_running": 16, "kv_tokens": 320, "max_model_len": 120},
    "preempted, no prefix cache": {"max_running": 16, "kv_tokens": 320, "max_model_len": 120, "prefix_cache": False},
}


@pytest.mark.parametrize("name", SETTINGS)
async def test_tokens_depend_on_prompt_and_seed_alone(model: Path, name: str) -> None:
    """Sixteen requests one by one, then together, twice (so that the second time finds prefixes)."""
    prompts = [prompt_of(i // 2, 20 + 9 * (i // 2)) for i in range(16)]  # each one twice
    params = {"seed": 7, "temperature": 0.9, "top_p": 0.9, "max_tokens": 25, "presence_penalty": 0.5, "min_tokens": 5}
    async with running(model, block_size=BLOCK, prefix_cache=False) as engine:
        alone = [(await ask(engine, p, **params)).ids for p in prompts]
    async with running(model, block_size=BLOCK, **SETTINGS[name]) as engine:
        for _ in range(2):
            assert [a.ids for a in await ask_all(engine, prompts, **params)] == alone
        assert ("preempted" in name) == (engine.load().preemptions_total > 0)


async def test_a_ratio_that_makes_no_sense_is_told(model: Path) -> None:
    with pytest.raises(ModelError, match=r"max_itl_ratio is 0\.5; it is at least 1, or 0 for no limit"):
        await AsyncEngine(engine_config(model, max_itl_ratio=0.5)).start()
