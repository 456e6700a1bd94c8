"""Every architecture against transformers, float32, on random models: through checkpoint, configuration and cache."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.runtime import test_recurrent
from tests.runtime.architectures import ARCHITECTURES, CUDA, MORE, NATIVE
from tests.runtime.engines import VOCAB_SIZE, ask_all, running
from tests.runtime.random_models import Case
from tests.runtime.ranks import Checkpoint, group, steps, together
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from wherry_runtime.engine.backend import use_native
from wherry_runtime.engine.runner import ModelRunner
from wherry_runtime.kernels.cuda import support as cuda_support
from wherry_runtime.kvcache.formats import FORMATS
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.loading.loader import load_model
from wherry_runtime.models.registry import FAMILIES, read_config
from wherry_runtime.parallel.shard import check
from wherry_runtime.quantization.storage import Storage
from wherry_runtime.scheduling.plan import SequenceStep

BY_NAME = {case.name: case for case in ARCHITECTURES}
CPU = torch.device("cpu")
LENGTH = 90
UNSPLITTABLE = {"olmo2": "its queries and keys are normalized", "bitnet": "it has norms between the matrices"}


@dataclass
class Reference:
    case: Case
    directory: Path
    texts: list[list[int]]
    logits: list[torch.Tensor]  # [LENGTH, vocab_size] after each token of each text, by transformers

    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.directory, read_config(self.directory), positions=128)

    def runner(self, backend: str = "pytorch", **how: Any) -> ModelRunner:
        return group(self.checkpoint(), 1, backend, **how)[0]


def texts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, VOCAB_SIZE, (3, LENGTH), generator=generator).tolist()


def reference_of(case: Case, directory: Path) -> Reference:
    model = case.build(directory)
    with torch.inference_mode():
        # One by one: transformers' padding is none of ours.
        logits = [model(torch.tensor([text])).logits[0] for text in texts()]
    return Reference(case, directory, texts(), logits)


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda case: case.name)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return reference_of(request.param, tmp_path_factory.mktemp(request.param.name))


def check_steps(reference: Reference, runner: ModelRunner, atol: float = 1e-4) -> None:
    """Three texts at once, at different places, in chunks beside decodes; a text alone in whole first."""
    places = [np.arange(start, start + 6, dtype=np.int32) for start in (0, 6, 12)]
    plan = [
        {0: (0, 61)},
        {0: (61, 62), 1: (0, 17)},
        {0: (62, 63), 1: (17, 18), 2: (0, 40)},
        {0: (63, 64), 1: (18, 19), 2: (40, 73)},
        {0: (64, LENGTH), 1: (19, 20), 2: (73, 74)},
    ]
    for step in plan:
        rows = [
            SequenceStep(str(i), reference.texts[i][start:stop], start, places[i], samples=True)
            for i, (start, stop) in step.items()
        ]
        logits, ids = runner.logits(rows)
        expected = torch.stack([reference.logits[int(i)][step[int(i)][1] - 1] for i in ids])
        torch.testing.assert_close(logits, expected, atol=atol, rtol=0)


def test_logits_are_those_of_transformers(reference: Reference) -> None:
    assert max(float(logits.std()) for logits in reference.logits) > 0.1  # else the tolerance would say nothing
    check_steps(reference, reference.runner())


def test_native_kernels_compute_it_or_say_why_not(reference: Reference) -> None:
    config = read_config(reference.directory)
    given = (config, torch.float32, FORMATS["float32"], 16, CPU)
    if reference.case in MORE and reference.case.name not in NATIVE:
        with pytest.raises(ModelError, match="the native kernels cannot run this model: the native kernels have no "):
            use_native("native", *given)
        assert not use_native("auto", *given)
        return
    assert use_native("native", *given)
    check_steps(reference, reference.runner("shared"))
    if reference.case in MORE and reference.case.name not in UNSPLITTABLE:  # others: test_parallel_parity.py
        for ranks in ("shared", "distributed"):
            checkpoint = reference.checkpoint()
            one, two = group(checkpoint, 1, ranks), group(checkpoint, 2, ranks)
            for sequences in steps():
                want, got = together(one, sequences), together(two, sequences)
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_cuda_kernels_say_what_they_cannot_compute(reference: Reference) -> None:
    reason = cuda_support.unsupported(read_config(reference.directory), FORMATS["float32"])
    if reference.case in MORE and reference.case.name not in CUDA:
        assert str(reason).startswith("the CUDA kernels have no ")
    else:
        assert reason is None


def test_two_ranks_compute_what_one_does(reference: Reference) -> None:
    checkpoint = reference.checkpoint()
    if (reason := UNSPLITTABLE.get(reference.case.name)) is not None:
        with pytest.raises(ModelError, match=f"cannot be split over 2 ranks: {reason}"):
            check(checkpoint.config, 2)
        return
    check(checkpoint.config, 2)
    one, two = group(checkpoint, 1, "pytorch"), group(checkpoint, 2, "pytorch")
    for sequences in steps():
        want, got = together(one, sequences), together(two, sequences)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize(("quantization", "least"), [("int8", 0.99), ("int4", 0.9)])
def test_quantized_weights(reference: Reference, quantization: str, least: float) -> None:
    """Rounded as they are loaded, experts, fused and turned matrices and tied heads included."""
    runner = reference.runner(quantization=quantization)
    blocks = np.arange(4, dtype=np.int32)
    logits, _ = runner.logits([SequenceStep("a", reference.texts[0][:20], 0, blocks, samples=True)])
    expected = reference.logits[0][19]
    assert torch.nn.functional.cosine_similarity(logits[0], expected, dim=0) > least
    assert not torch.allclose(logits[0], expected, atol=1e-4)


def test_bfloat16(reference: Reference) -> None:
    runner = reference.runner(dtype=torch.bfloat16)
    blocks = np.arange(4, dtype=np.int32)
    for start, stop in ((0, 20), (20, 21)):
        logits, _ = runner.logits([SequenceStep("a", reference.texts[0][start:stop], start, blocks, samples=True)])
        expected = reference.logits[0][stop - 1]
        assert torch.nn.functional.cosine_similarity(logits[0], expected, dim=0) > 0.99


def test_every_architecture_is_in_the_table() -> None:
    covered = {case.model or f"{case.family}ForCausalLM" for case in ARCHITECTURES}
    without_attention = {f"{family}ForCausalLM" for family, _ in test_recurrent.CASES.values()}
    assert covered | without_attention == {family.architecture for family in FAMILIES.values() if not family.encoder}


@pytest.mark.parametrize("name", ["gpt-oss", "gemma3", "bloom", "phi3-long"])
async def test_the_engine_answers_as_transformers(tmp_path: Path, name: str) -> None:
    """Three prompts at once, cut by a small budget, on whatever computes the model best."""
    model = BY_NAME[name].build(tmp_path)
    prompts = [text[:length] for text, length in zip(texts(), (70, 5, 33), strict=True)]
    settings = {"block_size": 16, "max_model_len": 128, "kv_tokens": 512, "max_batched_tokens": 32}
    async with running(tmp_path, **settings) as engine:
        answers = await ask_all(engine, prompts, temperature=0, max_tokens=6)
        again = await ask_all(engine, prompts, temperature=0, max_tokens=6)
    for prompt, answer, repeated in zip(prompts, answers, again, strict=True):
        # Beyond the original context, so that transformers takes longrope's long factors as well.
        whole = [*prompt, *answer.ids, *texts()[0]]
        with torch.inference_mode():
            logits = model(torch.tensor([whole])).logits[0]
        assert answer.ids == logits[len(prompt) - 1 : len(prompt) + 5].argmax(-1).tolist()
        assert repeated.ids == answer.ids


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = directory / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path)


@pytest.mark.parametrize("name", ["gpt2", "bloom", "falcon-7b"])
def test_names_without_the_prefix(tmp_path: Path, name: str) -> None:
    """As the first checkpoints of these families were published, with buffers and the tied head kept twice."""
    reference = reference_of(BY_NAME[name], tmp_path)

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        short = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        embedding = next(tensor for name, tensor in short.items() if tensor.shape[0] == VOCAB_SIZE)
        return {**short, "lm_head.weight": embedding.clone(), "h.0.attn.bias": torch.zeros(1, 1, 4, 4)}

    rewrite(tmp_path, change)
    check_steps(reference, reference.runner())


def test_gpt_oss_as_it_is_published(tmp_path: Path) -> None:
    """Experts in MXFP4, the old spelling of the rotary settings."""
    case = BY_NAME["gpt-oss"]
    model = case.build(tmp_path)
    generator = torch.Generator().manual_seed(5)
    packed: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                experts, inputs, outputs = parameter.shape
                shape = (experts, outputs, inputs // 32)
                blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
                scales = torch.randint(120, 125, shape, generator=generator, dtype=torch.uint8)
                parameter.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
                packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        left = {name: t for name, t in tensors.items() if not name.endswith(("gate_up_proj", "down_proj"))}
        return {**left, **packed}

    rewrite(tmp_path, change)
    raw = json.loads((tmp_path / "config.json").read_text())
    rope = raw.pop("rope_parameters")
    theta = rope.pop("rope_theta")
    raw |= {"rope_theta": theta, "rope_scaling": rope, "quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with torch.inference_mode():
        logits = [model(torch.tensor([text])).logits[0] for text in texts()]
    reference = Reference(case, tmp_path, texts(), logits)
    check_steps(reference, reference.runner())


@pytest.mark.parametrize("name", ["qwen2-moe", "gpt-oss", "gpt-neox", "stablelm-12b"])
def test_the_weight_cache_keeps_what_was_made_of_the_tensors(tmp_path: Path, name: str) -> None:
    """The first time it is written, the second time read; of another order of queries and keys it has nothing."""

    def state(cache: Path | None) -> dict[str, torch.Tensor]:
        storage = Storage(torch.float32, CPU, "int8")
        return load_model(tmp_path, read_config(tmp_path), 64, storage, cache).state()

    BY_NAME[name].build(tmp_path)
    files = []
    for partial in (0.25, 0.5):
        path = tmp_path / "config.json"
        raw = json.loads(path.read_text())
        raw["rope_parameters"]["partial_rotary_factor"] = partial
        path.write_text(json.dumps(raw))
        expected, cache = state(None), tmp_path / "cache"
        for _ in range(2):
            found = state(cache)
            assert list(found) == list(expected)
            assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())
        files.append(set(cache.iterdir()))
    assert len(files[1] - files[0]) == len(files[0]) == 1


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is not supported"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before = false is not supported"),
        ("opt", {"word_embed_proj_dim": 32}, "word_embed_proj_dim is not supported"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual.* is not supported"),
        ("falcon-40b", {"parallel_attn": False}, "new_decoder_architecture without parallel_attn is not supported"),
        ("falcon-7b", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn = 2 without"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is not supported"),
        ("gemma", {"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ("gpt-oss", {"swiglu_limit": 5.0}, r"swiglu_limit 5\.0 is not supported"),
        ("gpt-oss", {"quantization_config": {"quant_method": "gptq"}}, "bits None is not supported"),
        ("phi", {"tie_word_embeddings": True}, "a head tied to the embedding has no bias"),
        ("phi3-long", {"head_dim": 32}, "8 factors where 16 are needed"),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, name: str, settings: dict[str, Any], message: str) -> None:
    BY_NAME[name].build(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    with pytest.raises(ModelError, match=message) as failure:
        read_config(tmp_path)
    assert str(tmp_path) in failure.value.message
