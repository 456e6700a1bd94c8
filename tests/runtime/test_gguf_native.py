"""Models in GGUF files whose blocks are held and computed with as they are."""

import logging
from pathlib import Path

import pytest
import torch
from tests.runtime.random_models import Case
from tests.runtime.ranks import Checkpoint, group, steps, together
from tests.runtime.test_kernels_blocks import packed

from wherry_runtime.engine.eager_model import EagerModel
from wherry_runtime.engine.runner import ModelRunner
from wherry_runtime.formats.conversion.source import open_source
from wherry_runtime.formats.conversion.to_gguf import to_gguf
from wherry_runtime.formats.gguf.blocks.parts import HELD
from wherry_runtime.formats.gguf.types import type_named
from wherry_runtime.kernels.cpu import library
from wherry_runtime.layers.linear import Linear
from wherry_runtime.loading.checkpoint import iterate_tensors
from wherry_runtime.loading.loader import load_model
from wherry_runtime.models.decoder import Decoder
from wherry_runtime.models.registry import read_config
from wherry_runtime.quantization.formats import Format

# All of them see each token: rounding must not choose others.
MOE = {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 256, "norm_topk_prob": True}


def model_of(directory: Path, name: str, **settings: object) -> Checkpoint:
    """A random Llama in a GGUF file of a type; rows of its down projections are no whole blocks of 256."""
    source = directory / "source"
    shape = {"hidden_size": 512, "intermediate_size": 416, "head_dim": 64, "num_attention_heads": 8, **settings}
    Case("llama", "Llama", {**shape, "num_hidden_layers": 2}).build(source)
    return converted(source, directory / f"{name}.gguf", name)


def converted(source: Path, target: Path, name: str) -> Checkpoint:
    to_gguf(open_source(source), target, type_named(name), lambda _: None)
    return Checkpoint(target, read_config(target))


@pytest.mark.skipif(not library.available(), reason="there are no native kernels on this machine")
@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "Q5_0"])
def test_a_model_computes_with_its_blocks(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """About the logits of the same numbers as floats: activations are int8. On two ranks, those of one."""
    caplog.set_level(logging.INFO)
    file = model_of(tmp_path, name, tie_word_embeddings=name == "Q4_K")
    one, two = group(file, 1, "shared"), group(file, 2, "shared")
    assert f"of {name} in {HELD[name]} as it is" in caplog.text
    floats = group(converted(file.directory, tmp_path / "F32.gguf", "F32"), 1, "pytorch")
    for sequences in steps():
        want, got = together(floats, sequences), together(one, sequences)
        assert torch.nn.functional.cosine_similarity(got, want, dim=-1).min() > 0.995
        # Sums in another order now and then round an activation to the next step.
        assert torch.nn.functional.cosine_similarity(together(two, sequences), got, dim=-1).min() > 0.999


@pytest.mark.skipif(not library.available(), reason="there are no native kernels on this machine")
def test_matrices_that_are_fused_in_the_file_are_held_too(tmp_path: Path) -> None:
    Case("phi3", "Phi3", {"hidden_size": 256, "intermediate_size": 512, "sliding_window": None}).build(
        tmp_path / "source"
    )
    file = converted(tmp_path / "source", tmp_path / "q.gguf", "Q4_K")
    model = load_model(file.directory, file.config, 64, file.storage("shared"))
    assert isinstance(model, Decoder)
    tensors = dict(iterate_tensors(file.directory))
    for name, layer in (("self_attn.qkv_proj", model.layers[0].qkv), ("mlp.gate_up_proj", model.layers[0].gate_up)):
        assert packed(layer).format == HELD["Q4_K"]
        assert torch.equal(packed(layer).dequantized(), tensors[f"model.layers.0.{name}.weight"])


@pytest.mark.skipif(not library.available(), reason="there are no native kernels on this machine")
@pytest.mark.parametrize("family, settings", [("Qwen3Moe", MOE), ("Gemma", {"head_dim": 32})], ids=["experts", "gemma"])
def test_blocks_where_pytorch_computes_the_rest(tmp_path: Path, family: str, settings: dict[str, object]) -> None:
    """In bfloat16; in float32 it dequantizes. Two ranks have the logits of one."""
    shape = {"hidden_size": 256, "intermediate_size": 512, **settings}
    Case("model", family, shape).build(tmp_path / "source")
    file = converted(tmp_path / "source", tmp_path / "q.gguf", "Q4_K")
    exact = group(file, 1, "pytorch")
    one, two = (group(file, size, "pytorch", dtype=torch.bfloat16) for size in (1, 2))
    assert any(linear.packed is not None for linear in linears(one[0]))
    assert all(linear.packed is None for linear in linears(exact[0]))
    for sequences in steps():
        want, got = together(exact, sequences), together(one, sequences).float()
        assert torch.nn.functional.cosine_similarity(got, want, dim=-1).min() > 0.99
        assert torch.nn.functional.cosine_similarity(together(two, sequences).float(), got, dim=-1).min() > 0.99


def linears(runner: ModelRunner) -> list[Linear]:
    assert isinstance(runner.model, EagerModel)
    return [part for part in runner.model.decoder.parts() if isinstance(part, Linear)]


@pytest.mark.skipif(not library.available(), reason="there are no native kernels on this machine")
def test_packed_blocks_are_cached_like_other_weights(tmp_path: Path) -> None:
    file = model_of(tmp_path, "Q4_K")
    storage = file.storage("shared")
    written = load_model(file.directory, file.config, 64, storage, cache_root=tmp_path / "cache")
    read = load_model(file.directory, file.config, 64, storage, cache_root=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 1
    for name, tensor in written.state().items():
        assert torch.equal(read.state()[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_to_round_again_takes_the_floats(tmp_path: Path) -> None:
    file = model_of(tmp_path, "Q4_K")
    model = load_model(file.directory, file.config, 64, file.storage("shared", "int8"))
    assert isinstance(model, Decoder)
    assert packed(model.layers[0].output).format == Format("int8", 128)
