"""What a GGUF file's metadata and a checkpoint's config.json say of the same model."""

import math

import numpy as np
import numpy.typing as npt

from wherry_runtime.formats.gguf.architectures import Architecture, architecture_for, architecture_of, common
from wherry_runtime.formats.gguf.fields import Config, Fields, Metadata
from wherry_runtime.formats.gguf.names import LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS
from wherry_runtime.formats.gguf.reader import TensorInfo
from wherry_runtime.formats.gguf.rope import inverse_frequencies, llama3_scaling
from wherry_runtime.loading.errors import ModelError

Factors = dict[str, npt.NDArray[np.float32]]
LOCAL_THETA = 10000.0  # Gemma 3's base of rotary embeddings in layers with a window
# Of Gemma 2 and 3 the largest divide scores by the share of a head, not by its width; files tell by their layers.
CAPS = ("attn_logit_softcapping", "final_logit_softcapping")  # of Gemma 2 always, of Gemma 3 never
_EPS = {"rms_norm_eps": 1e-6, "layer_norm_eps": 1e-5, "layer_norm_epsilon": 1e-5}  # where config.json does not say
_BETAS = ("beta_fast", "beta_slow")  # of YaRN: between how many turns frequencies change (arXiv:2309.00071)
_ACTIVATIONS = {"swish": "silu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_BY_SHARE = {"gemma2": 46, "gemma3": 62}


def config_of(metadata: Metadata, tensors: dict[str, TensorInfo], factors: Factors, dtype: str) -> Config:
    """What config.json would say.

    Args:
        factors: the values of the tensors with what frequencies are divided by.
        dtype: of the weights, as config.json has it.

    Raises:
        ModelError: unknown_architecture, bad_config, or what is not supported.
    """
    architecture = architecture_of(metadata, tensors)
    read = Fields(metadata, architecture.name)
    if architecture.experts is None and read.get("expert_count", int, 0):
        raise ModelError("unsupported_config", f"{architecture.name} with experts is not read from GGUF")
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError("missing_tensors", "the file lacks token_embd.weight")
    if (layers := read.get("block_count", int)) > len(tensors):
        raise ModelError("bad_config", f"{layers} layers of {len(tensors)} tensors")
    config: Config = {
        "architectures": [architecture.models[0]],
        "model_type": architecture.model_type,
        "hidden_act": architecture.activation,
        "dtype": dtype,
        "vocab_size": embedding.shape[0],
        "hidden_size": read.get("embedding_length", int),
        "num_hidden_layers": layers,
        "max_position_embeddings": read.get("context_length", int),
        architecture.eps[1]: round(read.get(f"attention.{architecture.eps[0]}", float), 12),
        "tie_word_embeddings": "output.weight" not in tensors,
        **_tokens(metadata),
        **{f: _plain(read.get(key, float)) for key, (f, _) in architecture.numbers.items() if read.has(key)},
    }
    if architecture.attention:
        config |= _attention_of(read, architecture, config, tensors)
    if architecture.rotary:
        config["rope_parameters"] = _rope(read, factors, architecture, config)
    config |= _experts_of(read, architecture)
    if window := read.get("attention.sliding_window", int, 0):
        config |= {"sliding_window": window, "use_sliding_window": True, "max_window_layers": 0}
    if architecture.period:
        config["layer_types"] = layer_types(architecture, config["num_hidden_layers"])
        _check_pattern(read, architecture, config["layer_types"])
        config |= _gemma_of(read, architecture, config)
    config = architecture.own.read(read, tensors, config)
    _check(config, tensors, architecture)
    return config


def _attention_of(read: Fields, architecture: Architecture, config: Config, tensors: dict[str, TensorInfo]) -> Config:
    """Heads, and what is beside attention in a layer with it."""
    heads = read.get("attention.head_count", int)
    head_dim = read.get("attention.key_length", int, config["hidden_size"] // max(heads, 1))
    rotated = read.get("rope.dimension_count", int, head_dim) if architecture.rotary else head_dim
    if rotated != head_dim and not architecture.partial:
        raise ModelError("unsupported_rope", f"{architecture.name} that rotates a part of each head is not supported")
    found: Config = {
        "intermediate_size": read.get("feed_forward_length", int),
        "num_attention_heads": heads,
        "num_key_value_heads": read.get("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        **_biases(tensors, architecture),
    }
    if architecture.models[0] == "LlamaForCausalLM" and read.get("attention.sliding_window", int, 0):
        found |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    return found


def _plain(value: float) -> float:
    """A float32 as people write it."""
    return float(f"{value:.7g}")


def _experts_of(read: Fields, architecture: Architecture) -> Config:
    experts = architecture.experts
    if experts is None:
        return {}
    count, used = read.get("expert_count", int), read.get("expert_used_count", int)
    if experts.inner is None:
        return {"num_local_experts": count, "num_experts_per_tok": used}
    config: Config = {
        "num_experts": count,
        "num_experts_per_tok": used,
        experts.inner: read.get("expert_feed_forward_length", int),
        "norm_topk_prob": experts.normalized,
        "decoder_sparse_step": 1,
    }
    if experts.shared:
        config["shared_expert_intermediate_size"] = read.get("expert_shared_feed_forward_length", int)
    return config


def _scores_divisor(architecture: Architecture, config: Config) -> int:
    """What llama.cpp divides scores by the root of."""
    if config["num_hidden_layers"] == _BY_SHARE.get(architecture.name):
        return int(config["hidden_size"]) // int(config["num_attention_heads"])
    return int(config["head_dim"])


def _gemma_of(read: Fields, architecture: Architecture, config: Config) -> Config:
    """What Gemma 2 and 3 have beside windows in some layers: Gemma 3's rotary base there."""
    if not architecture.name.startswith("gemma"):
        return {}
    found: Config = {"query_pre_attn_scalar": _scores_divisor(architecture, config)}
    if architecture.name == "gemma3":
        local = {"rope_type": "default", "rope_theta": read.get("rope.freq_base_swa", float, LOCAL_THETA)}
        found |= {"rope_parameters": {"full_attention": config["rope_parameters"], "sliding_attention": local}}
        found |= {"final_logit_softcapping": None, "attn_logit_softcapping": None}
    return found


def layer_types(architecture: Architecture, layers: int) -> list[str]:
    """Which of the layers have a window, as config.json tells."""
    last = architecture.period - 1
    return ["full_attention" if i % architecture.period == last else "sliding_attention" for i in range(layers)]


def _check_pattern(read: Fields, architecture: Architecture, kinds: list[str]) -> None:
    """That the layers with a window are the usual ones, where a file tells: by their period, or each."""
    told = read.metadata.get(f"{architecture.name}.attention.sliding_window_pattern", architecture.period)
    usual: object = architecture.period
    if isinstance(told, np.ndarray):
        told, usual = told.astype(bool).tolist(), [kind == "sliding_attention" for kind in kinds]
    if told != usual:
        raise ModelError("unsupported_config", f"{architecture.name} with windows in other layers than usual")


def _check(config: Config, tensors: dict[str, TensorInfo], architecture: Architecture) -> None:
    """That the sizes are those of the first layer's tensors: memory is taken by them before a tensor is read."""
    whole = common(architecture, config)
    expected: dict[str, tuple[int, ...]] = {"token_embd.weight": (config["vocab_size"], config["hidden_size"])}
    if architecture.attention:
        expected |= _shapes(whole, architecture)
    for name, shape in (expected | architecture.own.shapes(whole)).items():
        info = tensors.get(name)
        if info is None or info.shape != shape:
            found = "missing" if info is None else f"of shape {list(info.shape)}"
            raise ModelError("wrong_shape", f"tensor {name} is {found}; the metadata asks for {list(shape)}")


def _shapes(config: Config, architecture: Architecture) -> dict[str, tuple[int, ...]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // max(config["num_attention_heads"], 1)
    queries, keys = (config[f"num_{kind}_heads"] * head_dim for kind in ("attention", "key_value"))
    expected: dict[str, tuple[int, ...]] = {}
    if "attn_qkv" in architecture.names:
        expected["blk.0.attn_qkv.weight"] = (queries + 2 * keys, hidden)
    else:
        expected |= {"blk.0.attn_q.weight": (queries, hidden), "blk.0.attn_k.weight": (keys, hidden)}
    if (experts := architecture.experts) is not None:
        count = config["num_experts" if experts.inner else "num_local_experts"]
        width = config[experts.inner] if experts.inner else inner
        return expected | {"blk.0.ffn_up_exps.weight": (count, width, hidden)}
    fused = architecture.names.get("ffn_up") == "mlp.gate_up_proj"
    return expected | {"blk.0.ffn_up.weight": ((2 if fused else 1) * inner, hidden)}


def _biases(tensors: dict[str, TensorInfo], architecture: Architecture) -> Config:
    if architecture.name == "qwen2" or architecture.layers != "model.layers":
        return {}
    if (field := {"qwen2moe": "qkv_bias", "stablelm": "use_qkv_bias"}.get(architecture.name)) is not None:
        return {field: "blk.0.attn_q.bias" in tensors}
    return {"attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": "blk.0.ffn_up.bias" in tensors}


def _rope(read: Fields, factors: Factors, architecture: Architecture, config: Config) -> Config:
    head_dim, context = config["head_dim"], config["max_position_embeddings"]
    theta = read.get("rope.freq_base", float, 10000.0)
    rope: Config = {"rope_theta": theta, "rope_type": "default"}
    if ROPE_FACTORS in factors:
        return rope | llama3_scaling(factors[ROPE_FACTORS], theta, head_dim)
    if architecture.partial:
        rope["partial_rotary_factor"] = read.get("rope.dimension_count", int, head_dim) / max(head_dim, 1)
    if architecture.name == "phi3":
        rope["original_max_position_embeddings"] = read.get("rope.scaling.original_context_length", int, context)
        if LONG_FACTORS in factors and SHORT_FACTORS in factors:
            pairs = (("short_factor", SHORT_FACTORS), ("long_factor", LONG_FACTORS))
            rope |= {"rope_type": "longrope", **{field: list(map(_plain, factors[name])) for field, name in pairs}}
        return rope
    kind = read.text("rope.scaling.type", "none")
    if kind == "none":
        return rope
    rope |= {"rope_type": kind, "factor": read.get("rope.scaling.factor", float)}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = read.get("rope.scaling.original_context_length", int, context)
        betas = [name for name in _BETAS if read.has(f"rope.scaling.yarn_{name}")]
        rope |= {name: _plain(read.get(f"rope.scaling.yarn_{name}", float)) for name in betas}
    return rope


def _tokens(metadata: Metadata) -> Config:
    def ids(*roles: str) -> list[int]:
        found = [metadata.get(f"tokenizer.ggml.{role}_token_id") for role in roles]
        return list(dict.fromkeys(i for i in found if isinstance(i, int) and not isinstance(i, bool)))

    begin, stops = ids("bos"), ids("eos", "eot", "eom")
    return {"bos_token_id": begin[0] if begin else None, "eos_token_id": stops[0] if len(stops) == 1 else stops}


def metadata_of(config: Config) -> tuple[Metadata, Factors]:
    """What a GGUF file says of a checkpoint with this config.json, and tensors with what frequencies are divided by.

    Raises:
        ModelError: unknown_architecture, bad_config, unsupported_config or unsupported_rope.
    """
    architecture = architecture_for(config)
    name = architecture.name
    try:
        config = common(architecture, config)
        metadata: Metadata = {
            "general.architecture": name,
            f"{name}.block_count": int(config["num_hidden_layers"]),
            f"{name}.context_length": int(config["max_position_embeddings"]),
            f"{name}.embedding_length": int(config["hidden_size"]),
            f"{name}.attention.{architecture.eps[0]}": float(
                config.get(architecture.eps[1], _EPS[architecture.eps[1]])
            ),
            f"{name}.vocab_size": int(config["vocab_size"]),
            **_attention_metadata(architecture, config),
            **architecture.own.write(config),
        }
        for key, (field, default) in architecture.numbers.items():
            if (number := config.get(field, default)) is not None:
                metadata[f"{name}.{key}"] = float(number)
        metadata |= _experts_metadata(architecture, config)
        refused = architecture.own.refused(config)
        factors = _rope_metadata(architecture, config, metadata) if architecture.rotary else {}
        _refuse(architecture, config, refused)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as e:
        raise ModelError("bad_config", f"config.json: {type(e).__name__}: {e}") from None
    return metadata | _window(architecture, config), factors


def _attention_metadata(architecture: Architecture, config: Config) -> Metadata:
    name = architecture.name
    if not architecture.attention:
        return {f"{name}.feed_forward_length": 0, f"{name}.attention.head_count": 0}
    heads = int(config["num_attention_heads"])
    head_dim = _head_dim(architecture, config)
    return {
        f"{name}.feed_forward_length": int(config["intermediate_size"]),
        f"{name}.attention.head_count": heads,
        f"{name}.attention.head_count_kv": int(config.get("num_key_value_heads") or heads),
        f"{name}.attention.key_length": head_dim,
        f"{name}.attention.value_length": head_dim,
    }


def _head_dim(architecture: Architecture, config: Config) -> int:
    share = int(config["hidden_size"]) // int(config["num_attention_heads"])
    return int(config.get("head_dim") or architecture.head_dim or share)


def _rope_metadata(architecture: Architecture, config: Config, metadata: Metadata) -> Factors:
    """Puts what is said of rotary embeddings into `metadata`, and returns what is in tensors."""
    name, head_dim = architecture.name, _head_dim(architecture, config)
    rope, near = _rope_settings(architecture, config)
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    part = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or architecture.partial or 1.0
    if not architecture.partial and float(part) != 1.0:
        raise ModelError(
            "unsupported_config", f"a part of each head that rotates cannot be said in GGUF files of {name}"
        )
    metadata[f"{name}.rope.dimension_count"] = int(head_dim * float(part))
    metadata[f"{name}.rope.freq_base"] = theta
    if name == "gemma3":
        metadata[f"{name}.rope.freq_base_swa"] = near
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "llama3":
        return {ROPE_FACTORS: inverse_frequencies(rope, theta, head_dim)}
    if name == "phi3":
        return _longrope(config, rope, kind, metadata)
    if kind in ("linear", "yarn"):
        metadata[f"{name}.rope.scaling.type"] = kind
        metadata[f"{name}.rope.scaling.factor"] = float(rope["factor"])
        if original := rope.get("original_max_position_embeddings"):
            metadata[f"{name}.rope.scaling.original_context_length"] = int(original)
        if kind == "yarn":
            metadata |= {f"{name}.rope.scaling.yarn_{b}": float(rope[b]) for b in _BETAS if rope.get(b) is not None}
            _refuse_yarn(architecture, rope)
    elif kind != "default":
        raise ModelError("unsupported_rope", f"rope type {kind!r} is not written to GGUF; default, linear, llama3 are")
    return {}


def _refuse_yarn(architecture: Architecture, rope: Config) -> None:
    """What llama.cpp takes for granted: how much scores are scaled by, and, but of GPT-OSS, where the ramp ends."""
    usual = 0.1 * math.log(float(rope["factor"])) + 1.0 if float(rope["factor"]) > 1 else 1.0
    factor = rope.get("attention_factor")
    odd = [f"{name} {rope[name]}" for name in ("mscale", "mscale_all_dim") if rope.get(name)]
    odd += [f"attention_factor {factor}"] * (
        factor is not None and not math.isclose(float(factor), usual, rel_tol=1e-4)
    )
    odd += ["truncate False"] * (rope.get("truncate") is False and architecture.name != "gpt-oss")
    if odd:
        raise ModelError("unsupported_rope", f"YaRN with {' and '.join(odd)} cannot be said in GGUF")


def _longrope(config: Config, rope: Config, kind: str, metadata: Metadata) -> Factors:
    """Phi-3's: factors for contexts up to the original one and beyond, and what scores are scaled by in both
    (https://arxiv.org/abs/2402.13753)."""
    context = int(config["max_position_embeddings"])
    original = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    original = int(original or context)
    metadata["phi3.rope.scaling.original_context_length"] = original
    if kind == "default":
        return {}
    if kind not in ("longrope", "su", "yarn"):
        raise ModelError("unsupported_rope", f"rope type {kind!r} of Phi-3 is not written to GGUF")
    scale = context / original
    metadata["phi3.rope.scaling.attn_factor"] = (
        math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    )
    pairs = ((LONG_FACTORS, rope["long_factor"]), (SHORT_FACTORS, rope["short_factor"]))
    return {name: np.array(values, np.float32) for name, values in pairs}


def _rope_settings(architecture: Architecture, config: Config) -> tuple[Config, float]:
    """Of layers that see everything, and the base of those with a window."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    near = float(config.get("rope_local_base_freq") or LOCAL_THETA)
    if architecture.name == "gemma3":
        local = rope.get("sliding_attention") or {}
        near, rope = float(local.get("rope_theta") or near), rope.get("full_attention") or rope
        rope = {"rope_theta": float(config.get("rope_theta") or 1e6), **rope}
    return rope, near


def _experts_metadata(architecture: Architecture, config: Config) -> Metadata:
    experts, name = architecture.experts, architecture.name
    if experts is None:
        return {}
    count = config.get("num_experts") or config["num_local_experts"]
    found: Metadata = {
        f"{name}.expert_count": int(count),
        f"{name}.expert_used_count": int(config["num_experts_per_tok"]),
    }
    if experts.inner is not None:
        found[f"{name}.expert_feed_forward_length"] = int(config[experts.inner])
    if experts.shared:
        found[f"{name}.expert_shared_feed_forward_length"] = int(config["shared_expert_intermediate_size"])
    return found


def _refuse(architecture: Architecture, config: Config, reasons: list[str]) -> None:
    """What llama.cpp computes otherwise, and files have no word for. `reasons`: what was found so far."""
    activation = config.get("hidden_act")
    # Gemma's first files name another than their models were trained with.
    if activation and not architecture.name.startswith("gemma"):
        own, known = (_ACTIVATIONS.get(a, a) for a in (activation, architecture.activation))
        reasons += [f"hidden_act {activation}"] * (own != known)
    if architecture.tied and config.get("tie_word_embeddings") is False:
        reasons.append("tie_word_embeddings False")
    if architecture.period and (divisor := config.get("query_pre_attn_scalar")) is not None:
        expected = _scores_divisor(architecture, {**config, "head_dim": _head_dim(architecture, config)})
        if not math.isclose(divisor, expected):
            reasons.append(f"query_pre_attn_scalar {divisor} instead of {expected}")
    caps = [field for field in CAPS if architecture.period and field in config]
    reasons += [f"{field} {config[field]}" for field in caps if (config[field] is None) == (architecture.period == 2)]
    reasons += [field for field in ("use_qk_norm", "qk_layernorm") if config.get(field)]
    if (experts := architecture.experts) is not None and experts.inner is not None:
        if bool(config.get("norm_topk_prob", False)) != experts.normalized:
            reasons.append(f"norm_topk_prob {config.get('norm_topk_prob')}")
        if config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers"):
            reasons.append("experts in some of the layers only")
    if reasons:
        raise ModelError(
            "unsupported_config", f"{' and '.join(reasons)} cannot be said in GGUF files of {architecture.name}"
        )


def _window(architecture: Architecture, config: Config) -> Metadata:
    window = config.get("sliding_window")
    if not isinstance(window, int) or not config.get("use_sliding_window", True):
        return {}
    kinds = config.get("layer_types")
    usual = (
        not kinds or kinds == layer_types(architecture, config["num_hidden_layers"])
        if architecture.period
        else not config.get("max_window_layers") and len(set(kinds or ())) <= 1
    )
    if not usual or (architecture.experts is not None and architecture.experts.inner is not None):
        raise ModelError("unsupported_config", "windows in some of the layers only have no place in GGUF")
    return {f"{architecture.name}.attention.sliding_window": window}
