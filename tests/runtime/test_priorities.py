"""A request of a higher priority pauses those of a lower one, which lose nothing by it."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.runtime.engines import ask, running
from tests.runtime.random_models import CASES

FULL: dict[str, dict[str, Any]] = {
    "no slot is free": {"max_running": 2},
    # Two prompts and their answers take 16 of its 17 blocks, a third prompt 6.
    "no room is left in the cache": {"max_running": 8, "kv_tokens": 272, "max_model_len": 200},
}
LOW: dict[str, Any] = {"seed": 3, "temperature": 0.9, "max_tokens": 36, "presence_penalty": 0.5, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    CASES[0].build(directory)
    return directory


def prompt_of(number: int, length: int) -> list[int]:
    return [(31 * number + 7 * i + i * i) % 300 for i in range(length)]


@pytest.mark.parametrize("name", FULL)
async def test_a_higher_priority_pauses_a_lower_one_whose_text_is_whole(model: Path, name: str) -> None:
    prompts = [prompt_of(i, 90) for i in range(2)]
    async with running(model, block_size=16, **FULL[name]) as engine:
        undisturbed = [await ask(engine, prompt, **LOW) for prompt in prompts]
        order: list[str] = []

        async def answered(request_id: str, prompt: list[int], priority: int, **params: Any) -> list[int]:
            answer = await ask(engine, prompt, request_id=request_id, priority=priority, **params)
            order.append(request_id)
            return answer.ids

        async with asyncio.TaskGroup() as tasks:
            lows = [tasks.create_task(answered(f"low{i}", p, 0, **LOW)) for i, p in enumerate(prompts)]
            while engine.load().running < 2:  # noqa: ASYNC110 - the engine offers no event for it
                await asyncio.sleep(0)
            before = engine.load().preemptions_total
            urgent = tasks.create_task(answered("urgent", prompt_of(9, 90), 10, max_tokens=5, ignore_eos=True))
        assert order[0] == "urgent"
        assert engine.load().preemptions_total > before
        assert len(urgent.result()) == 5
        assert [low.result() for low in lows] == [answer.ids for answer in undisturbed]


async def test_of_equals_nobody_is_paused(model: Path) -> None:
    async with running(model, block_size=16, max_running=1) as engine:
        first = asyncio.create_task(ask(engine, prompt_of(0, 20), request_id="a", priority=5, **LOW))
        while not engine.load().running:  # noqa: ASYNC110 - the engine offers no event for it
            await asyncio.sleep(0)
        await ask(engine, prompt_of(1, 20), request_id="b", priority=5, max_tokens=2)
        assert first.done()
        assert engine.load().preemptions_total == 0
