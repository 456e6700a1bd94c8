"""Layouts of quantized checkpoints: bit for bit, against cases written by hand and the libraries that define them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file
from tests.runtime.random_models import Case

from wherry_runtime.calibration.pipeline import Job, quantize
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.loading.loader import load_model
from wherry_runtime.loading.quantized import QuantizedCheckpoint
from wherry_runtime.models.registry import read_config
from wherry_runtime.parallel.shard import Shard
from wherry_runtime.quantization import recipes
from wherry_runtime.quantization.bits import pack_bits, unpack_bits
from wherry_runtime.quantization.formats import Format
from wherry_runtime.quantization.fp4 import quantize_mxfp4
from wherry_runtime.quantization.fp8 import dequantize_blocks, quantize_rows
from wherry_runtime.quantization.grouped import Grouped
from wherry_runtime.quantization.layouts import awq, bitsandbytes, compressed_tensors, gptq, kinds_of, known
from wherry_runtime.quantization.layouts.base import UnsupportedLayoutError
from wherry_runtime.quantization.nf4 import VALUES, quantize_nf4
from wherry_runtime.quantization.packed import PackedMatrix
from wherry_runtime.quantization.recipes.base import Settings
from wherry_runtime.quantization.rounding import Grid
from wherry_runtime.quantization.storage import Storage

CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def matrix(bits: int, group: int, *, symmetric: bool = True, outputs: int = 64, inputs: int = 256) -> Grouped:
    return Grid(bits, group, symmetric).nearest(random(outputs, inputs))


def packed(format_: Format, rows: Grouped) -> PackedMatrix:
    result = PackedMatrix(format_, *rows.shape, lambda n: torch.zeros(n, dtype=torch.uint8))
    result.fill(0, rows)
    return result


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 32, 45, 704])
def test_packed_bits_come_back_and_are_those_of_compressed_tensors(bits: int, count: int) -> None:
    codes = torch.randint(0, 1 << bits, (5, count), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    words = pack_bits(codes, bits)
    assert torch.equal(unpack_bits(words, bits, count), codes)
    signed = (codes.to(torch.int16) - (1 << bits - 1)).to(torch.int8)
    assert torch.equal(words, pack_to_int32(signed, bits))


def test_words_are_filled_from_their_lowest_bits() -> None:
    assert pack_bits(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 15]], dtype=torch.uint8), 4).tolist() == [[0xF7654321 - 2**32]]
    # Ten and two thirds codes of three bits are a word: the eleventh lies across two.
    codes = torch.tensor([[0] * 10 + [0b111] + [0] * 21], dtype=torch.uint8)
    assert pack_bits(codes, 3).tolist() == [[-(2**30), 1, 0]]
    with pytest.raises(ValueError, match="8 codes of 4 bits are 1 words"):
        unpack_bits(torch.zeros(1, 2, dtype=torch.int32), 4, 8)


def test_gptq_by_hand() -> None:
    """Two groups of 32 inputs and eight outputs, of which output 1 is the only one that is not zero."""
    codes = torch.full((8, 64), 8, dtype=torch.uint8)
    codes[1, 0], codes[1, 33] = 15, 1
    scales = torch.full((8, 2), 0.5)
    tensors = gptq.WRITER.tensors(Grouped(codes, scales, torch.full((8, 2), 8, dtype=torch.int16), 4, 32))
    assert tensors["qweight"].shape == (8, 8)
    assert tensors["qweight"][0].tolist() == [0x88888888 - 2**32, 0x8888888F - 2**32, *[0x88888888 - 2**32] * 6]
    assert tensors["qweight"][4, 1] == 0x88888818 - 2**32
    assert tensors["qzeros"].tolist() == [[0x77777777], [0x77777777]]  # one less
    assert tensors["scales"].shape == (2, 8)
    assert tensors["g_idx"].tolist() == [0] * 32 + [1] * 32


def test_awq_by_hand() -> None:
    """Outputs 0 … 7 of a word lie in the order 0, 2, 4, 6, 1, 3, 5, 7, from the lowest half byte up."""
    codes = torch.arange(8, dtype=torch.uint8)[:, None].expand(8, 32).contiguous()
    tensors = awq.WRITER.tensors(Grouped(codes, torch.ones(8, 1), torch.zeros(8, 1, dtype=torch.int16), 4, 32))
    assert tensors["qweight"].shape == (32, 1)
    assert tensors["qweight"][0, 0] == 0x75316420
    assert tensors["qzeros"].tolist() == [[0]]


def test_nf4_is_the_published_table() -> None:
    # From the appendix of QLoRA.
    published = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
    published += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
    published += [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941]
    published += [0.7229568362236023, 1.0]
    assert VALUES.tolist() == pytest.approx(published, abs=2e-7)
    tensors = bitsandbytes.WRITER.tensors(quantize_nf4(torch.tensor([[-2.0, 2.0, 0.0, 1.0] * 16])))
    assert tensors["weight"][:2, 0].tolist() == [0x0F, 0x7C]  # the first of two in the high half; 0.5 is nearest 0.4407
    assert tensors["weight.absmax"].tolist() == [2.0]


def test_nf4_with_scales_that_are_quantized_again() -> None:
    rounded = quantize_nf4(random(8, 64))
    tensors = bitsandbytes.WRITER.tensors(rounded)
    table = torch.linspace(-1, 1, 256)
    nested = {"nested_blocksize": 4, "nested_offset": 0.5, "blocksize": 64, "shape": [8, 64]}
    codes = torch.arange(100, 108, dtype=torch.uint8)
    name = "weight.quant_state.bitsandbytes__nf4"
    parts = {
        **tensors,
        "weight.absmax": codes,
        "weight.nested_quant_map": table,
        "weight.nested_absmax": torch.tensor([2.0, 3.0]),
        name: torch.tensor(list(json.dumps(nested).encode()), dtype=torch.uint8),
    }
    (kind,) = [k for k in kinds_of({"quant_method": "bitsandbytes", "load_in_4bit": True}) if name in k.suffixes]
    largest = table[codes.long()] * torch.tensor([2.0, 3.0]).repeat_interleave(4) + 0.5
    expected = rounded.dequantized() / rounded.largest[:, None] * largest[:, None]
    assert torch.allclose(kind.read(parts), expected, atol=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("threshold, format_", [(6.0, "int8-g128-outliers6"), (0.0, "int8-g128")])
def test_int8_of_bitsandbytes(threshold: float, format_: str) -> None:
    """As its authors define it: each row against its largest magnitude, which is in the file."""
    weights = random(64, 200)
    largest = weights.abs().amax(dim=1)
    codes = (weights * 127 / largest[:, None]).round().to(torch.int8)
    parts = {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": threshold}
    (kind,) = kinds_of(settings)
    assert str(kind.format(parts)) == format_
    read = kind.read(parts)
    assert isinstance(read, Grouped)
    exact = codes.float() * (largest / 127)[:, None]
    assert ((read.dequantized() - exact).abs() <= 2**-11 * exact.abs()).all()  # scales are float16 here
    small = {**parts, "SCB": largest * 1e-7}  # what float16 has few bits for
    assert kind.format(small) is None
    assert torch.allclose(kind.read(small).dequantized(), exact * 1e-7, rtol=1e-6)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="row by row"):
        kind.read({**parts, "weight_format": torch.tensor(2, dtype=torch.uint8)})
    made = Grid(8, 200, symmetric=True).nearest(weights)
    written = bitsandbytes.INT8.tensors(made)
    assert {name: t.shape for name, t in written.items()} == {name: t.shape for name, t in parts.items()}
    assert torch.equal(kind.read(written).dequantized(), made.dequantized())  # type: ignore[union-attr]


def test_mxfp4_is_that_of_compressed_tensors() -> None:
    weights = random(16, 128) * torch.exp(3 * random(16, 1, seed=1))
    rounded = quantize_mxfp4(weights)
    values = unpack_fp4_from_uint8(rounded.packed, 16, 128, dtype=torch.float32)
    scales = torch.exp2(rounded.exponents.float() - 127).repeat_interleave(32, 1)
    assert torch.equal(rounded.dequantized(), values * scales)
    exact = torch.tensor([[0.5, 1, 1.5, 2, 3, 4, 6, -6.0] * 4]) * 2.0**-9
    assert torch.equal(quantize_mxfp4(exact).dequantized(), exact)
    halves = torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6.0] * 4])  # in the middle of two: to the even code
    assert quantize_mxfp4(halves).dequantized()[0, :8].tolist() == [0, 1, 1, 2, 2, 4, 4, 6]


def test_fp8_rows_and_blocks() -> None:
    weights = random(200, 300)
    rounded = quantize_rows(weights)
    assert ((rounded.dequantized() - weights).abs() <= weights.abs() * 2**-4 + rounded.scales * 2**-10).all()
    scales = torch.rand(2, 3) + 0.5
    values = weights.to(torch.float8_e4m3fn)
    expected = torch.stack([torch.stack([scales[n // 128, k // 128] for k in range(300)]) for n in range(200)])
    assert torch.equal(dequantize_blocks(values, scales), values.float() * expected)
    assert torch.equal(dequantize_blocks(values, torch.tensor(0.5)), values.float() * 0.5)
    assert torch.equal(dequantize_blocks(values, scales[:1]), values.float() * expected[:1])
    with pytest.raises(ValueError, match="are not those of blocks of 128"):
        dequantize_blocks(values, torch.ones(3, 3))


@pytest.mark.parametrize(
    "layout, bits, group, symmetric, format_",
    [
        ("gptq", 4, 128, True, Format("int4", 128)),
        ("gptq", 4, 64, True, Format("int4", 64)),
        ("gptq", 4, 128, False, Format("int8", 128)),
        ("gptq", 3, 32, True, Format("int4", 32)),
        ("gptq", 3, 32, False, Format("int4", 32)),
        ("gptq", 2, 64, False, Format("int4", 64)),
        ("gptq", 8, 128, True, Format("int8", 128)),
        ("gptq", 8, 128, False, None),
        ("gptq", 4, 16, True, None),
        ("awq", 4, 128, True, Format("int4", 128)),
        ("awq", 4, 32, False, Format("int8", 32)),
        ("packed", 4, 128, True, Format("int4", 128)),
        ("packed", 4, 256, True, Format("int4", 128)),
        ("packed", 3, 32, True, Format("int4", 32)),
        ("int8", 8, 256, True, Format("int8", 128)),
    ],
)
def test_what_is_written_is_read_and_run_as_it_is(
    layout: str, bits: int, group: int, symmetric: bool, format_: Format | None
) -> None:
    writers = {
        "gptq": gptq.WRITER,
        "awq": awq.WRITER,
        "packed": compressed_tensors.PACKED,
        "int8": compressed_tensors.INT8,
    }
    made = matrix(bits, group, symmetric=symmetric)
    writer = writers[layout]
    tensors = writer.tensors(made)
    config = writer.config(Settings(bits=bits, group=group, symmetric=symmetric), ["lm_head"])
    kind = next(k for k in kinds_of(config) if all(s in tensors for s in k.suffixes))
    read = kind.read(tensors)
    assert isinstance(read, Grouped)
    assert torch.equal(read.codes, made.codes)
    assert torch.equal(read.dequantized(), made.dequantized())
    assert kind.format(tensors) == format_ == read.packable()
    if format_ is not None:
        assert torch.equal(packed(format_, read).dequantized(), made.dequantized())


@pytest.mark.parametrize("bits, group, inputs", [(4, 128, 160), (3, 128, 704), (8, 64, 96), (4, 32, 160)])
def test_the_last_group_may_be_cut(bits: int, group: int, inputs: int) -> None:
    """160 inputs in two groups: 128 and 32 of them, not 80 and 80."""
    whole = matrix(bits, group, inputs=inputs)
    settings = {"a": Settings(bits=bits, group=group), "b": Settings(bits=4, group=32)}
    assert compressed_tensors.PACKED.mixed is not None
    for config in (
        compressed_tensors.PACKED.config(settings["a"], ["lm_head"]),
        compressed_tensors.PACKED.mixed(settings, ["lm_head"]),
    ):
        kind = kinds_of(config)[0]
        parts = compressed_tensors.PACKED.tensors(whole)
        read = kind.read(parts)
        assert isinstance(read, Grouped)
        assert torch.equal(read.dequantized(), whole.dequantized())
        format_ = kind.format(parts)
        assert format_ is not None
        assert torch.equal(packed(format_, read).dequantized(), whole.dequantized())


def test_int8_codes_of_minus_128_are_held() -> None:
    """Others write them; rounding here never does."""
    codes = torch.zeros(64, 128, dtype=torch.uint8)
    codes[:, 1::2] = 255
    extreme = Grouped(codes, torch.ones(64, 1), torch.full((64, 1), 128, dtype=torch.int16), 8, 128)
    assert torch.equal(packed(Format("int8", 128), extreme).dequantized(), extreme.dequantized())


def test_groups_in_any_order_are_read_as_floats() -> None:
    made = matrix(4, 32, inputs=64)
    tensors = gptq.WRITER.tensors(made)
    tensors["g_idx"] = torch.tensor([1, 0] * 32, dtype=torch.int32)
    (kind,) = kinds_of({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True})
    assert kind.format(tensors) is None
    read = kind.read(tensors)
    assert isinstance(read, Grouped)
    assert torch.equal(read.dequantized()[:, 0], (made.codes[:, 0].float() - 8) * made.scales[:, 1])
    part = read[8:16, 3:9]
    assert torch.equal(part.dequantized(), read.dequantized()[8:16, 3:9])


def test_a_part_of_a_matrix_that_begins_inside_a_group() -> None:
    made = matrix(4, 128)
    for columns in (slice(128, 256), slice(64, 256), slice(0, 130)):
        assert torch.equal(made[5:40, columns].dequantized(), made.dequantized()[5:40, columns])
    assert made[:, 64:256].packable() is None


@pytest.mark.parametrize(
    "config, message",
    [
        (
            {"quant_method": "hqq"},
            "'hqq' is not supported; awq, bitnet, bitsandbytes, compressed-tensors, fp8, gptq, ternary are",
        ),
        ({"bits": 4}, "None is not supported"),
        ("gptq", "None is not supported"),
        ({"quant_method": "gptq", "bits": 5}, "bits 5 is not supported; 2, 3, 4, 8 are"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version 'gemv'"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "format 'marlin-24'"),
        ({"quant_method": "bitsandbytes"}, "load_in_4bit or load_in_8bit"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_has_fp16_weight": True}, "fp16_weight True"),
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": "six"},
            "llm_int8_threshold 'six'",
        ),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, "weight_block_size"),
    ],
)
def test_unknown_settings_are_refused_by_name(config: Any, message: str) -> None:
    with pytest.raises(UnsupportedLayoutError, match=message.replace("(", r"\(").replace("[", r"\[")):
        kinds_of(config)


def test_the_layouts_are_found() -> None:
    assert sorted(known()) == ["awq", "bitnet", "bitsandbytes", "compressed-tensors", "fp8", "gptq", "ternary"]


@pytest.fixture
def gptq_checkpoint(tmp_path: Path) -> Path:
    """As AutoGPTQ writes one, with biases of zeros that the model does not have."""
    Case("llama", "Llama", {"tie_word_embeddings": False, "num_hidden_layers": 1}).build(tmp_path)
    tensors = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        if "_proj" not in name:
            tensors[name] = tensor
            continue
        module = name.removesuffix(".weight")
        rounded = Grid(4, 32, symmetric=True).nearest(tensor)
        tensors |= {f"{module}.{suffix}": t for suffix, t in gptq.WRITER.tensors(rounded).items()}
        tensors[f"{module}.bias"] = torch.zeros(tensor.shape[0])
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = gptq.WRITER.config(Settings(bits=4, group=32), ["lm_head"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_zero_biases_that_the_model_lacks_are_left_out(gptq_checkpoint: Path) -> None:
    storage = Storage(torch.float32, CPU, native=True)
    model = load_model(gptq_checkpoint, read_config(gptq_checkpoint), 64, storage)
    assert {str(m.format) for p in model.layers[0].parts() if (m := getattr(p, "packed", None))} == {"int4-g32"}
    assert str(model.head.packed.format) == "float32"  # type: ignore[union-attr]


def test_ranks_hold_their_parts(gptq_checkpoint: Path) -> None:
    whole, rank = (
        load_model(gptq_checkpoint, read_config(gptq_checkpoint), 64, Storage(torch.float32, CPU, native=True), None, s)
        for s in (Shard(), Shard(1, 2))
    )
    # The second rank's columns of `down` begin inside a group, which no format can hold.
    for name, columns, format_ in (("output", slice(32, 64), "int4-g32"), ("down", slice(80, 160), "float32")):
        matrices = [getattr(model.layers[0], name).packed for model in (whole, rank)]
        assert str(matrices[1].format) == format_
        assert torch.equal(matrices[0].dequantized()[:, columns], matrices[1].dequantized())


def test_matrices_that_are_held_as_one_have_room_for_each() -> None:
    storage = Storage(
        torch.float32, CPU, held={"a": Format("int4", 32), "b": Format("int8", 32), "c": Format("int8", 64)}
    )
    assert storage.kept(["a", "b"]) == Format("int8", 32)
    assert storage.kept(["a"]) == Format("int4", 32)
    assert storage.kept(["b", "c"]) is None
    assert storage.kept(["a", "d"]) is None
    made = matrix(4, 32)
    assert torch.equal(packed(Format("int8", 32), made).dequantized(), made.dequantized())


def test_a_quantized_checkpoint_is_not_quantized_again(gptq_checkpoint: Path) -> None:
    with pytest.raises(ModelError, match="quantized already, by gptq; leave out --quantization int8"):
        load_model(gptq_checkpoint, read_config(gptq_checkpoint), 64, Storage(torch.float32, CPU, "int8"))


def test_damaged_parts_are_named(gptq_checkpoint: Path) -> None:
    tensors = load_file(gptq_checkpoint / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.qzeros"] = torch.zeros(2, 3, dtype=torch.int32)
    save_file(tensors, gptq_checkpoint / "model.safetensors")
    with pytest.raises(ModelError) as caught:
        load_model(gptq_checkpoint, read_config(gptq_checkpoint), 64, Storage(torch.float32, CPU))
    assert caught.value.code == "bad_weights"
    assert "model.layers.0.mlp.up_proj is not what its quantization says" in caught.value.message


def test_one_line_says_what_is_held_how(gptq_checkpoint: Path) -> None:
    quantized = QuantizedCheckpoint.of(gptq_checkpoint)
    assert quantized is not None
    held = quantized.formats()
    assert len(held) == 7
    assert quantized.describe(held, torch.bfloat16) == "quantized by gptq; held are 7 matrices as they are, in int4-g32"
    assert "7 in bfloat16, which takes that type's memory" in quantized.describe({}, torch.bfloat16)


@pytest.mark.filterwarnings("ignore")  # those of the libraries
@pytest.mark.parametrize("name", ["int4", "int8", "fp8", "mxfp4"])
def test_transformers_reads_what_is_written(name: str, tmp_path: Path) -> None:
    """Through compressed-tensors, to the same weights."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    Case("llama", "Llama", {"num_hidden_layers": 1, "dtype": "bfloat16"}).build(source)
    recipe = recipes.known()[name]
    quantize(Job(source, target, recipe, recipe.settled(Settings()), []), lambda done, total: None)
    dtype = torch.bfloat16 if name == "mxfp4" else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=dtype)
    with torch.inference_mode():
        model(torch.tensor([[1, 2, 3]]))  # unpacks the weights
    quantized = QuantizedCheckpoint.of(target)
    assert quantized is not None
    matrices = {n: t if isinstance(t, torch.Tensor) else t.dequantized() for n, t in quantized.matrices()}
    for module in ("self_attn.q_proj", "mlp.down_proj"):
        theirs = model.get_submodule(f"model.layers.0.{module}").weight
        assert torch.equal(theirs.float(), matrices[f"model.layers.0.{module}.weight"].to(dtype).float())
