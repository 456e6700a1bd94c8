"""Models that cannot be loaded: each one really broken on disk, and what the error says."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.runtime.engines import TINY, engine_config
from tests.runtime.random_models import CASES

from wherry_protocol.naming import ENV_SAMPLE_MODELS
from wherry_runtime.engine.setup import load
from wherry_runtime.loading.checkpoint import iterate_tensors, shard_files
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.loading.loader import choose_dtype
from wherry_runtime.loading.locate import locate
from wherry_runtime.models.registry import read_config

SHARDED = next(c for c in CASES if c.shard_size != "1GB")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pristine")
    SHARDED.build(directory)
    return directory


@pytest.fixture
def model(pristine: Path, tmp_path: Path) -> Path:
    """A sharded checkpoint to break."""
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        path = model / "config.json"
        raw = json.loads(path.read_text())
        path.write_text(json.dumps({**raw, **changes}))

    return edit


def write(name: str, content: bytes) -> Callable[[Path], None]:
    def apply(model: Path) -> None:
        (model / name).write_bytes(content)

    return apply


def remove(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).unlink()


def shard(model: Path, index: int = 1) -> Path:
    return shard_files(model)[index]


def truncate_data(model: Path) -> None:
    """The header stays whole, the last tensor's bytes are gone: what an interrupted copy leaves."""
    path = shard(model)
    content = path.read_bytes()
    path.write_bytes(content[:-100])


def truncate_header(model: Path) -> None:
    path = shard(model)
    path.write_bytes(path.read_bytes()[:20])


def lie_about_header(model: Path) -> None:
    shard(model).write_bytes(struct.pack("<Q", 1 << 60) + b"{}")


def edit_tensors(edit: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(model: Path) -> None:
        tensors = load_file(shard(model))
        edit(tensors)
        save_file(tensors, shard(model))

    return apply


def grow_one(tensors: dict[str, torch.Tensor]) -> None:
    name = next(n for n in tensors if n.endswith("weight") and tensors[n].dim() == 2)
    tensors[name] = torch.cat([tensors[name], tensors[name][:1]])


def add_junk(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.extra.weight"] = torch.zeros(2)


BROKEN: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "no config": (remove("config.json"), "missing_file", r"config\.json: not found; is .*model a model directory\?"),
    "config is not JSON": (write("config.json", b"{oops"), "bad_json", r"config\.json: not readable as JSON"),
    "config is not text": (write("config.json", b"\xff\xfe\x00"), "bad_json", r"config\.json: not readable as JSON"),
    "config is deep": (write("config.json", b"[" * 100_000), "bad_json", r"not readable as JSON"),
    "config is a list": (write("config.json", b"[]"), "bad_json", "a JSON object is expected, found list"),
    "unknown architecture": (
        edit_config(architectures=["LlamaForCausalLLM"]),
        "unknown_architecture",
        r"LlamaForCausalLLM is not known\. Known: Bert.*, LlamaFor.*, Qwen3Moe.*; the nearest is LlamaForCausalLM",
    ),
    "no architecture": (edit_config(architectures=None), "unknown_architecture", "architecture none is not known"),
    "odd architectures": (edit_config(architectures=[5, {}]), "unknown_architecture", "architecture none is not known"),
    "no hidden size": (edit_config(hidden_size=None), "bad_config", "hidden_size"),
    "layers as text": (edit_config(num_hidden_layers="three"), "bad_config", "num_layers"),
    "negative size": (edit_config(intermediate_size=-5), "bad_config", "intermediate_size"),
    "heads do not divide": (edit_config(num_key_value_heads=3), "bad_config", "4 heads do not divide by 3"),
    "zero heads": (edit_config(num_attention_heads=0, head_dim=None), "bad_config", "num_heads|head_dim"),
    "odd head": (edit_config(head_dim=23), "bad_config", "head_dim 23 must be even"),
    "unknown dtype": (edit_config(dtype="int3"), "bad_config", "dtype"),
    "unknown rope": (
        edit_config(rope_parameters={"rope_type": "mrope"}),
        "unsupported_rope",
        "'mrope' is not supported",
    ),
    "rope without a factor": (
        edit_config(rope_parameters={"rope_type": "linear"}),
        "bad_config",
        "linear needs a factor",
    ),
    "longrope without factors": (
        edit_config(rope_parameters={"rope_type": "longrope"}),
        "bad_config",
        "needs short_factor and long_factor",
    ),
    "nothing to rotate": (edit_config(partial_rotary_factor=0.05), "bad_config", "1 of 24 columns cannot be rotated"),
    "no heads to divide by": (
        edit_config(architectures=["GPTJForCausalLM"], num_attention_heads=0),
        "bad_config",
        "a setting of GPTJForCausalLM is missing or odd: integer division",
    ),
    "more experts chosen than there are": (
        edit_config(architectures=["MixtralForCausalLM"], num_local_experts=2, num_experts_per_tok=3),
        "bad_config",
        "3 of 2 experts",
    ),
    "layers without number": (
        edit_config(architectures=["MixtralForCausalLM"], num_hidden_layers=10**15),
        "bad_config",
        "experts in 0 of",
    ),
    "root of a negative size": (
        edit_config(architectures=["GemmaForCausalLM"], hidden_act="gelu", hidden_size=-64),
        "bad_config",
        "complex",
    ),
    "experts as text": (
        edit_config(architectures=["Qwen3MoeForCausalLM"], num_experts="many"),
        "bad_config",
        "num_experts",
    ),
    "rope as text": (edit_config(rope_parameters={"rope_theta": "x"}), "bad_config", "rope"),
    "rope is no object": (edit_config(rope_parameters="x"), "bad_config", "rope"),
    "layers differ in number": (
        edit_config(architectures=["Qwen3ForCausalLM"], use_sliding_window=True, sliding_window=5, layer_types=["x"]),
        "bad_config",
        "layer_types has 1 of 3 layers",
    ),
    "layers as text, mistral": (
        edit_config(architectures=["MistralForCausalLM"], num_hidden_layers="x", sliding_window=5),
        "bad_config",
        "num_layers",
    ),
    "window of no tokens": (
        edit_config(architectures=["MistralForCausalLM"], sliding_window=0),
        "bad_config",
        "windows",
    ),
    "activation": (edit_config(hidden_act="mish"), "unsupported_activation", "'mish' is not supported"),
    "quantized": (edit_config(quantization_config={"bits": 4}), "unsupported_quantization", "None is not supported"),
    "no weights": (remove("model.safetensors.index.json"), "missing_weights", "neither model.safetensors nor"),
    "index is not JSON": (write("model.safetensors.index.json", b"\x00"), "bad_json", "index.json"),
    "index without a map": (write("model.safetensors.index.json", b"{}"), "bad_json", "weight_map must be an object"),
    "index leads out": (
        write("model.safetensors.index.json", b'{"weight_map": {"a": "../../etc/passwd"}}'),
        "bad_json",
        "not a plain file name",
    ),
    "a shard is missing": (lambda m: shard(m).unlink(), "missing_shard", r"model-00002-of-\d+\.safetensors"),
    "truncated data": (truncate_data, "damaged_shard", r"model-00002-of-\d+\.safetensors: damaged or truncated"),
    "truncated header": (truncate_header, "damaged_shard", r"model-00002-of-\d+\.safetensors: damaged or truncated"),
    "empty shard": (lambda m: shard(m).write_bytes(b"") and None, "damaged_shard", "damaged or truncated"),
    "absurd header": (lie_about_header, "damaged_shard", "damaged or truncated"),
    "wrong shape": (edit_tensors(grow_one), "wrong_shape", r"is \[\d+, \d+\] where config\.json asks for \[\d+, \d+\]"),
    "left over": (edit_tensors(add_junk), "unexpected_tensors", r"no place for model\.layers\.0\.extra\.weight"),
    "missing tensors": (edit_tensors(lambda t: t.popitem() and None), "missing_tensors", "the checkpoint lacks"),
    "no tokenizer": (remove("tokenizer.json"), "missing_tokenizer", r"tokenizer\.json: not found"),
    "broken tokenizer": (write("tokenizer.json", b'{"model": 5}'), "bad_tokenizer", "not a tokenizer"),
    "broken settings": (write("tokenizer_config.json", b"{"), "bad_json", r"tokenizer_config\.json"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_models(model: Path, name: str) -> None:
    damage, code, message = BROKEN[name]
    damage(model)
    with pytest.raises(ModelError, match=message) as failure:
        load(engine_config(model))
    assert failure.value.code == code
    assert str(model) in failure.value.message
    assert "\n" not in failure.value.message


@pytest.mark.parametrize(
    ("uri", "code", "message"),
    [
        ("/no/such/dir", "model_not_found", "/no/such/dir: no such directory"),
        ("file:///no/such%20dir", "model_not_found", "/no/such dir: no such directory"),
        ("file://host/dir", "unsupported_uri", "three slashes"),
        ("hf://org/name", "unsupported_uri", "wherry pull hf://org/name"),
        ("ftp://org/name", "unsupported_uri", "ftp:// is not supported by the runtime"),
        ("sample://../tiny", "unsupported_uri", "named like sample://tiny"),
        ("sample://", "unsupported_uri", "named like sample://tiny"),
        ("sample://none", "model_not_found", "none: no such directory"),
        (str(TINY / "config.json"), "model_not_found", r"is a file, a model is a directory or a GGUF file"),
    ],
)
def test_uris_that_lead_nowhere(uri: str, code: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as failure:
        locate(uri)
    assert failure.value.code == code


def test_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate("sample://tiny") == TINY
    assert locate(str(TINY)) == TINY
    assert locate(f"file://{TINY}") == TINY
    (tmp_path / "other").mkdir()
    (tmp_path / "a b.gguf").write_bytes(b"GGUF")
    assert locate(f"file://{tmp_path}/a%20b.gguf") == tmp_path / "a b.gguf"
    monkeypatch.setenv(ENV_SAMPLE_MODELS, str(tmp_path))
    assert locate("sample://other") == tmp_path / "other"


@pytest.mark.parametrize(
    ("settings", "code"),
    [({"max_model_len": 10**6}, "bad_setting"), ({"kv_cache_bytes": 100}, "kv_cache_too_small")],
)
def test_settings_that_do_not_fit_the_model(model: Path, settings: dict[str, int], code: str) -> None:
    with pytest.raises(ModelError) as failure:
        load(engine_config(model, **settings))
    assert failure.value.code == code


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.gguf", "model.ckpt", "flax_model.msgpack"])
def test_other_kinds_of_weights_are_not_opened(model: Path, tmp_path: Path, name: str) -> None:
    """Neither what would be unpickled nor what would be parsed."""
    for file in [*shard_files(model), model / "model.safetensors.index.json"]:
        file.unlink()
    made = tmp_path / "made"
    (model / name).write_bytes(b"cos\nsystem\n(S'touch %b'\ntR." % bytes(made))
    with pytest.raises(ModelError) as failure:
        load(engine_config(model))
    assert failure.value.code == "missing_weights"
    assert not made.exists()


def test_known_junk_is_ignored(model: Path) -> None:
    edit_tensors(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))(model)
    assert load(engine_config(model)).num_parameters > 0
    assert not any("inv_freq" in name for name, _ in iterate_tensors(model))


def test_a_cache_smaller_than_the_context_shortens_the_context(model: Path) -> None:
    loaded = load(engine_config(model, kv_blocks=10))
    assert (loaded.max_model_len, loaded.kv_tokens) == (40, 40)
    assert load(engine_config(model, kv_blocks=10, max_model_len=64)).max_model_len == 64


def test_dtypes(model: Path) -> None:
    edit_config(dtype="float16")(model)
    config = read_config(model)
    cpu = torch.device("cpu")
    assert choose_dtype("auto", config, cpu) is torch.float32
    assert choose_dtype("auto", config, torch.device("cuda")) is torch.float16
    assert choose_dtype("bfloat16", config, cpu) is torch.bfloat16
    assert load(engine_config(model, dtype="bfloat16")).dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("config_eos", "generation_eos", "expected"),
    [(None, None, ()), (5, None, (5,)), ([5, 6], None, (5, 6)), (5, [7, 8], (7, 8)), (5, 9, (9,))],
)
def test_end_of_sequence_ids(model: Path, config_eos: Any, generation_eos: Any, expected: tuple[int, ...]) -> None:
    edit_config(eos_token_id=config_eos)(model)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": generation_eos}))
    assert read_config(model).eos_token_ids == expected
