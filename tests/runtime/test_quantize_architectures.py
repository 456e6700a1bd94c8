"""Checkpoints of every architecture, quantized ahead: what is loaded again is, to the bit, what rounding left.

Most architectures do not hold their matrices as checkpoints have them: several lie in one, turned, or with their rows
in another order.
"""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tests.runtime.architectures import ARCHITECTURES
from tests.runtime.random_models import Case
from tests.runtime.test_recurrent import CASES as RECURRENT
from tests.runtime.test_recurrent import Reference

from wherry_runtime.calibration.matrices import kept, linears
from wherry_runtime.calibration.pipeline import Job, quantize
from wherry_runtime.calibration.walk import Walk
from wherry_runtime.layers.linear import Linear
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.loading.loader import AnyDecoder, load_model
from wherry_runtime.models.registry import read_config
from wherry_runtime.quality.drift import Measured, measure
from wherry_runtime.quantization.recipes import known
from wherry_runtime.quantization.recipes.base import Settings
from wherry_runtime.quantization.rounding import Grid
from wherry_runtime.quantization.storage import Storage

BY_NAME = {case.name: case for case in ARCHITECTURES}
NAMES = [
    *("phi3", "gpt2", "gpt-neox", "gptj", "bloom", "falcon-7b", "falcon-40b", "falcon-alibi", "opt", "phi-qk-norm"),
    *("cohere", "cohere-plus", "gemma2", "gemma3", "olmo", "olmo2", "granite", "stablelm-12b", "bitnet", "mixtral"),
    *("qwen2-moe-sparse", "qwen3-moe", "mamba-biases-untied", "mamba2", "rwkv"),
]
WINDOWS = [[(7 * i + 13 * w) % 251 for i in range(24)] for w in range(3)]
ENOUGH = 1 << 40


def built(name: str, directory: Path) -> Path:
    if name in RECURRENT:
        Reference(directory, *RECURRENT[name])
    else:
        BY_NAME[name].build(directory)
    return directory


def loaded(directory: Path, *, native: bool = False) -> AnyDecoder:
    storage = Storage(torch.float32, torch.device("cpu"), native=native)
    return load_model(directory, read_config(directory), 64, storage)


def products(model: AnyDecoder) -> list[Linear]:
    return [linear for layer in model.layers for linear in linears(layer)]


def quantized(source: Path, method: str, **chosen: Any) -> Path:
    recipe = known()[method]
    target = source.with_name(f"{source.name}-{method}")
    job = Job(source, target, recipe, recipe.settled(Settings(**chosen)), WINDOWS if recipe.calibrates else [])
    quantize(job, lambda done, count: None)
    return target


@pytest.mark.parametrize("name", NAMES)
def test_what_is_loaded_is_what_rounding_left(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = built(name, tmp_path / "model")
    plain = loaded(source)
    for method in ("int8", "llm-int8"):
        for found, was in zip(products(loaded(quantized(source, method))), products(plain), strict=True):
            assert found.weight is not None
            assert was.weight is not None
            assert torch.equal(found.weight, Grid(8, was.num_inputs, symmetric=True).nearest(was.weight).dequantized())
            assert not torch.equal(found.weight, was.weight)

    rounded: list[torch.Tensor] = []
    drop = Walk.drop

    def note(walk: Walk, index: int) -> None:
        rounded.extend(linear.weight for linear in linears(walk.model.layers[index]) if linear.weight is not None)
        drop(walk, index)

    monkeypatch.setattr(Walk, "drop", note)
    again = loaded(quantized(source, "gptq", bits=4, group=32))
    for found, left, was in zip(products(again), rounded, products(plain), strict=True):
        assert found.weight is not None
        assert torch.equal(found.weight, left)
        assert not torch.equal(left, was.weight)
    # What decides is as it was, and so is everything else.
    same, were = ([p for layer in m.layers for p in kept(layer)] for m in (again, plain))
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(same, were, strict=True))
    before, after = plain.state(), again.state()
    weights = {name for p in products(plain) for name in p.state()}
    assert all(torch.equal(before[name], after[name]) for name in before if name not in weights)


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "gemma2", "bloom", "mixtral", "granite"])
def test_scales_are_folded_into_norms_of_all_kinds(name: str, tmp_path: Path) -> None:
    """AWQ's and SmoothQuant's factors are in the norms, their biases and the weights: pruning nothing shows them."""
    source = built(name, tmp_path / "model")
    x = torch.tensor([WINDOWS[0]])
    plain, smooth = Walk(source, x.shape[1]), Walk(quantized(source, "smoothquant"), x.shape[1])
    expected, found = (w.start(WINDOWS[0]) for w in (plain, smooth))
    for index in range(plain.num_layers):
        expected, found = plain.read_through(index, expected), smooth.read_through(index, found)
    with safe_open(smooth_shard(source), framework="pt") as new, safe_open(source / "model.safetensors", "pt") as old:
        norms = [n for n in old.keys() if n in new.keys() and old.get_tensor(n).dim() == 1]  # noqa: SIM118
        changed = [n for n in norms if not torch.equal(old.get_tensor(n), new.get_tensor(n))]
    assert changed
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def smooth_shard(source: Path) -> Path:
    return sorted(source.with_name(f"{source.name}-smoothquant").glob("*.safetensors"))[0]


def test_names_and_shapes_are_those_that_others_write(tmp_path: Path) -> None:
    """GPT-2's matrices are written by whoever quantizes them as [outputs, inputs], whole as they lie in the file."""
    target = quantized(built("gpt2", tmp_path / "model"), "gptq", bits=4, group=32)
    with safe_open(sorted(target.glob("*.safetensors"))[0], framework="pt") as file:
        assert file.get_slice("transformer.h.0.attn.c_attn.qweight").get_shape() == [64 * 4 // 32, 3 * 64]
        assert file.get_slice("transformer.h.0.attn.c_attn.bias").get_shape() == [3 * 64]
        assert "transformer.h.0.attn.c_attn.weight" not in file.keys()  # noqa: SIM118


def test_a_pruned_one_is_as_the_source_is_written(tmp_path: Path) -> None:
    source = built("gpt2", tmp_path / "model")
    for found, was in zip(products(loaded(quantized(source, "prune"))), products(loaded(source)), strict=True):
        assert found.weight is not None
        assert was.weight is not None
        zero = found.weight == 0
        assert zero.float().mean() == pytest.approx(0.5, abs=0.02)
        assert torch.equal(found.weight[~zero], was.weight[~zero])


def test_experts_that_no_token_reaches(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"num_local_experts": 24, "num_experts_per_tok": 1, "num_hidden_layers": 1}
    Case("mixtral", "Mixtral", settings).build(tmp_path / "model")
    with caplog.at_level(logging.WARNING):
        target = quantized(tmp_path / "model", "gptq", bits=4, group=32)
    (message,) = {
        r.message for r in caplog.records if "no token of the text reaches" in r.message and "gate" in r.message
    }
    unseen = int(message.split("reaches ")[1].split(" ")[0])
    assert 0 < unseen < 24
    assert message.startswith("layer 0: ")
    assert len(products(loaded(target))) == 2 + 2 * 24
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    assert config["dynamic"] == {r"-:^model\.layers\.0\.block_sparse_moe\.gate$": {}}


def test_experts_in_one_tensor_are_refused(tmp_path: Path) -> None:
    source = built("gpt-oss", tmp_path / "model")
    with pytest.raises(ModelError, match="no layout of quantized weights") as refused:
        quantized(source, "int8")
    assert refused.value.code == "unsupported_architecture"


@pytest.mark.parametrize("name", ["phi3", "gpt2", "gpt-neox", "bloom", "falcon-40b", "gptj", "cohere", "gemma2"])
def test_kernels_hold_any_matrices_as_they_are(name: str, tmp_path: Path) -> None:
    """Joined, turned and put in another order, they are the same whole numbers."""
    target = quantized(built(name, tmp_path / "model"), "gptq", bits=4, group=32)
    packed = [linear.packed for linear in products(loaded(target, native=True))]
    assert {str(matrix.format) for matrix in packed if matrix is not None} == {"int4-g32"}
    for matrix, plain in zip(packed, products(loaded(target)), strict=True):
        assert matrix is not None
        assert plain.weight is not None
        assert torch.equal(matrix.dequantized(), plain.weight)


@pytest.mark.parametrize(
    "name", ["phi3", "gpt2", "gpt-neox", "cohere", "gemma2", "qwen3-moe", "gpt-oss", "mamba", "rwkv"]
)
def test_status_drift_of_any_architecture(name: str, tmp_path: Path) -> None:
    source = built(name, tmp_path / "model")
    fine, rough = (measure(Measured(source, method), ENOUGH, 48).divergence for method in ("int8", "int4"))
    assert 0 < fine < rough < 1
