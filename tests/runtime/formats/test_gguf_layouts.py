"""What lies otherwise in GGUF than in a checkpoint: against gguf-py, and as llama.cpp's conversion scripts have it."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.runtime.architectures import YARN
from tests.runtime.formats.gguf_models import MODELS, published
from tests.runtime.formats.test_gguf_architectures import write
from tests.runtime.random_models import Case

from wherry_runtime.formats.conversion.source import open_source
from wherry_runtime.formats.conversion.to_gguf import to_gguf
from wherry_runtime.formats.conversion.to_safetensors import to_safetensors
from wherry_runtime.formats.gguf.cursor import Value
from wherry_runtime.formats.gguf.model import GGUFModel
from wherry_runtime.formats.gguf.reader import GGUFFile
from wherry_runtime.formats.gguf.types import type_named
from wherry_runtime.formats.gguf.writer import encoded_header
from wherry_runtime.loading.checkpoint import iterate_tensors
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.loading.loader import load_encoder, load_model
from wherry_runtime.models.registry import read_config
from wherry_runtime.quantization.fp4 import unpack_mxfp4
from wherry_runtime.quantization.storage import Storage

BY_NAME = {case.name: case for case in MODELS}


def tensors_of(file: Path) -> dict[str, Any]:
    """As gguf-py dequantizes them."""
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(file).tensors}


def test_experts_in_mxfp4_keep_their_bits(tmp_path: Path) -> None:
    source = published(BY_NAME["gpt-oss"], tmp_path / "source")
    to_gguf(open_source(source), tmp_path / "m.gguf", None, lambda _: None)
    wanted, found = load_file(source / "model.safetensors"), tensors_of(tmp_path / "m.gguf")
    kinds = {name: info.type.name for name, info in GGUFModel.open([tmp_path / "m.gguf"]).infos.items()}
    for layer in range(3):
        name = f"model.layers.{layer}.mlp.experts"
        gate_up = unpack_mxfp4(wanted[f"{name}.gate_up_proj_blocks"].flatten(-2), wanted[f"{name}.gate_up_proj_scales"])
        down = unpack_mxfp4(wanted[f"{name}.down_proj_blocks"].flatten(-2), wanted[f"{name}.down_proj_scales"])
        for own, values in (("gate", gate_up[:, ::2]), ("up", gate_up[:, 1::2]), ("down", down)):
            assert kinds[f"blk.{layer}.ffn_{own}_exps.weight"] == "MXFP4"
            assert np.array_equal(found[f"blk.{layer}.ffn_{own}_exps.weight"], values.float().numpy())
        bias = wanted[f"{name}.gate_up_proj_bias"]
        assert np.array_equal(found[f"blk.{layer}.ffn_gate_exps.bias"], bias[:, ::2])
        assert np.array_equal(found[f"blk.{layer}.ffn_up_exps.bias"], bias[:, 1::2])
    to_safetensors(open_source(tmp_path / "m.gguf"), tmp_path / "back", None, lambda _: None)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == wanted.keys()
    assert all(back[k].dtype == wanted[k].dtype and torch.equal(back[k], wanted[k]) for k in back)
    assert read_config(tmp_path / "back").experts == read_config(tmp_path / "m.gguf").experts
    to_gguf(open_source(tmp_path / "m.gguf"), tmp_path / "again.gguf", None, lambda _: None)
    assert tensors_of(tmp_path / "again.gguf").keys() == found.keys()
    with pytest.raises(ModelError, match="leave out --type"):
        to_safetensors(open_source(tmp_path / "m.gguf"), tmp_path / "float", type_named("BF16"), lambda _: None)


def test_experts_of_several_types_become_floats(tmp_path: Path) -> None:
    source = published(BY_NAME["gpt-oss"], tmp_path / "source")
    to_gguf(open_source(source), tmp_path / "q.gguf", type_named("Q8_0"), lambda _: None)
    tensors, found = dict(iterate_tensors(tmp_path / "q.gguf")), tensors_of(tmp_path / "q.gguf")
    assert not read_config(tmp_path / "q.gguf").experts.packed  # type: ignore[union-attr]
    gate_up = tensors["model.layers.1.mlp.experts.gate_up_proj"].transpose(1, 2)
    assert np.array_equal(gate_up[:, ::2], found["blk.1.ffn_gate_exps.weight"])
    assert np.array_equal(gate_up[:, 1::2], found["blk.1.ffn_up_exps.weight"])


@pytest.mark.parametrize("name, heads, kv_heads", [("gpt-neox", 4, 4), ("bloom", 4, 4), ("falcon-40b", 4, 2)])
def test_queries_keys_and_values_lie_one_after_another(tmp_path: Path, name: str, heads: int, kv_heads: int) -> None:
    """As convert_hf_to_gguf.py does it."""
    found = tensors_of(write(BY_NAME[name], tmp_path))["blk.1.attn_qkv.weight"]
    theirs = dict(iterate_tensors(tmp_path / "source"))
    (whole,) = (t for n, t in theirs.items() if "1." in n and n.endswith("query_key_value.weight"))
    groups = whole.view(kv_heads, heads // kv_heads + 2, 16, 64)
    parts = (groups[:, :-2], groups[:, [-2]], groups[:, [-1]])
    assert np.array_equal(found, torch.cat([part.reshape(-1, 64) for part in parts]).numpy())


def test_matrices_the_other_way_round_in_blocks(tmp_path: Path) -> None:
    """Blocks lie along what GGUF has as rows, GPT-2 as columns."""
    case = Case("gpt2", "GPT2", {"hidden_size": 128}, model="GPT2LMHeadModel", unknown=BY_NAME["gpt2"].unknown)
    file = write(case, tmp_path, "Q8_0")
    ours, theirs = dict(iterate_tensors(file)), tensors_of(file)
    assert np.array_equal(ours["transformer.h.0.mlp.c_fc.weight"].T, theirs["blk.0.ffn_up.weight"])
    source = dict(iterate_tensors(tmp_path / "source"))["transformer.h.0.mlp.c_fc.weight"]
    torch.testing.assert_close(ours["transformer.h.0.mlp.c_fc.weight"], source, rtol=0, atol=2e-3)


def test_a_decay_is_no_logarithm_in_gguf(tmp_path: Path) -> None:
    found = tensors_of(write(BY_NAME["mamba2"], tmp_path))
    log = dict(iterate_tensors(tmp_path / "source"))["backbone.layers.1.mixer.A_log"]
    np.testing.assert_allclose(found["blk.1.ssm_a"].ravel(), -log.exp().numpy(), rtol=3e-7)
    assert found["blk.1.ssm_a"].shape == found["blk.1.ssm_d"].shape == (8, 1)
    assert found["blk.1.ssm_norm.weight"].shape == (2, 64)


@pytest.mark.parametrize("name, prefix", [("gpt2", "transformer."), ("bert", "bert.")])
def test_names_with_and_without_their_prefix(tmp_path: Path, name: str, prefix: str) -> None:
    """As openai-community/gpt2 has none of it, and google-bert's all."""
    first = write(BY_NAME[name], tmp_path)
    path = tmp_path / "source" / "model.safetensors"
    tensors = load_file(path)
    cut = {k.removeprefix(prefix) if k.startswith(prefix) else f"{prefix}{k}": t for k, t in tensors.items()}
    assert cut.keys().isdisjoint(tensors)
    save_file(cut, path)
    to_gguf(open_source(tmp_path / "source"), tmp_path / "again.gguf", None, lambda _: None)
    assert tensors_of(tmp_path / "again.gguf").keys() == tensors_of(first).keys()


REFUSED = [
    (Case("falcon", "Falcon", {"alibi": True}, unknown=BY_NAME["falcon-7b"].unknown), "alibi True"),
    (Case("bitnet", "BitNet", {"tie_word_embeddings": True}), "hidden_act relu2"),
    (Case("bitnet", "BitNet", {"hidden_act": "silu", "tie_word_embeddings": False}), "tie_word_embeddings False"),
    (Case("llama", "Llama", {"hidden_act": "gelu"}), "hidden_act gelu"),
    (Case("llama", "Llama", {"rope_parameters": {**YARN, "attention_factor": 2.0}}), "YaRN with attention_factor 2.0"),
    (Case("llama", "Llama", {"rope_parameters": {**YARN, "truncate": False}}), "YaRN with truncate False"),
    (Case("mamba", "Mamba", {"expand": 1}, unknown=BY_NAME["mamba"].unknown), "64 channels"),
    (Case("mamba", "Mamba", {"use_bias": True}, unknown=BY_NAME["mamba"].unknown), "use_bias True"),
    (Case("opt", "OPT", unknown=("intermediate_size", "num_key_value_heads")), "GGUF has no name for OPT"),
    (Case("gptj", "GPTJ", {"rotary_dim": 8}, unknown=BY_NAME["gpt2"].unknown), "cannot compute it"),
]


@pytest.mark.parametrize("case, message", REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_what_cannot_be_said_is_refused(tmp_path: Path, case: Case, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        write(case, tmp_path)


# A key of a file, by architecture, and what somebody may have put there.
HOSTILE: list[tuple[str, str, Any]] = [
    ("gpt2", "gpt2.context_length", 1 << 40),
    ("gpt2", "gpt2.feed_forward_length", 1 << 40),
    ("gpt2", "gpt2.attention.head_count", 0),
    ("gpt-neox", "gptneox.rope.dimension_count", 3),
    ("bloom", "bloom.feed_forward_length", 5),
    ("falcon-40b", "falcon.attention.head_count_kv", 3),
    ("falcon-40b", "falcon.block_count", 1 << 31),
    ("gpt-oss", "gpt-oss.block_count", 1 << 31),
    ("gpt-oss", "gpt-oss.expert_feed_forward_length", 7),
    ("gpt-oss", "gpt-oss.expert_count", 1 << 30),
    ("gpt-oss", "gpt-oss.attention.sliding_window_pattern", 3),
    ("gpt-oss", "gpt-oss.attention.sliding_window_pattern", np.array([True, True, False])),
    ("mamba", "mamba.ssm.inner_size", 1 << 40),
    ("mamba", "mamba.ssm.inner_size", 65),
    ("llama", "llama.expert_count", np.zeros(2, np.float32)),
    ("gpt-neox", "gptneox.use_parallel_residual", np.zeros(2, np.float32)),
    ("mamba", "mamba.ssm.state_size", "many"),
    ("mamba", "mamba.ssm.state_size", 1 << 40),
    ("mamba2", "mamba2.ssm.conv_kernel", 1 << 40),
    ("mamba", "mamba.ssm.dt_b_c_rms", True),
    ("mamba2", "mamba2.ssm.time_step_rank", 0),
    ("mamba2", "mamba2.ssm.group_count", 3),
    ("bert", "bert.pooling_type", 4),
    ("bert", "bert.attention.causal", True),
    ("bert", "bert.context_length", 1 << 40),
]


def changed(file: Path, metadata: dict[str, Value], **shapes: tuple[int, ...]) -> Path:
    """A copy with other metadata, and with other shapes of tensors of its first layer (`_` for `.`)."""
    header = GGUFFile.open(file).header
    infos = [info._replace(offset=info.offset - header.data_start) for info in header.tensors.values()]
    infos = [info._replace(shape=shapes.get(info.name.replace(".", "_"), info.shape)) for info in infos]
    bad = file.with_name("bad.gguf")
    bad.write_bytes(encoded_header(metadata, infos) + file.read_bytes()[header.data_start :])
    return bad


def load(file: Path) -> None:
    config, storage = read_config(file), Storage(torch.float32, torch.device("cpu"), "none", 0)
    if config.encoder is not None:
        load_encoder(file, config, config.encoder, storage)
    else:
        load_model(file, config, 64, storage)


SHAPES: list[tuple[str, str, tuple[int, ...]]] = [
    ("gpt2", "blk_0_attn_output_weight", ()),
    ("gpt-neox", "blk_1_attn_qkv_weight", (7, 64)),
    ("mamba2", "blk_0_ssm_norm_weight", ()),
    ("mamba2", "blk_0_ssm_a", ()),
    ("bert", "token_types_weight", ()),
    ("gpt-oss", "blk_0_ffn_down_exps_weight", (4, 64)),
    ("gpt-oss", "blk_1_ffn_gate_exps_bias", (4, 1)),
]


@pytest.mark.parametrize("name, tensor, shape", SHAPES, ids=lambda v: str(v))
def test_tensors_of_odd_shapes_are_refused(tmp_path: Path, name: str, tensor: str, shape: tuple[int, ...]) -> None:
    file = write(BY_NAME[name], tmp_path)
    bad = changed(file, GGUFFile.open(file).header.metadata, **{tensor: shape})
    with pytest.raises(ModelError):
        load(bad)


@pytest.mark.parametrize("name, key, value", HOSTILE, ids=lambda v: str(v))
def test_metadata_that_is_not_the_tensors_is_refused(tmp_path: Path, name: str, key: str, value: Any) -> None:
    file = write(BY_NAME[name], tmp_path)
    bad = changed(file, {**GGUFFile.open(file).header.metadata, key: value})
    with pytest.raises(ModelError):
        read_config(bad)
