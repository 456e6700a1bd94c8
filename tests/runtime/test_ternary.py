"""Ternary weights: five in a byte, exactly, on disk and in memory; BitNet checkpoints as transformers has them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.runtime.random_models import Case
from tests.runtime.test_quantization_methods import RECIPES, divergence, job, some_windows
from transformers.integrations.bitnet import pack_weights

from wherry_runtime.calibration.pipeline import quantize
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.loading.loader import load_model
from wherry_runtime.models.registry import read_config
from wherry_runtime.quantization.formats import Format
from wherry_runtime.quantization.grouped import Grouped
from wherry_runtime.quantization.layouts import kinds_of
from wherry_runtime.quantization.layouts.ternary import WRITER
from wherry_runtime.quantization.packed import PackedMatrix, linear
from wherry_runtime.quantization.recipes.base import Settings
from wherry_runtime.quantization.storage import Storage
from wherry_runtime.quantization.ternary import pack_trits, quantize_ternary, unpack_trits

CPU = torch.device("cpu")


def trits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 70), st.integers(0, 1000))
def test_trits_come_back(count: int, seed: int) -> None:
    codes = trits(3, count, seed=seed)
    packed = pack_trits(codes)
    assert packed.shape == (3, -(-count // 5))
    assert torch.equal(unpack_trits(packed, count), codes)


def test_trits_by_hand() -> None:
    """Base 3, the first weight counting the most, each plus one; what is missing is zero."""
    codes = torch.tensor([[-1, -1, -1, -1, -1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, -1, 0, 1]], dtype=torch.int8)
    assert pack_trits(codes).tolist() == [[0], [121], [242], [2 * 81 + 27 + 3 + 2]]
    assert pack_trits(codes[:1, :3]).tolist() == [[3 + 1]]


@pytest.mark.parametrize(
    "packed, count, message",
    [
        (torch.full((1, 1), 243, dtype=torch.uint8), 5, "a byte of 243 is no five"),
        (torch.zeros(1, 2, dtype=torch.uint8), 5, "5 ternary weights are 1 bytes"),
        (torch.zeros(1, 1, dtype=torch.int32), 5, "5 ternary weights are 1 bytes"),
    ],
)
def test_bytes_that_are_no_trits(packed: torch.Tensor, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unpack_trits(packed, count)


def held(rows: Grouped, method: str) -> PackedMatrix:
    matrix = PackedMatrix(Format(method, 128), *rows.shape, lambda n: torch.zeros(n, dtype=torch.uint8))  # type: ignore[arg-type]
    half = rows.shape[0] // 2
    matrix.fill(half, rows[half:, :])
    matrix.fill(0, rows[:half, :])
    return matrix


@pytest.mark.parametrize("outputs, inputs", [(128, 256), (70, 200), (2, 5)])
def test_products_are_those_of_unpacked_weights_bit_for_bit(outputs: int, inputs: int) -> None:
    rows = quantize_ternary(torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1)))
    x = torch.randn(3, inputs, generator=torch.Generator().manual_seed(2))
    packed, wide = held(rows, "ternary"), held(rows, "int8")
    assert torch.equal(packed.dequantized(), rows.dequantized())
    assert torch.equal(linear(x, packed), linear(x, wide))
    assert packed.data.nbytes * 8 == packed.padded_outputs * packed.padded_inputs * 1.625


def test_other_weights_do_not_become_ternary_unseen() -> None:
    matrix = PackedMatrix(Format("ternary", 128), 64, 128, lambda n: torch.zeros(n, dtype=torch.uint8))
    with pytest.raises(ValueError, match="and no other weights"):
        matrix.fill(0, torch.randn(64, 128))


@pytest.fixture(scope="module")
def bitnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With matrices large enough that padding counts for little."""
    directory = tmp_path_factory.mktemp("bitnet")
    Case("bitnet", "BitNet", {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256}).build(directory)
    return directory


def matrices(directory: Path) -> dict[str, torch.Tensor]:
    """What the engine holds of them, in float32."""
    config = read_config(directory)
    model = load_model(directory, config, 64, Storage(torch.float32, CPU))
    found = {}
    for layer in model.layers:
        for part in (layer.qkv, layer.output, layer.gate_up, layer.down):  # type: ignore[union-attr]
            assert part.packed is not None
            assert part.packed.format == Format("ternary", 128)
            found |= {name: part.packed.dequantized()[rows] for name, rows in part.rows.items()}
    return found


def test_a_checkpoint_in_ternary_weights_is_held_in_less_than_two_bits(bitnet: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    quantize(job(bitnet, target, RECIPES["ternary"]), lambda done, total: None)
    original, written = load_file(bitnet / "model.safetensors"), {}
    for path in target.glob("*.safetensors"):
        written |= load_file(path)
    weights = sum(t.numel() for name, t in original.items() if "_proj." in name)
    assert 8 * sum(t.nbytes for name, t in written.items() if name.endswith("trits")) < 1.7 * weights
    found = matrices(target)
    assert len(found) == 14
    for name, matrix in found.items():
        scale = original[f"{name}.weight"].abs().mean().half().float()
        assert torch.equal(matrix, (original[f"{name}.weight"] / scale).round().clamp(-1, 1) * scale), name


def test_a_checkpoint_of_transformers_is_the_same_model(bitnet: Path, tmp_path: Path) -> None:
    """Both kinds of layers that transformers has: one multiplies by the scale, the other divides by it."""
    quantize(job(bitnet, tmp_path / "own", RECIPES["ternary"]), lambda done, total: None)
    expected = matrices(tmp_path / "own")
    original = load_file(bitnet / "model.safetensors")
    for kind in ("autobitlinear", "bitlinear"):
        theirs = tmp_path / kind
        theirs.mkdir()
        for file in bitnet.glob("*.json"):
            (theirs / file.name).write_bytes(file.read_bytes())
        tensors = {name: t for name, t in original.items() if name.removesuffix(".weight") not in expected}
        for name, matrix in expected.items():
            scale = 2.0**-3  # of which the inverse is exact, too
            tensors[f"{name}.weight"] = pack_weights(matrix.sign())
            tensors[f"{name}.weight_scale"] = torch.tensor([scale if kind == "autobitlinear" else 1 / scale])
        save_file(tensors, theirs / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((theirs / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "bitnet", "linear_class": kind, "quantization_mode": "offline"}
        (theirs / "config.json").write_text(json.dumps(config))
        assert all(torch.equal(m, expected[name].sign() * 2.0**-3) for name, m in matrices(theirs).items())


@pytest.mark.parametrize("backend", ["native", "pytorch"])
def test_any_model_can_have_them(backend: str, tmp_path: Path) -> None:
    """Kernels of processors hold them in four bits, PyTorch in 1.6; both compute the same."""
    Case("llama", "Llama", {"num_hidden_layers": 1}).build(tmp_path / "source")
    quantize(job(tmp_path / "source", tmp_path / "out", RECIPES["ternary"]), lambda done, total: None)
    read = matrices(tmp_path / "out")
    plain = load_file(tmp_path / "source" / "model.safetensors")
    save_file(
        {**plain, **{f"{n}.weight": m.contiguous() for n, m in read.items()}}, tmp_path / "source" / "model.safetensors"
    )
    assert (
        divergence(tmp_path / "out", tmp_path / "source", some_windows(tmp_path / "source", 1), backend=backend) < 1e-3
    )


@pytest.mark.parametrize(
    "config, message",
    [
        ({"quant_method": "bitnet", "quantization_mode": "online"}, "quantization_mode 'online'"),
        ({"quant_method": "bitnet", "use_rms_norm": True}, "use_rms_norm True"),
        ({"quant_method": "bitnet", "linear_class": "other"}, "linear_class 'other'"),
    ],
)
def test_settings_that_are_not_supported(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kinds_of(config)


def test_damaged_trits_are_named(bitnet: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    quantize(job(bitnet, target, RECIPES["ternary"]), lambda done, total: None)
    path = next(p for p in target.glob("*.safetensors") if any("trits" in name for name in load_file(p)))
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("trits"))
    tensors[name][0, 0] = 255
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="a byte of 255 is no five ternary weights"):
        matrices(target)


def test_what_is_written_is_read() -> None:
    rows = quantize_ternary(torch.randn(6, 33, generator=torch.Generator().manual_seed(3)))
    (kind,) = kinds_of(WRITER.config(Settings(), ["lm_head"]))
    read = kind.read(WRITER.tensors(rows))
    assert isinstance(read, Grouped)
    assert read.ternary
    assert torch.equal(read.dequantized(), rows.dequantized())
