"""Checkpoints into every kind of storage: each tensor in its place, no memory beyond it, and answers that stay."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.runtime.engines import BACKENDS, TINY, VOCAB_SIZE, engine_config
from tests.runtime.random_models import CASES, Case

from wherry_protocol.engine_config import Quantization
from wherry_runtime.engine.runner import ModelRunner
from wherry_runtime.engine.setup import load
from wherry_runtime.layers.linear import Linear
from wherry_runtime.loading.checkpoint import iterate_tensors, shard_files
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.loading.loader import load_model
from wherry_runtime.models.decoder import Decoder
from wherry_runtime.models.registry import read_config
from wherry_runtime.quantization.formats import Format
from wherry_runtime.quantization.packed import PackedMatrix, lookup
from wherry_runtime.quantization.storage import Storage
from wherry_runtime.scheduling.plan import SequenceStep
from wherry_runtime.tokenization.tokenizer import Tokenizer

CHECKOUT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
BY_NAME = {case.name: case for case in CASES}
STORAGES: dict[str, Callable[[], Storage]] = {
    "plain": lambda: Storage(torch.float32, CPU),
    "plain bfloat16": lambda: Storage(torch.bfloat16, CPU),
    "native float32": lambda: Storage(torch.float32, CPU, native=True),
    "native bfloat16": lambda: Storage(torch.bfloat16, CPU, native=True),
    "int8": lambda: Storage(torch.float32, CPU, "int8"),
    "native int8 g32": lambda: Storage(torch.bfloat16, CPU, "int8", 32, native=True),
    "native int4": lambda: Storage(torch.float32, CPU, "int4", native=True),
    "int4 g64": lambda: Storage(torch.bfloat16, CPU, "int4", 64),
}


@pytest.fixture(scope="module", params=["llama-biases-sharded", "qwen3-tied"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    case: Case = BY_NAME[request.param]
    case.build(directory)
    return directory


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t.float().clone() for name, t in iterate_tensors(directory)}


def expected(rows: torch.Tensor, linear: Linear, dtype: torch.dtype) -> torch.Tensor:
    """What `linear` should hold of `rows`, as float32."""
    if linear.packed is None:
        return rows.to(dtype).float()
    matrix = PackedMatrix(linear.packed.format, *rows.shape, lambda n: torch.zeros(n, dtype=torch.uint8))
    matrix.fill_reference(0, rows)
    return matrix.dequantized()


def held(linear: Linear) -> torch.Tensor:
    if linear.packed is not None:
        return linear.packed.dequantized()
    assert linear.weight is not None
    return linear.weight.float()


@pytest.mark.parametrize("storage_name", STORAGES)
def test_every_tensor_is_in_its_place(checkpoint: Path, storage_name: str) -> None:
    storage = STORAGES[storage_name]()
    model = load_model(checkpoint, read_config(checkpoint), 64, storage)
    source = tensors(checkpoint)
    assert model.num_parameters() == sum(t.numel() for t in source.values())

    def check(linear: Linear, *names: str) -> None:
        rows = torch.cat([source[f"{n}.weight"] for n in names])
        torch.testing.assert_close(held(linear), expected(rows, linear, storage.dtype), rtol=0, atol=0)
        if linear.bias is not None:
            bias = torch.cat([source[f"{n}.bias"] for n in names])
            assert torch.equal(linear.bias[: len(bias)].float(), bias.to(linear.bias.dtype).float())
            assert not linear.bias[len(bias) :].any()
            if linear.packed is not None:
                assert linear.bias.dtype is torch.float32
                assert linear.bias.numel() == linear.packed.padded_outputs

    for i, layer in enumerate(model.layers):
        prefix = f"model.layers.{i}."
        check(layer.qkv, *(f"{prefix}self_attn.{n}_proj" for n in "qkv"))
        check(layer.output, f"{prefix}self_attn.o_proj")
        check(layer.gate_up, f"{prefix}mlp.gate_proj", f"{prefix}mlp.up_proj")
        check(layer.down, f"{prefix}mlp.down_proj")
        assert layer.input_norm.weight.dtype is storage.vector_dtype
    check(model.head, "model.embed_tokens" if model.config.tie_word_embeddings else "lm_head")
    everyone = torch.arange(model.config.vocab_size)
    embedded = lookup(model.embedding.table, everyone)
    assert torch.equal(embedded, source["model.embed_tokens.weight"].to(storage.dtype))


def test_a_plain_tied_head_is_the_embedding(tmp_path: Path) -> None:
    BY_NAME["llama-tied"].build(tmp_path)
    model = load_model(tmp_path, read_config(tmp_path), 64, Storage(torch.float32, CPU))
    assert model.head.weight is model.embedding.weight
    packed = load_model(tmp_path, read_config(tmp_path), 64, Storage(torch.float32, CPU, "int4", native=True))
    assert packed.head.packed is not None
    assert packed.head.packed.format == Format("int8", 128)
    assert packed.embedding.weight.dtype is torch.float32
    floats = load_model(tmp_path, read_config(tmp_path), 64, Storage(torch.float32, CPU, native=True))
    assert floats.embedding.table is floats.head.packed


def test_int4_leaves_finer_what_costs_most() -> None:
    model = Decoder(read_config(TINY), 64, Storage(torch.float32, CPU, "int4", 64))
    formats = [
        {name: str(getattr(layer, name).packed.format) for name in ("qkv", "output", "gate_up", "down")}
        for layer in model.layers
    ]
    coarse, finer = "int4-g64", "int8-g128"
    assert formats[0] == {"qkv": finer, "output": finer, "gate_up": coarse, "down": coarse}
    assert all(set(layer.values()) == {coarse} for layer in formats[1:])
    assert model.head.packed is not None
    assert str(model.head.packed.format) == finer


@pytest.mark.parametrize("storage_name", ["native float32", "int4 g64"])
@pytest.mark.parametrize(
    ("edit", "code"),
    [
        (lambda t: t.update({n: torch.cat((v, v[:1])) for n, v in [t.popitem()]}), "wrong_shape"),
        (lambda t: t.popitem(), "missing_tensors"),
        (lambda t: t.update(junk=torch.zeros(3)), "unexpected_tensors"),
    ],
    ids=["wrong shape", "missing", "unexpected"],
)
def test_a_wrong_checkpoint_is_refused(
    tmp_path: Path, storage_name: str, edit: Callable[[dict[str, torch.Tensor]], object], code: str
) -> None:
    BY_NAME["llama-tied"].build(tmp_path)
    path = shard_files(tmp_path)[0]
    content = load_file(path)
    edit(content)
    save_file(content, path, {"format": "pt"})
    with pytest.raises(ModelError) as failure:
        load_model(tmp_path, read_config(tmp_path), 64, STORAGES[storage_name]())
    assert failure.value.code == code


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_cannot_be_rounded_are_named(tmp_path: Path, value: float) -> None:
    BY_NAME["llama-tied"].build(tmp_path)
    path = shard_files(tmp_path)[0]
    content = load_file(path)
    content["model.layers.1.mlp.down_proj.weight"][3, 5] = value
    save_file(content, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj\.weight: .* not a number") as failure:
        load_model(tmp_path, read_config(tmp_path), 64, STORAGES["int8"]())
    assert failure.value.code == "bad_weights"


@pytest.mark.parametrize(("quantization", "group"), [("none", 32), ("int8", 16), ("int4", 256), ("int8", -1)], ids=str)
def test_groups_that_make_no_sense(quantization: Quantization, group: int) -> None:
    with pytest.raises(ModelError, match="group size") as failure:
        load(engine_config(TINY, quantization=quantization, quantization_group=group))
    assert failure.value.code == "bad_setting"


def test_loading_takes_no_memory_beyond_the_packed_weights(tmp_path: Path) -> None:
    shape = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 4}
    Case("big", "Llama", {**shape, "tie_word_embeddings": True, "dtype": "bfloat16"}).build(tmp_path)
    path = shard_files(tmp_path)[0]
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    done = subprocess.run(
        [sys.executable, "-m", "tests.runtime.loading_memory", tmp_path],
        cwd=CHECKOUT,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=True,
    )
    taken = json.loads(done.stdout)
    assert taken["weights"] < 0.35 * path.stat().st_size
    # Huge pages that are not full, scratch of the threads.
    assert taken["most"] < taken["weights"] + taken["largest"] + (8 << 20)
    # What is left in its file takes nothing of its own; packed, nothing but itself: the file's pages are gone.
    assert taken["read"] > 0.9 * taken["packed"] > 16 << 20
    assert taken["mapped"] < 8 << 20
    assert taken["settled"] < taken["packed"] + (8 << 20)
    assert taken["file"] < 1 << 20


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_are_the_same_while_weights_leave_their_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """To the bit, from the first step on, which is computed before anything is packed."""
    monkeypatch.setattr("wherry_runtime.kernels.cpu.settling.PATIENCE_S", 600.0)
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "tie_word_embeddings": True}
    Case("left", "Llama", {**shape, "head_dim": 64, "dtype": dtype}).build(tmp_path)
    path = shard_files(tmp_path)[0]
    held = {name: tensor.to(getattr(torch, dtype)) for name, tensor in load_file(path).items()}
    save_file(held, path, {"format": "pt"})
    settings = {"dtype": dtype, "kv_tokens": 256, **BACKENDS["native"]}
    packed = load(engine_config(tmp_path, weight_cache=str(tmp_path / "cache"), **settings)).runner
    left = load(engine_config(tmp_path, **settings)).runner
    blocks = np.arange(8, dtype=np.int32)
    prompt = [3 * i % VOCAB_SIZE for i in range(50)]

    def logits(runner: ModelRunner) -> torch.Tensor:
        return runner.logits([SequenceStep("prompt", list(prompt), 0, blocks, samples=True)])[0].clone()

    want, matrices = logits(packed), list(left.model.settling.matrices)
    assert len(matrices) == 4 * 8 + 1
    assert all(m.rows is not None and m.rows[0] for m in matrices)
    assert torch.equal(logits(left), want)
    while not left.model.settling.done.is_set():
        assert torch.equal(logits(left), want)
    assert not any(m.rows[0] for m in matrices)
    assert torch.equal(logits(left), want)


def text_tokens(count: int) -> list[int]:
    text = (TINY.parents[2] / "docs" / "architecture.md").read_text()
    return Tokenizer(TINY).encode(text, special_tokens=False)[:count]


def greedy(settings: dict[str, object], tokens: list[int]) -> torch.Tensor:
    """The likeliest token after each of `tokens`: each position as a sequence of one token, over the same cache."""
    runner = load(engine_config(TINY, kv_tokens=1024, **settings)).runner
    blocks = np.arange(1024 // runner.cache.block_size, dtype=np.int32)[: len(tokens) // runner.cache.block_size + 1]
    runner.logits([SequenceStep("prompt", tokens, 0, blocks, samples=False)])
    steps = [SequenceStep(f"{i}", [t], i, blocks, samples=True) for i, t in enumerate(tokens)]
    logits, ids = runner.logits(steps)
    order = torch.tensor([int(i) for i in ids]).argsort()
    return logits.argmax(-1)[order]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("quantization", "group", "least"), [("int8", 0, 0.98), ("int4", 0, 0.9), ("int4", 128, 0.85)], ids=str
)
def test_quantized_weights_choose_the_same_tokens(
    backend: str, quantization: Quantization, group: int, least: float
) -> None:
    tokens = text_tokens(400)
    exact = greedy({"dtype": "float32", **BACKENDS["pytorch"]}, tokens)
    settings = {"quantization": quantization, "quantization_group": group, **BACKENDS[backend]}
    agreement = (greedy(settings, tokens) == exact).float().mean()
    assert agreement >= least


def test_every_tensor_of_the_state_has_a_name_of_its_own(checkpoint: Path) -> None:
    model = Decoder(read_config(checkpoint), 64, STORAGES["native int4"]())
    state = model.state()
    pointers = {t.data_ptr() for t in state.values()}
    assert len(pointers) == len(state)
    assert len(state) == sum(len(part.state()) for part in model.parts())
