"""Blocks of every type against gguf-py, bit for bit; those that it cannot read against their definition."""

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from wherry_runtime.formats.gguf.blocks import DEQUANTIZE, dequantize
from wherry_runtime.formats.gguf.blocks.encode import encode
from wherry_runtime.formats.gguf.types import TYPES, GGMLType, type_named
from wherry_runtime.loading.errors import ModelError

BLOCKS = 700
ORIGINAL = [t for t in TYPES.values() if t.name in gguf.GGMLQuantizationType.__members__]
# gguf-py has no code for these.
ALONE = {"F64", "I8", "I16", "I32", "I64", "Q8_K", "Q1_0"}
COMPARED = [t for t in ORIGINAL if t.name not in ALONE]


def random_blocks(kind: GGMLType, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Blocks of all bit patterns: scales that are infinite, NaN, zero and subnormal are among them."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (BLOCKS, kind.size), np.uint8)
    blocks[:8] = np.array([0, 255, 0x7F, 0x80, 1, 0xAA, 0x55, 0xF0], np.uint8)[:, None]
    return blocks


def same(ours: npt.NDArray[np.float32], theirs: npt.NDArray[np.float32]) -> bool:
    nan = np.isnan(ours)
    return np.array_equal(nan, np.isnan(theirs)) and np.array_equal(
        np.where(nan, 0, ours.view(np.uint32)), np.where(nan, 0, theirs.view(np.uint32))
    )


def test_types_are_those_of_the_format() -> None:
    theirs = {k.name: (int(k), *size) for k, size in gguf.GGML_QUANT_SIZES.items() if k.name != "Q8_1"}
    ours = {t.name: (t.id, t.block, t.size) for t in TYPES.values() if t.name != "Q2_0"}
    assert ours == theirs
    assert set(DEQUANTIZE) == {t.name for t in TYPES.values()}


@pytest.mark.parametrize("kind", COMPARED, ids=lambda t: t.name)
def test_dequantized_as_gguf_py_does(kind: GGMLType) -> None:
    raw = random_blocks(kind)
    with np.errstate(all="ignore"):
        theirs = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind.name])
    ours = dequantize(raw.reshape(-1), kind)
    assert ours.dtype == np.float32
    assert same(ours, theirs.reshape(-1).astype(np.float32))


PLAIN = {"F64": "<f8", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}


@pytest.mark.parametrize("name", PLAIN)
def test_numbers_that_stand_alone(name: str) -> None:
    kind = next(t for t in TYPES.values() if t.name == name)
    raw = random_blocks(kind)
    with np.errstate(all="ignore"):
        expected = raw.reshape(-1).view(PLAIN[name]).astype(np.float32)
    assert same(dequantize(raw.reshape(-1), kind), expected)


def test_types_that_gguf_py_cannot_read() -> None:
    half = np.array([0.5], np.float16).view(np.uint8)
    q1 = np.concatenate([half, np.array([0b101] + [0] * 15, np.uint8)])
    assert dequantize(q1, next(t for t in TYPES.values() if t.name == "Q1_0"))[:4].tolist() == [0.5, -0.5, 0.5, -0.5]
    q2 = np.concatenate([half, np.array([0b11100100] + [0] * 15, np.uint8)])
    assert dequantize(q2, next(t for t in TYPES.values() if t.name == "Q2_0"))[:5].tolist() == [-0.5, 0, 0.5, 1, -0.5]
    q8 = np.concatenate([np.array([0.25], np.float32).view(np.uint8), np.arange(256).astype(np.uint8)])
    values = dequantize(
        np.concatenate([q8, np.zeros(32, np.uint8)]), next(t for t in TYPES.values() if t.name == "Q8_K")
    )
    assert values[[0, 1, 127, 128, 255]].tolist() == [0, 0.25, 31.75, -32, -0.25]


def weights(seed: int) -> npt.NDArray[np.float32]:
    """Rows as models have them, and some that they should not have: [rows, 1024]."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((64, 1024), np.float32) * 0.02
    values[3] = 0
    values[4] = 1
    values[5] = -3.25
    values[6] = rng.standard_t(2, 1024)  # long tails
    values[7] *= 1e-9
    values[8] *= 60000
    values[9, ::7] = 0
    values[10] = np.abs(values[10])
    values[11] = np.repeat(np.float32([0.5, -0.5]), 512)
    values[12] = np.arange(1024) / 2 - 256
    return values


SAME_AS_GGUF_PY = ["F32", "F16", "BF16", "Q4_0", "Q5_0", "Q8_0"]


@pytest.mark.parametrize("name", SAME_AS_GGUF_PY)
def test_encoded_as_gguf_py_does(name: str) -> None:
    values = weights(1)
    theirs = gguf.quants.quantize(values, gguf.GGMLQuantizationType[name])
    assert encode(values.reshape(-1), type_named(name)).tobytes() == theirs.tobytes()


def test_bfloat16_of_every_kind_of_number() -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 16, np.uint32)
    bits[:6] = [0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0x7F7FFFFF, 0xFFFFFFFF]
    theirs = gguf.quants.quantize(bits.view(np.float32).reshape(64, -1), gguf.GGMLQuantizationType.BF16)
    assert encode(bits.view(np.float32), type_named("BF16")).tobytes() == theirs.tobytes()


# Root mean square error of these very weights, relative to theirs, as llama.cpp's own quantizer leaves it.
LLAMA_CPP = {"Q8_0": 0.005352, "Q6_K": 0.017770, "Q5_K": 0.036075, "Q4_K": 0.071338, "Q5_0": 0.042783, "Q4_0": 0.085845}


@pytest.mark.parametrize("name", LLAMA_CPP)
def test_error_of_what_is_encoded(name: str) -> None:
    values = np.random.default_rng(2).standard_normal(1 << 18, np.float32) * np.float32(0.02)
    back = dequantize(encode(values, type_named(name)), type_named(name))
    error = float(np.sqrt(np.mean((back - values) ** 2) / np.mean(values**2)))
    assert error == pytest.approx(LLAMA_CPP[name], rel=0.01)


@pytest.mark.parametrize("name", ["Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_of_odd_rows(name: str) -> None:
    values = weights(3)
    back = dequantize(encode(values.reshape(-1), type_named(name)), type_named(name)).reshape(values.shape)
    assert np.isfinite(back).all()
    assert not back[3].any()
    levels = {"Q4_K": 15, "Q5_K": 31, "Q6_K": 63}[name]
    span = (values.max(axis=1) - np.minimum(values.min(axis=1), 0)) / levels
    assert (np.abs(back - values).max(axis=1) <= 1.5 * span + 3e-4 * np.abs(values).max(axis=1) + 1e-7).all()


@pytest.mark.parametrize("value", [np.inf, np.nan, 7e4])
def test_weights_that_a_type_cannot_hold(value: float) -> None:
    values = np.zeros(256, np.float32)
    values[5] = value
    for name in ("F16", "Q4_0", "Q4_K"):
        with pytest.raises(ModelError, match="cannot hold"):
            encode(values, type_named(name))
    assert encode(values, type_named("BF16")).size == 512
