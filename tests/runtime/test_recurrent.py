"""Models without attention against transformers, float32, on random models: same logits, same tokens."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tests.runtime.engines import VOCAB_SIZE, Answered, ask, ask_all, engine_config, running, save_byte_tokenizer

from wherry_protocol.worker import ExecuteRequest, Prompt, Resume, SamplingParams
from wherry_runtime.engine.async_engine import AsyncEngine
from wherry_runtime.engine.setup import load
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.scheduling.plan import SequenceStep

NEW_TOKENS = 24
LENGTHS = (1, 5, 17, 70, 90)  # beyond the pieces that scans are cut into
SMALL = {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "num_hidden_layers": 3, "initializer_range": 0.08}
IDS = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None}
HEADS = {"num_heads": 8, "head_dim": 16, "state_size": 16}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("Mamba", {}),
    "mamba-biases-untied": ("Mamba", {"use_bias": True, "tie_word_embeddings": False, "state_size": 8}),
    "mamba-narrow": ("Mamba", {"expand": 1, "conv_kernel": 3, "use_conv_bias": False, "residual_in_fp32": False}),
    "mamba2": ("Mamba2", {**HEADS, "n_groups": 2}),
    "mamba2-one-group-biases": ("Mamba2", {**HEADS, "n_groups": 1, "use_bias": True, "tie_word_embeddings": True}),
    "rwkv": ("Rwkv", {"rescale_every": 2}),
    "rwkv-wide-never-rescaled": ("Rwkv", {"rescale_every": 0, "attention_hidden_size": 96, "intermediate_size": 80}),
}


class Reference:
    """A checkpoint, and transformers' model of it."""

    def __init__(self, directory: Path, family: str, settings: dict[str, Any]) -> None:
        torch.manual_seed(7)
        config = getattr(transformers, f"{family}Config")(**SMALL, **IDS, **settings)
        model = getattr(transformers, f"{family}ForCausalLM")(config).float()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1 or "time_mix" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
                if parameter.dim() == 2 and family == "Rwkv":
                    parameter.normal_(std=0.08)  # a fresh RWKV's matrices are zero
        model.save_pretrained(directory)
        save_byte_tokenizer(directory)
        self.directory = directory
        self.model = model.eval()

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """[T, vocab_size] after each token."""
        with torch.inference_mode():
            return self.model(torch.tensor([tokens]), use_cache=False).logits[0]

    def assert_greedy(self, prompt: list[int], answer: Answered) -> None:
        """Each token is the likeliest one after what precedes it."""
        assert len(answer.ids) == NEW_TOKENS
        assert answer.ids == self.logits(prompt + answer.ids)[len(prompt) - 1 : -1].argmax(-1).tolist()


@pytest.fixture(scope="module", params=CASES)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(tmp_path_factory.mktemp(request.param), *CASES[request.param])


@pytest.fixture(scope="module")
def mamba(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(tmp_path_factory.mktemp("mamba"), *CASES["mamba"])


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, VOCAB_SIZE, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.mark.parametrize("chunk", [1, 7, 90])
def test_logits_equal_however_the_prompt_is_cut(reference: Reference, chunk: int) -> None:
    runner = load(engine_config(reference.directory)).runner
    tokens = prompts()[-1]
    expected = reference.logits(tokens)
    blocks = np.array([5], dtype=np.int32)
    for start in range(0, len(tokens), chunk):
        part = tokens[start : start + chunk]
        logits, _ = runner.logits([SequenceStep("a", part, start, blocks, samples=True)])
        torch.testing.assert_close(logits[0], expected[start + len(part) - 1], atol=1e-4, rtol=0)


async def test_greedy_tokens_in_a_mixed_batch(reference: Reference) -> None:
    """All lengths at once; a small token budget cuts prompts into chunks between other requests' decodes."""
    async with running(reference.directory, max_batched_tokens=24) as engine:
        answers = await ask_all(engine, prompts(), temperature=0, max_tokens=NEW_TOKENS)
    for prompt, answer in zip(prompts(), answers, strict=True):
        reference.assert_greedy(prompt, answer)


async def test_a_state_that_another_request_had_is_read_by_nobody(reference: Reference) -> None:
    """One block of memory: requests have it one after the other, the last two as a paused one and who paused it."""
    async with running(reference.directory, max_running=1) as engine:
        for prompt in prompts()[2:4]:
            reference.assert_greedy(prompt, await ask(engine, prompt, temperature=0, max_tokens=NEW_TOKENS))
        first, second = prompts()[3:]
        sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
        low = engine.generate(ExecuteRequest(id="low", model="m", prompt=Prompt(token_ids=first), sampling=sampling))
        begun = [await anext(low), await anext(low)]
        high = await ask(engine, second, request_id="high", priority=1, temperature=0, max_tokens=NEW_TOKENS)
        reference.assert_greedy(second, high)
        reference.assert_greedy(first, Answered([*begun, *[event async for event in low]]))
        assert engine.load().preemptions_total > 0


async def test_an_answer_goes_on_elsewhere(mamba: Reference) -> None:
    prompt = prompts()[3]
    async with running(mamba.directory) as engine:
        whole = await ask(engine, prompt, temperature=0, max_tokens=NEW_TOKENS)
        resume = Resume(token_ids=whole.ids[:13], seed=whole.started.seed)
        sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
        request = ExecuteRequest(id="r2", model="m", prompt=Prompt(token_ids=prompt), sampling=sampling, resume=resume)
        rest = Answered([event async for event in engine.generate(request)])
    assert whole.ids[:13] + rest.ids == whole.ids


@pytest.mark.parametrize("method, worst", [("int8", 0.05), ("int4", 1.0)])
def test_matrices_are_rounded_as_asked_and_kept_for_the_next_start(
    mamba: Reference, tmp_path: Path, method: str, worst: float
) -> None:
    tokens = prompts()[-1]
    step = SequenceStep("a", tokens, 0, np.array([0], dtype=np.int32), samples=True)
    config = engine_config(mamba.directory, quantization=method, weight_cache=str(tmp_path))
    first, again = (load(config).runner.logits([step])[0] for _ in range(2))
    off = (first[0] - mamba.logits(tokens)[-1]).abs().max().item()
    assert 0 < off < worst
    assert torch.equal(first, again)
    assert list(tmp_path.glob("*.safetensors"))


REFUSED = {
    "guesses": ({"speculative": "ngram"}, "guesses back"),
    "a draft": ({"speculative": "draft", "draft_model_uri": "SELF"}, "guesses back"),
    "a KV cache of int8": ({"kv_cache_dtype": "int8"}, "states .* are float32"),
    "our kernels": ({"backend": "native"}, "state in place of attention"),
    "ranks": ({"tensor_parallel": 2}, "cannot be split over 2 ranks"),
}


@pytest.mark.parametrize("settings, why", REFUSED.values(), ids=REFUSED)
async def test_what_a_state_cannot_do_is_refused(mamba: Reference, settings: dict[str, Any], why: str) -> None:
    given = {k: str(mamba.directory) if v == "SELF" else v for k, v in settings.items()}
    engine = AsyncEngine(engine_config(mamba.directory, **given))
    with pytest.raises(ModelError, match=why):
        await engine.start()
    await engine.close()


ODD: dict[str, tuple[dict[str, Any], str]] = {
    "another activation": ({"hidden_act": "gelu"}, "hidden_act"),
    "no width": ({"hidden_size": None}, "hidden_size|missing or odd"),
    "a state of nothing": ({"state_size": 0}, "state_size"),
}


@pytest.mark.parametrize("change, why", ODD.values(), ids=ODD)
def test_an_odd_config_is_refused(mamba: Reference, tmp_path: Path, change: dict[str, Any], why: str) -> None:
    for path in mamba.directory.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "config.json").unlink()
    raw = json.loads((mamba.directory / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | change))
    with pytest.raises(ModelError, match=why):
        load(engine_config(tmp_path))
