"""The engine against transformers, float32, on random models of each family: same logits, same tokens.

On both backends, which have cache blocks of different sizes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tests.runtime.engines import BACKENDS, VOCAB_SIZE, ask, ask_all, engine_config, running
from tests.runtime.random_models import CASES, Case

from wherry_runtime.engine.setup import load
from wherry_runtime.scheduling.plan import SequenceStep

NEW_TOKENS = 64
LENGTHS = (1, 5, 8, 17, 33, 47, 70, 90)


Settings = dict[str, Any]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Settings:
    """Settings that choose a backend."""
    return BACKENDS[request.param]


@dataclass
class Reference:
    """A checkpoint, and transformers' model of it."""

    directory: Path
    model: transformers.PreTrainedModel

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """[T, vocab_size] after each token."""
        with torch.inference_mode():
            return self.model(torch.tensor([tokens])).logits[0]

    def assert_greedy(self, prompt: list[int], answer: list[int]) -> None:
        """Each token of `answer` is the likeliest one after what precedes it: so it is what greedy search yields."""
        expected = self.logits(prompt + answer)[len(prompt) - 1 : -1].argmax(-1).tolist()
        assert answer == expected


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    case: Case = request.param
    directory = tmp_path_factory.mktemp(case.name)
    return Reference(directory, case.build(directory))


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, VOCAB_SIZE, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.mark.parametrize("chunk", [1, 7, 90])
def test_logits_equal_however_the_prompt_is_cut(reference: Reference, backend: Settings, chunk: int) -> None:
    runner = load(engine_config(reference.directory, kv_blocks=40, **backend)).runner
    tokens = prompts()[-1]
    expected = reference.logits(tokens)
    blocks = np.arange(30, 30 - 23, -1, dtype=np.int32)  # any order will do
    for start in range(0, len(tokens), chunk):
        part = tokens[start : start + chunk]
        logits, ids = runner.logits([SequenceStep("a", part, start, blocks, samples=True)])
        assert ids == ["a"]
        torch.testing.assert_close(logits[0], expected[start + len(part) - 1], atol=1e-4, rtol=0)


async def test_greedy_tokens_alone_equal_generate(reference: Reference, backend: Settings) -> None:
    prompt = prompts()[4]
    generated = reference.model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        generation_config=transformers.GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True),
    )[0, len(prompt) :].tolist()
    async with running(reference.directory, **backend) as engine:
        answer = await ask(engine, prompt, temperature=0, max_tokens=NEW_TOKENS)
    assert answer.ids == generated


async def test_greedy_tokens_in_a_mixed_batch(reference: Reference, backend: Settings) -> None:
    """Eight lengths at once; a small token budget cuts prompts into chunks between other requests' decodes."""
    async with running(reference.directory, **backend, max_batched_tokens=24) as engine:
        answers = await ask_all(engine, prompts(), temperature=0, max_tokens=NEW_TOKENS)
    for prompt, answer in zip(prompts(), answers, strict=True):
        assert len(answer.ids) == NEW_TOKENS
        reference.assert_greedy(prompt, answer.ids)


async def test_greedy_tokens_with_prefix_reuse(reference: Reference, backend: Settings) -> None:
    prompt = prompts()[-1]
    async with running(reference.directory, **backend) as engine:
        first = await ask(engine, prompt, temperature=0, max_tokens=NEW_TOKENS)
        again = await ask(engine, prompt, temperature=0, max_tokens=NEW_TOKENS)
        longer = await ask(engine, prompt + first.ids[:20], temperature=0, max_tokens=NEW_TOKENS - 20)
    assert first.started.cached_tokens == 0
    # Full blocks; the last token is always computed.
    size = backend["block_size"]
    assert again.started.cached_tokens == 89 // size * size
    assert longer.started.cached_tokens == 109 // size * size
    assert again.ids == first.ids
    assert longer.ids == first.ids[20:]
    reference.assert_greedy(prompt, first.ids)


async def test_greedy_tokens_with_preemption(reference: Reference, backend: Settings) -> None:
    async with running(
        reference.directory, **backend, kv_tokens=240, max_batched_tokens=32, max_model_len=160
    ) as engine:
        answers = await ask_all(engine, prompts(), temperature=0, max_tokens=NEW_TOKENS)
        assert engine.load().preemptions_total > 0
    for prompt, answer in zip(prompts(), answers, strict=True):
        reference.assert_greedy(prompt, answer.ids)


async def test_seeded_tokens_alone_batched_and_preempted(reference: Reference, backend: Settings) -> None:
    params = {"seed": 11, "temperature": 0.9, "top_p": 0.95, "top_k": 100, "max_tokens": NEW_TOKENS}
    async with running(reference.directory, **backend, prefix_cache=False) as engine:
        alone = [(await ask(engine, p, **params)).ids for p in prompts()]
    async with running(reference.directory, **backend, max_batched_tokens=24) as engine:
        assert [a.ids for a in await ask_all(engine, prompts(), **params)] == alone
    async with running(reference.directory, **backend, kv_tokens=240, max_model_len=160) as engine:
        assert [a.ids for a in await ask_all(engine, prompts(), **params)] == alone
        assert engine.load().preemptions_total > 0
