"""Blocks of GGUF files held and computed with as they are: weights bit for bit, products as their reference."""

import itertools

import numpy as np
import pytest
import torch
from tests.runtime.test_kernels_linear import CPU, ROWS, Product, activations

from wherry_runtime.formats.gguf.blocks.parts import HELD
from wherry_runtime.formats.gguf.types import type_named
from wherry_runtime.kernels.cpu import library
from wherry_runtime.layers.linear import Linear
from wherry_runtime.loading.gguf import BlockRows
from wherry_runtime.parallel.shard import Span
from wherry_runtime.quantization.formats import Format, joined
from wherry_runtime.quantization.packed import PackedMatrix
from wherry_runtime.quantization.packed import linear as reference
from wherry_runtime.quantization.storage import Storage

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
