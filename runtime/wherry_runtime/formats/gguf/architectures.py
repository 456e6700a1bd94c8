"""What GGUF files say of each architecture, and what Hugging Face's config.json and tensor names say of the same.

An architecture is a line of `ARCHITECTURES`. Names of tensors are those of `TENSORS`, the same for all of them so far.
"""

import difflib
import re
from typing import Any, NamedTuple

import numpy as np

from wherry_runtime.formats.gguf.cursor import Value
from wherry_runtime.formats.gguf.reader import TensorInfo
from wherry_runtime.formats.gguf.rope import inverse_frequencies, llama3_scaling
from wherry_runtime.loading.errors import ModelError

Metadata = dict[str, Value]
Config = dict[str, Any]


class Architecture(NamedTuple):
    """An architecture of GGUF.

    Attributes:
        name: `general.architecture`
        models: what config.json calls it, the usual one first.
        model_type: of config.json.
        neighbours: rotary dimensions i and i + n/2 of a head of queries and keys lie side by side in GGUF.
    """

    name: str
    models: tuple[str, ...]
    model_type: str
    neighbours: bool = False


ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture("llama", ("LlamaForCausalLM", "MistralForCausalLM"), "llama", neighbours=True),
        Architecture("qwen2", ("Qwen2ForCausalLM",), "qwen2"),
        Architecture("qwen3", ("Qwen3ForCausalLM",), "qwen3"),
    )
}
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTSIDE_BACK = {theirs: ours for ours, theirs in _OUTSIDE.items()}
_INSIDE_BACK = {theirs: ours for ours, theirs in _INSIDE.items()}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_LAYER_BACK = re.compile(r"model\.layers\.(\d+)\.([\w.]+)\.(weight|bias)")
ROPE_FACTORS = "rope_freqs.weight"


def architecture_of(metadata: Metadata) -> Architecture:
    """The one that a file is of.

    Raises:
        ModelError: unknown_architecture, with the known ones and the nearest.
    """
    return _known(str(metadata.get("general.architecture")), {a.name: a for a in ARCHITECTURES.values()}, "GGUF")


def architecture_for(config: Config) -> Architecture:
    """The one that a checkpoint with this config.json becomes.

    Raises:
        ModelError: unknown_architecture.
    """
    named = config.get("architectures")
    name = str(named[0]) if isinstance(named, list) and named else "none"
    return _known(name, {model: a for a in ARCHITECTURES.values() for model in a.models}, "config.json")


def _known(name: str, known: dict[str, Architecture], where: str) -> Architecture:
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; the nearest is {near[0]}" if near else ""
    raise ModelError(
        "unknown_architecture", f"{where} architecture {name!r} is not converted. Known: {', '.join(known)}{hint}"
    )


def checkpoint_name(name: str) -> str | None:
    """`blk.3.ffn_up.weight` → `model.layers.3.mlp.up_proj.weight`; None for what is part of the configuration.

    Raises:
        ModelError: unexpected_tensors.
    """
    if name == ROPE_FACTORS:
        return None
    stem, _, kind = name.rpartition(".")
    if stem in _OUTSIDE:
        return f"{_OUTSIDE[stem]}.{kind}"
    if (match := _LAYER.fullmatch(name)) and match[2] in _INSIDE:
        return f"model.layers.{match[1]}.{_INSIDE[match[2]]}.{match[3]}"
    raise ModelError("unexpected_tensors", f"tensor {name} has no place in the architectures that are known")


def gguf_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` → `blk.3.ffn_up.weight`.

    Raises:
        ModelError: unexpected_tensors.
    """
    stem, _, kind = name.rpartition(".")
    if stem in _OUTSIDE_BACK:
        return f"{_OUTSIDE_BACK[stem]}.{kind}"
    if (match := _LAYER_BACK.fullmatch(name)) and match[2] in _INSIDE_BACK:
        return f"blk.{match[1]}.{_INSIDE_BACK[match[2]]}.{match[3]}"
    raise ModelError("unexpected_tensors", f"tensor {name} has no name in GGUF files of the known architectures")


def rotated_heads(architecture: Architecture, name: str, config: Config) -> int:
    """The heads of a tensor (by its GGUF name) whose rows lie otherwise than in a checkpoint; 0: they do not."""
    match = _LAYER.fullmatch(name)
    if not architecture.neighbours or match is None or match[2] not in ("attn_q", "attn_k"):
        return 0
    return int(config["num_attention_heads" if match[2] == "attn_q" else "num_key_value_heads"])


def rows_from_neighbours(rows: int, heads: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """For each row of a checkpoint's q or k the row of GGUF's that it is: [rows]."""
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def rows_to_neighbours(rows: int, heads: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """For each row of GGUF's q or k the row of a checkpoint's that it is: [rows]."""
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)


class _Reader:
    """Fields of one architecture, checked."""

    def __init__(self, metadata: Metadata, architecture: str) -> None:
        self._metadata = metadata
        self._prefix = architecture

    def get(self, name: str, kind: type[Any], default: Any = None) -> Any:
        value = self._metadata.get(f"{self._prefix}.{name}", default)
        if value is None:
            raise ModelError("bad_config", f"{self._prefix}.{name} is missing")
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, kind) or value < 0:
            raise ModelError("bad_config", f"{self._prefix}.{name} is {value!r}; one positive number is expected")
        return value

    def text(self, name: str, default: str) -> str:
        return str(self._metadata.get(f"{self._prefix}.{name}", default))


def config_of(metadata: Metadata, tensors: dict[str, TensorInfo], factors: Any, dtype: str) -> Config:
    """What config.json would say.

    Args:
        factors: the values of `rope_freqs.weight`, [head_dim / 2] float32, or None.
        dtype: of the weights, as config.json has it.

    Raises:
        ModelError: unknown_architecture, bad_config, or what is not supported.
    """
    architecture = architecture_of(metadata)
    read = _Reader(metadata, architecture.name)
    if read.get("expert_count", int, 0):
        raise ModelError("unsupported_config", f"{architecture.name} with experts is not read from GGUF")
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError("missing_tensors", "the file lacks token_embd.weight")
    heads, hidden = read.get("attention.head_count", int), read.get("embedding_length", int)
    head_dim = read.get("attention.key_length", int, hidden // max(heads, 1))
    if read.get("rope.dimension_count", int, head_dim) != head_dim:
        raise ModelError("unsupported_rope", f"{architecture.name} that rotates a part of each head is not supported")
    context = read.get("context_length", int)
    window = read.get("attention.sliding_window", int, 0)
    mistral = architecture.name == "llama" and window > 0
    config: Config = {
        "architectures": ["MistralForCausalLM" if mistral else architecture.models[0]],
        "model_type": "mistral" if mistral else architecture.model_type,
        "hidden_act": "silu",
        "dtype": dtype,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": read.get("feed_forward_length", int),
        "num_hidden_layers": read.get("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": read.get("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "rms_norm_eps": round(read.get("attention.layer_norm_rms_epsilon", float), 12),
        "rope_parameters": _rope(read, factors, head_dim, context),
        "tie_word_embeddings": "output.weight" not in tensors,
        **_biases(tensors, architecture),
        **_tokens(metadata),
    }
    _check(config, tensors)
    if window:
        config |= {"sliding_window": window, "use_sliding_window": True, "max_window_layers": 0}
    return config


def _check(config: Config, tensors: dict[str, TensorInfo]) -> None:
    """That the sizes are those of the first layer's tensors: memory is taken by them before a tensor is read."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    expected = {
        "token_embd.weight": (config["vocab_size"], hidden),
        "blk.0.attn_q.weight": (config["num_attention_heads"] * config["head_dim"], hidden),
        "blk.0.attn_k.weight": (config["num_key_value_heads"] * config["head_dim"], hidden),
        "blk.0.ffn_up.weight": (inner, hidden),
    }
    for name, shape in expected.items():
        info = tensors.get(name)
        if info is None or info.shape != shape:
            found = "missing" if info is None else f"of shape {list(info.shape)}"
            raise ModelError("wrong_shape", f"tensor {name} is {found}; the metadata asks for {list(shape)}")
    if config["num_hidden_layers"] > len(tensors):
        raise ModelError("bad_config", f"{config['num_hidden_layers']} layers of {len(tensors)} tensors")


def _biases(tensors: dict[str, TensorInfo], architecture: Architecture) -> Config:
    if architecture.name == "qwen2":
        return {}
    return {"attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": "blk.0.ffn_up.bias" in tensors}


def _rope(read: _Reader, factors: Any, head_dim: int, context: int) -> Config:
    theta = read.get("rope.freq_base", float, 10000.0)
    rope: Config = {"rope_theta": theta, "rope_type": "default"}
    if factors is not None:
        return rope | llama3_scaling(factors, theta, head_dim)
    kind = read.text("rope.scaling.type", "none")
    if kind == "none":
        return rope
    rope |= {"rope_type": kind, "factor": read.get("rope.scaling.factor", float)}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = read.get("rope.scaling.original_context_length", int, context)
    return rope


def _tokens(metadata: Metadata) -> Config:
    def ids(*roles: str) -> list[int]:
        found = [metadata.get(f"tokenizer.ggml.{role}_token_id") for role in roles]
        return list(dict.fromkeys(i for i in found if isinstance(i, int) and not isinstance(i, bool)))

    begin, stops = ids("bos"), ids("eos", "eot", "eom")
    return {"bos_token_id": begin[0] if begin else None, "eos_token_id": stops[0] if len(stops) == 1 else stops}


def metadata_of(config: Config) -> tuple[Metadata, Any]:
    """What a GGUF file says of a checkpoint with this config.json, and the values of `rope_freqs.weight` or None.

    Raises:
        ModelError: unknown_architecture, bad_config or unsupported_rope.
    """
    architecture = architecture_for(config)
    name = architecture.name
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        default_dim = 128 if name == "qwen3" else hidden // heads
        head_dim = int(config.get("head_dim") or default_dim)
        metadata: Metadata = {
            "general.architecture": name,
            f"{name}.block_count": int(config["num_hidden_layers"]),
            f"{name}.context_length": int(config["max_position_embeddings"]),
            f"{name}.embedding_length": hidden,
            f"{name}.feed_forward_length": int(config["intermediate_size"]),
            f"{name}.attention.head_count": heads,
            f"{name}.attention.head_count_kv": int(config.get("num_key_value_heads") or heads),
            f"{name}.attention.key_length": head_dim,
            f"{name}.attention.value_length": head_dim,
            f"{name}.attention.layer_norm_rms_epsilon": float(config.get("rms_norm_eps", 1e-6)),
            f"{name}.rope.dimension_count": head_dim,
            f"{name}.vocab_size": int(config["vocab_size"]),
        }
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise ModelError("bad_config", f"config.json: {type(e).__name__}: {e}") from None
    metadata[f"{name}.rope.freq_base"] = theta
    if isinstance(window := config.get("sliding_window"), int) and config.get("use_sliding_window", True):
        if config.get("max_window_layers") or len(set(config.get("layer_types") or ())) > 1:
            raise ModelError("unsupported_config", "windows in some of the layers only have no place in GGUF")
        metadata[f"{name}.attention.sliding_window"] = window
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "llama3":
        return metadata, inverse_frequencies(rope, theta, head_dim)
    if kind in ("linear", "yarn"):
        metadata[f"{name}.rope.scaling.type"] = kind
        metadata[f"{name}.rope.scaling.factor"] = float(rope["factor"])
        if original := rope.get("original_max_position_embeddings"):
            metadata[f"{name}.rope.scaling.original_context_length"] = int(original)
    elif kind != "default":
        raise ModelError("unsupported_rope", f"rope type {kind!r} is not written to GGUF; default, linear, llama3 are")
    return metadata, None
