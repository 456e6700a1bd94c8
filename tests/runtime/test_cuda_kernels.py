"""Each Triton kernel, attention aside, against PyTorch on shapes that fit no tile."""

import math

import numpy as np
import pytest
import torch
from tests.runtime.cuda_models import DEVICE
from tests.runtime.native_attention import model_config

from wherry_runtime.engine.rng import gumbel_noise
from wherry_runtime.kernels import reference
from wherry_runtime.kernels.cuda.activation import silu_mul
from wherry_runtime.kernels.cuda.noise import perturb
from wherry_runtime.kernels.cuda.norm import rms_norm
from wherry_runtime.kernels.cuda.quantized_linear import FEW_ROWS, MOST_ROWS, multiply, shares, widened
from wherry_runtime.kernels.cuda.rope_cache import CacheView, rope_and_cache
from wherry_runtime.kvcache.formats import FORMATS, encode
from wherry_runtime.kvcache.paged import PagedKVCache
from wherry_runtime.layers.norm import RMSNorm
from wherry_runtime.models.ops import Attention
from wherry_runtime.quantization.formats import Format
from wherry_runtime.quantization.packed import PackedMatrix


def randn(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize(
    ("rows", "width", "dtype", "atol"),
    [
        (1, 64, torch.float32, 1e-6),
        (17, 100, torch.float32, 1e-6),
        (3, 1000, torch.float16, 1e-2),
        (2, 96, torch.bfloat16, 5e-2),
    ],
)
def test_norm(rows: int, width: int, dtype: torch.dtype, atol: float) -> None:
    x, weight = randn(rows, width, dtype=dtype), randn(width, seed=2, dtype=dtype)
    expected = reference.rms_norm(x.double(), weight.double(), 1e-5)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5).double(), expected, atol=atol, rtol=0)
    some = torch.tensor([rows - 1, 0], dtype=torch.int32, device=DEVICE)
    found = rms_norm(x, weight, 1e-5, some)
    torch.testing.assert_close(found.double(), expected[some.long()], atol=atol, rtol=0)
    assert rms_norm(x[:0], weight, 1e-5).shape == (0, width)


@pytest.mark.parametrize(
    ("rows", "width", "dtype", "atol"), [(5, 1100, torch.float32, 1e-5), (1, 24, torch.float16, 0.01)]
)
def test_silu_mul(rows: int, width: int, dtype: torch.dtype, atol: float) -> None:
    x = 4 * randn(rows, 2 * width, dtype=dtype)
    torch.testing.assert_close(silu_mul(x).double(), reference.silu_mul(x.double()), atol=4 * atol, rtol=0)


def kept(rows: torch.Tensor, stored: str) -> torch.Tensor:
    """What the kernel writes of values [T, head_dim], through a cache of one key head and no rotation of values."""
    dim = rows.shape[1]
    cache = PagedKVCache(model_config(1, 1, dim, 8), len(rows), 1, dtype=FORMATS[stored], device=DEVICE)
    attention = Attention(0, 1, 1, dim, None, None, None)
    tables = (torch.ones(1, dim // 2, device=DEVICE), torch.zeros(1, dim // 2, device=DEVICE))
    positions = torch.zeros(len(rows), dtype=torch.int32, device=DEVICE)
    slots = torch.arange(len(rows), dtype=torch.int32, device=DEVICE)
    with np.errstate(all="ignore"):  # the interpreter computes in NumPy
        rope_and_cache(attention, rows.repeat(1, 3), tables, positions, slots, CacheView.of(cache, 0))
    return cache.layers[0][:-1, 0, 1]


def test_fp8_is_rounded_as_pytorch_rounds_it() -> None:
    """Every code, what lies halfway between two, a little beside that, and what is too large."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    halves = (codes[1:] + codes[:-1]) / 2
    beside = torch.cat((halves * (1 + 2.0**-20), halves * (1 - 2.0**-20)))
    odd = torch.tensor([448.1, 464.0, 1e9, math.inf, math.nan, 2.0**-10, 2.0**-11, 1e-30, 0.0])
    values = torch.cat((codes, halves, beside, odd))
    values = torch.cat((values, -values))
    rows = torch.cat((values, torch.zeros(-len(values) % 16))).view(-1, 16).to(DEVICE)
    found, expected = kept(rows, "fp8"), encode(rows, FORMATS["fp8"])
    finite = rows.isnan().logical_not()
    assert torch.equal(found.view(torch.uint8)[finite], expected.view(torch.uint8)[finite])
    assert bool(found.float()[finite.logical_not()].isnan().all())


def test_int8_is_rounded_as_pytorch_rounds_it() -> None:
    rows = randn(9, 24) * torch.logspace(-6, 6, 9).to(DEVICE)[:, None]
    rows[3] = 0
    rows[5, 7] = math.nan
    rows[6, 20] = math.inf
    found, expected = kept(rows, "int8"), encode(rows, FORMATS["int8"])
    # A product that is rounded once more may come out on the other side of a half.
    assert (found[:, :-4].int() - expected[:, :-4].int()).abs().max() <= (0 if DEVICE.type == "cpu" else 1)
    scales = [x[:, -4:].contiguous().view(torch.float32) for x in (found, expected)]
    torch.testing.assert_close(*scales, rtol=1e-6, atol=0, equal_nan=True)


def test_rotation_and_norms_leave_what_is_not_theirs() -> None:
    config = model_config(3, 1, 40, 64)
    cache = PagedKVCache(config, 4, 4, dtype=FORMATS["float32"], device=DEVICE)
    query_norm, key_norm = (RMSNorm("n", 40, 1e-6, dtype=torch.float32, device=DEVICE) for _ in range(2))
    query_norm.weight.copy_(randn(40, seed=3))
    key_norm.weight.copy_(randn(40, seed=4))
    attention = Attention(0, 3, 1, 40, None, query_norm, key_norm)
    angles = torch.outer(torch.arange(64.0), torch.rand(20)).to(DEVICE)
    positions = torch.tensor([5, 0, 63], dtype=torch.int32, device=DEVICE)
    slots = torch.tensor([9, -1, 2], dtype=torch.int32, device=DEVICE)
    qkv = randn(3, 5 * 40)
    heads = qkv.double().view(3, 5, 40).clone()
    rope_and_cache(attention, qkv, (angles.cos(), angles.sin()), positions, slots, CacheView.of(cache, 0))
    cos, sin = (t.double()[positions.long()] for t in (angles.cos(), angles.sin()))
    queries = reference.rotate(reference.rms_norm(heads[:, :3], query_norm.weight.double(), 1e-6), cos, sin)
    keys = reference.rotate(reference.rms_norm(heads[:, 3:4], key_norm.weight.double(), 1e-6), cos, sin)
    torch.testing.assert_close(qkv.view(3, 5, 40)[:, :3].double(), queries, atol=1e-5, rtol=0)
    rows = cache.layers[0].view(-1, 2, 40)
    for row, slot in ((0, 9), (2, 2)):
        torch.testing.assert_close(rows[slot, 0].double(), keys[row, 0], atol=1e-5, rtol=0)
        assert torch.equal(rows[slot, 1].double(), heads[row, 4])
    assert int(rows.abs().sum(dim=(1, 2)).count_nonzero()) == 2


def matrix(format_: Format, outputs: int, inputs: int) -> PackedMatrix:
    packed = PackedMatrix(format_, outputs, inputs, lambda n: torch.zeros(n, dtype=torch.uint8, device=DEVICE))
    packed.fill_reference(0, randn(outputs, inputs, seed=5))
    return packed


@pytest.mark.parametrize(
    ("format_", "outputs", "inputs"),
    [
        (Format("int8", 128), 130, 1100),
        (Format("int8", 32), 64, 128),
        (Format("int4", 32), 100, 200),
        (Format("int4", 128), 70, 1100),
    ],
    ids=str,
)
def test_quantized_products(format_: Format, outputs: int, inputs: int) -> None:
    packed = matrix(format_, outputs, inputs)
    weights = packed.dequantized()
    assert torch.equal(widened(packed, range(packed.num_panels), torch.float32)[:, :outputs], weights.T)
    x, residual, bias = randn(MOST_ROWS + 1, inputs), randn(MOST_ROWS + 1, outputs, seed=2), randn(192, seed=3)
    plain = x.double() @ weights.double().T
    few = multiply(x[:FEW_ROWS], packed)
    for rows in (0, 3, 17):
        found = multiply(x[:rows], packed)
        torch.testing.assert_close(found.double(), plain[:rows], atol=1e-4, rtol=0)
        if rows <= FEW_ROWS:
            assert torch.equal(found, few[:rows]), "rows depend on how many they are"
        added = multiply(x[:rows], packed, bias, residual[:rows]).double()
        expected = plain[:rows] + bias[:outputs].double() + residual[:rows].double()
        torch.testing.assert_close(added, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_quantized_products_of_half_size(dtype: torch.dtype) -> None:
    packed = matrix(Format("int4", 64), 100, 300)
    x, residual = randn(3, 300, dtype=dtype), randn(3, 100, seed=2, dtype=dtype)
    expected = x.double() @ packed.dequantized().double().T + residual.double()
    for rows in (3, 70, MOST_ROWS + 3):
        repeated, beside = x.repeat(rows, 1)[:rows], residual.repeat(rows, 1)[:rows]
        found = multiply(repeated, packed, None, beside).double()[:3]
        torch.testing.assert_close(found, expected, atol=0.6 if dtype is torch.bfloat16 else 0.1, rtol=0)


@pytest.mark.parametrize(
    ("outputs", "inputs", "split", "span"),
    [(2048, 5632, 8, 768), (2560, 2048, 4, 512), (128256, 4096, 1, 4096), (64, 128, 1, 128), (64, 1100, 2, 640)],
)
def test_shares(outputs: int, inputs: int, split: int, span: int) -> None:
    class Shape:
        num_panels = -(-outputs // 64)
        padded_inputs = -(-inputs // 128) * 128

    assert shares(Shape()) == (split, span)  # type: ignore[arg-type]
    assert split * span >= inputs > (split - 1) * span


def test_noise_is_that_of_every_other_backend() -> None:
    columns = 1029
    seeds, positions = [5, 2**64 - 3, 2**63], [0, 77, 123456]
    scores = torch.zeros(5, columns, device=DEVICE)
    scores[4] = randn(columns)
    before = scores[4].clone()
    rows, temperatures = [2, 0, 4], [1.0, 1.0, 0.5]
    perturb(scores, rows, seeds, positions, temperatures)
    for row, seed, position in zip(rows[:2], seeds, positions, strict=False):
        torch.testing.assert_close(scores[row].cpu(), gumbel_noise(seed, position, columns), atol=2e-5, rtol=1e-5)
    expected = before.cpu() / 0.5 + gumbel_noise(seeds[2], positions[2], columns)
    torch.testing.assert_close(scores[4].cpu(), expected, atol=2e-5, rtol=1e-5)
    assert not scores[[1, 3]].any()
