"""Blocks of GGUF files held and computed with as they are: weights bit for bit, products as their reference, models."""

import itertools
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.runtime.random_models import Case
from tests.runtime.ranks import Checkpoint, group, steps, together
from tests.runtime.test_kernels_linear import CPU, ROWS, Product, activations

from wherry_runtime.engine.eager_model import EagerModel
from wherry_runtime.engine.runner import ModelRunner
from wherry_runtime.formats.conversion.source import open_source
from wherry_runtime.formats.conversion.to_gguf import to_gguf
from wherry_runtime.formats.gguf.blocks.parts import HELD
from wherry_runtime.formats.gguf.types import type_named
from wherry_runtime.kernels.cpu import library
from wherry_runtime.layers.linear import Linear
from wherry_runtime.loading.checkpoint import iterate_tensors
from wherry_runtime.loading.gguf import BlockRows
from wherry_runtime.loading.loader import load_model
from wherry_runtime.models.decoder import Decoder
from wherry_runtime.models.registry import read_config
from wherry_runtime.parallel.shard import Span
from wherry_runtime.quantization.formats import Format, joined
from wherry_runtime.quantization.packed import PackedMatrix
from wherry_runtime.quantization.packed import linear as reference
from wherry_runtime.quantization.storage import Storage

# All of them see each token: rounding must not choose others.
MOE = {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 256, "norm_topk_prob": True}
SHAPES = [(64, 256), (100, 512), (130, 768)]  # outputs, inputs


def rows_of(name: str, outputs: int, inputs: int) -> BlockRows:
    """Blocks of any bits, with scales that are no more than numbers."""
    kind, rng = type_named(name), np.random.default_rng(outputs + inputs)
    blocks = rng.integers(0, 256, (outputs * inputs // kind.block, kind.size), dtype=np.uint8)
    halves = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
    for at in halves.get(name, (0, 2) if name in ("Q4_1", "Q5_1") else (0,)):
        d = (rng.standard_normal(len(blocks)) * 0.01).astype("<f2")
        blocks[:, at : at + 2] = d.view(np.uint8).reshape(-1, 2)
    return BlockRows(blocks.reshape(outputs, -1), kind, slice(0, inputs))


def layer_of(parts: list[BlockRows], *, native: bool = True, inputs: Span | None = None) -> Linear:
    """A layer that holds them as they are, filled last part first."""
    held = {f"w{i}": HELD[rows.type.name] for i, rows in enumerate(parts)}
    storage = Storage(torch.bfloat16, CPU, native=native, held=held)
    spans = [(name, Span.all(rows.shape[0])) for name, rows in zip(held, parts, strict=True)]
    layer = Linear(spans, inputs or Span.all(parts[0].shape[1]), bias=False, storage=storage, role="qkv")
    for name, rows in reversed(list(zip(held, parts, strict=True))):
        layer.slots()[f"{name}.weight"].fill(rows)
    return layer


def packed(layer: Linear) -> PackedMatrix:
    assert layer.packed is not None
    return layer.packed


@pytest.mark.parametrize("outputs, inputs", SHAPES)
@pytest.mark.parametrize("name", HELD)
def test_every_weight_is_held_bit_for_bit(name: str, outputs: int, inputs: int) -> None:
    rows = rows_of(name, outputs, inputs)
    matrix = packed(layer_of([rows]))
    assert matrix.format == HELD[name]
    assert torch.equal(matrix.dequantized(), rows.dequantized())


@pytest.mark.parametrize("name", HELD)
def test_memory_is_about_that_of_the_file(name: str) -> None:
    matrix = packed(layer_of([rows_of(name, 128, 1024)]))
    assert matrix.scales is not None
    taken = 8 * (matrix.data.nbytes + matrix.scales.nbytes) / (128 * 1024)
    assert taken == matrix.format.bits_per_weight
    # Codes of two and three bits take four.
    allowed = {"Q2_K": 2.63, "Q3_K": 1.19}.get(name, 0.57)
    assert 0 <= taken - type_named(name).bits <= allowed


@pytest.mark.skipif(not library.available(), reason="there are no native kernels on this machine")
@pytest.mark.parametrize("outputs, inputs", SHAPES)
@pytest.mark.parametrize("name", HELD)
def test_product(name: str, outputs: int, inputs: int) -> None:
    layer = layer_of([rows_of(name, outputs, inputs)])
    product, alone = Product(layer, max(ROWS)), Product(layer, 1, threads=1)
    x = activations(max(ROWS), inputs)
    want = reference(x, packed(layer))
    atol = 2e-6 * float(want.abs().max())
    for rows in ROWS:
        torch.testing.assert_close(product(x[:rows]), want[:rows], rtol=0, atol=atol)
        assert not product.padding().any()
        assert torch.equal(product(x[:rows])[-1:], alone(x[rows - 1 : rows])), "a row is the same in any company"


MIXES = [
    (("Q4_K", "Q4_K", "Q6_K"), Format("k6", 16, 256, zero=32, minima=True)),
    (("Q4_K", "Q5_K"), Format("k5", 32, 256, minima=True)),
    (("Q3_K", "Q5_K"), Format("k6", 16, 256, zero=4, minima=True)),
    (("Q5_0", "Q4_1"), Format("k5", 32, 32, zero=16, minima=True)),
    (("Q6_K", "Q5_1"), Format("k6", 16, 32, zero=32, minima=True)),
    (("Q4_0", "Q8_0"), Format("int8", 32)),
    (("Q4_K", "Q8_0"), None),
]


@pytest.mark.parametrize("names, format_", MIXES, ids=lambda v: "+".join(v) if isinstance(v, tuple) else "")
def test_matrices_of_several_types_held_as_one(names: tuple[str, ...], format_: Format | None) -> None:
    """As queries, keys and values are in what llama.cpp calls Q4_K_M."""
    assert joined([HELD[name] for name in names]) == format_
    parts = [rows_of(name, outputs, 512) for name, outputs in zip(names, (96, 32, 50), strict=False)]
    layer = layer_of(parts)
    want = torch.cat([rows.dequantized() for rows in parts])
    if format_ is None:  # what no format holds is dequantized
        assert torch.equal(packed(layer).dequantized(), want.bfloat16().float())
        return
    assert packed(layer).format == format_
    assert torch.equal(packed(layer).dequantized(), want)


@pytest.mark.parametrize("name", HELD)
def test_every_two_types_join_whichever_comes_first(name: str) -> None:
    for other in HELD:
        assert joined([HELD[name], HELD[other]]) == joined([HELD[other], HELD[name]])


@pytest.mark.parametrize("name", HELD)
@pytest.mark.parametrize("cut", [128, 256, 384])
def test_the_columns_of_two_ranks(name: str, cut: int) -> None:
    rows = rows_of(name, 70, 768)
    want = rows.dequantized()
    for start, stop in itertools.pairwise((0, cut, 768)):
        matrix = packed(layer_of([rows], inputs=Span(start, stop, 768)))
        assert matrix.format.method == HELD[name].method
        assert torch.equal(matrix.dequantized(), want[:, start:stop])


def test_columns_that_begin_inside_a_group_are_dequantized() -> None:
    rows = rows_of("Q4_K", 64, 512)
    matrix = packed(layer_of([rows], inputs=Span(16, 512, 512)))
    assert matrix.format == Format("bfloat16")
    assert torch.equal(matrix.dequantized(), rows.dequantized()[:, 16:].bfloat16().float())


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
