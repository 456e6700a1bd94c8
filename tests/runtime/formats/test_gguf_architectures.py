"""Every architecture through GGUF and back. That llama.cpp computes the same: `benchmarks/gguf_architectures.py`."""

import re
from pathlib import Path

import gguf
import pytest
import torch
from tests.runtime.formats.gguf_models import MODELS
from tests.runtime.random_models import Case

from wherry_runtime.formats.conversion.source import open_source
from wherry_runtime.formats.conversion.to_gguf import to_gguf
from wherry_runtime.formats.gguf.architectures import EVERY
from wherry_runtime.formats.gguf.reader import GGUFFile
from wherry_runtime.formats.gguf.types import type_named
from wherry_runtime.loading.checkpoint import iterate_tensors
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.models.registry import read_config

# What files of GGUF have no word for.
UNSAID = {"family", "architecture", "eos_token_ids", "bos_token_id"}


def write(case: Case, directory: Path, kind: str | None = None) -> Path:
    case.build(directory / "source")
    target = directory / "m.gguf"
    to_gguf(open_source(directory / "source"), target, type_named(kind) if kind else None, lambda _: None)
    return target


def test_there_is_a_model_of_each(tmp_path: Path) -> None:
    written = set()
    for case in MODELS:
        case.build(tmp_path / case.name)
        written.add(read_config(tmp_path / case.name).architecture)
    assert written == {a.models[0] for a in EVERY}


@pytest.mark.parametrize("case", MODELS, ids=lambda c: c.name)
def test_through_gguf_and_back(tmp_path: Path, case: Case) -> None:
    file = write(case, tmp_path)
    ours, theirs = dict(iterate_tensors(file)), dict(iterate_tensors(tmp_path / "source"))
    assert theirs.keys() - ours.keys() <= {"lm_head.weight", "pooler.dense.weight", "pooler.dense.bias"}
    assert ours.keys() <= theirs.keys()
    for name, tensor in ours.items():
        assert tensor.shape == theirs[name].shape
        # One is added to the norms of some, and a logarithm is taken, which takes float32's last bits.
        near = 2e-7 if ("norm" in name and case.name.startswith("gemma")) or name.endswith("A_log") else 0
        torch.testing.assert_close(tensor.float(), theirs[name].float(), rtol=0, atol=near)
    read, wanted = read_config(file), read_config(tmp_path / "source")
    for field in set(wanted.__struct_fields__) - UNSAID - {"rope"}:
        assert getattr(read, field) == getattr(wanted, field), field
    assert (read.rope is None) == (wanted.rope is None)
    for field in wanted.rope.__struct_fields__ if wanted.rope is not None else ():
        own, needed = getattr(read.rope, field), getattr(wanted.rope, field)
        # Factors are float32 there.
        assert own == (pytest.approx(needed, rel=1e-6) if field in ("short_factor", "long_factor") else needed), field


@pytest.mark.parametrize("case", MODELS, ids=lambda c: c.name)
def test_tensors_are_named_as_gguf_py_has_them(tmp_path: Path, case: Case) -> None:
    header = GGUFFile.open(write(case, tmp_path)).header
    name = str(header.metadata["general.architecture"])
    architecture = next(a for a, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    patterns = {gguf.TENSOR_NAMES[t] for t in gguf.MODEL_TENSORS[architecture]}
    for tensor in header.tensors:
        stem = re.sub(r"\.(weight|bias)$", "", tensor)
        parts = stem.split(".")
        pattern = stem if parts[0] != "blk" else ".".join(["blk", "{bid}", *parts[2:]])
        assert pattern in patterns, tensor


def test_experts_in_blocks(tmp_path: Path) -> None:
    """A matrix of all experts is cut where one ends; routers are not rounded."""
    shape = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "norm_topk_prob": True}
    file = write(Case("qwen3-moe", "Qwen3Moe", shape), tmp_path, "Q8_0")
    kinds = {name: info.type.name for name, info in GGUFFile.open(file).header.tensors.items()}
    assert kinds["blk.0.ffn_up_exps.weight"] == "Q8_0"
    assert kinds["blk.0.ffn_gate_inp.weight"] == "F32"
    ours, theirs = dict(iterate_tensors(file)), dict(iterate_tensors(tmp_path / "source"))
    assert ours.keys() == theirs.keys()
    for name in (n for n in ours if "experts.2" in n):
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=float(theirs[name].abs().max()) / 127)


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
REFUSED = [
    (Case("gemma2", "Gemma2", {"head_dim": 24, "query_pre_attn_scalar": 20}), "query_pre_attn_scalar 20 instead of 24"),
    (
        Case("gemma2", "Gemma2", {"head_dim": 24, "query_pre_attn_scalar": 24, "attn_logit_softcapping": None}),
        "attn_logit_softcapping None",
    ),
    (Case("qwen2-moe", "Qwen2Moe", {**MOE, "norm_topk_prob": True}), "norm_topk_prob True"),
    (Case("qwen2-moe", "Qwen2Moe", {**MOE, "decoder_sparse_step": 2}), "experts in some of the layers only"),
]


@pytest.mark.parametrize("case, message", REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_what_cannot_be_said_is_refused(tmp_path: Path, case: Case, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        write(case, tmp_path)


def test_experts_that_are_missing_are_refused(tmp_path: Path) -> None:
    case = Case("qwen3-moe", "Qwen3Moe", {**MOE, "norm_topk_prob": True, "num_hidden_layers": 1})
    case.build(tmp_path / "source")
    source = open_source(tmp_path / "source")
    source.tensors[:] = [t for t in source.tensors if "experts.1.up_proj" not in t.name]
    with pytest.raises(ModelError, match="experts are missing"):
        to_gguf(source, tmp_path / "m.gguf", None, lambda _: None)
