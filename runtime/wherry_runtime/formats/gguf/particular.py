"""What only one architecture has in its config.json and in a GGUF file's metadata, read and written."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from wherry_runtime.formats.gguf import fused_experts
from wherry_runtime.formats.gguf.fields import Config, Fields, Metadata
from wherry_runtime.formats.gguf.reader import TensorInfo
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.models.families import bloom, falcon, gpt2, gpt_neox, gpt_oss

Tensors = dict[str, TensorInfo]
Shapes = dict[str, tuple[int, ...]]
# What llama.cpp writes for models whose state bounds no context.
_ANY_CONTEXT = 1 << 20
# `pooling_type` of llama.cpp.
POOLING = {1: "mean", 2: "cls", 3: "last"}
_NUM_TYPES = "tokenizer.ggml.token_type_count"
GPT_OSS_YARN = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}


class Particular(NamedTuple):
    """What is so of one architecture alone. All `Config`s that are given have the common names.

    Attributes:
        read: config.json as far as all have it → as it is.
        write: metadata beside what all have.
        refused: what GGUF has no word for.
        shapes: of some tensors, before which no memory is taken for what they belong to.
        common: fills in what a config.json leaves out.
        aliases: its own names in config.json → the common ones.
        also: other names of it in config.json.
        fits: whether a checkpoint that has the architecture's name is this one.
        pooled: it makes vectors of texts.
    """

    read: Callable[[Fields, Tensors, Config], Config] = lambda fields, tensors, config: config
    write: Callable[[Config], Metadata] = lambda config: {}
    refused: Callable[[Config], list[str]] = lambda config: []
    shapes: Callable[[Config], Shapes] = lambda config: {}
    common: Callable[[Config], Config] = lambda config: config
    aliases: Mapping[str, str] = {}
    also: tuple[str, ...] = ()
    fits: Callable[[Config], bool] = lambda config: True
    pooled: bool = False


def _without(config: Config, *names: str) -> Config:
    return {name: value for name, value in config.items() if name not in names}


def _set(config: Config, names: tuple[str, ...], *, to: bool) -> list[str]:
    """Those of the switches that are so."""
    return [f"{name} {config[name]}" for name in names if config.get(name) is not None and bool(config[name]) == to]


def _positions(config: Config) -> Shapes:
    return {"position_embd.weight": (config["max_position_embeddings"], config["hidden_size"])}


def _gpt_oss_common(config: Config) -> Config:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or GPT_OSS_YARN
    theta = rope.get("rope_theta") or config.get("rope_theta") or 150000.0
    defaults = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "sliding_window": 128}
    return {**defaults, **config, "rope_parameters": {**rope, "rope_theta": theta}}


def _gpt_oss_read(fields: Fields, tensors: Tensors, config: Config) -> Config:
    config = {**_without(config, "mlp_bias"), "swiglu_limit": 7.0}
    config["intermediate_size"] = fields.get("expert_feed_forward_length", int, config["intermediate_size"])
    if config["rope_parameters"]["rope_type"] == "yarn":
        # As OpenAI has it. llama.cpp rounds where frequencies change to whole dimensions.
        config["rope_parameters"] = {**config["rope_parameters"], "truncate": False}
    if fused_experts.packed(tensors.values()):
        plain = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": plain}
    return config


def _gpt_oss_refused(config: Config) -> list[str]:
    reasons = _set(config, ("attention_bias",), to=False) + _set(config, ("tie_word_embeddings",), to=True)
    rope = config["rope_parameters"]
    if rope.get("rope_type") == "yarn" and rope.get("truncate", True):
        reasons.append("rope truncate True")
    return reasons + [f"swiglu_limit {limit}" for limit in (config.get("swiglu_limit", 7.0),) if limit != 7.0]


GPT_OSS = Particular(
    read=_gpt_oss_read,
    write=lambda config: {"gpt-oss.expert_feed_forward_length": int(config["intermediate_size"])},
    refused=_gpt_oss_refused,
    common=_gpt_oss_common,
    aliases=gpt_oss.FAMILY.aliases,
)
GPT2 = Particular(
    read=lambda fields, tensors, config: {
        **_without(config, "head_dim", "hidden_act", "num_key_value_heads"),
        "n_inner": config["intermediate_size"],
        "activation_function": config["hidden_act"],
    },
    refused=lambda config: (
        _set(config, ("scale_attn_by_inverse_layer_idx", "add_cross_attention"), to=True)
        + _set(config, ("scale_attn_weights",), to=False)
    ),
    shapes=_positions,
    common=lambda config: {
        "intermediate_size": 4 * int(config["hidden_size"]),
        "max_position_embeddings": 1024,
        **config,
    },
    aliases=gpt2.FAMILY.aliases,
)
STABLELM = Particular(refused=lambda config: _set(config, ("use_parallel_residual",), to=True))
GPT_NEOX = Particular(
    read=lambda fields, tensors, config: {
        **_without(config, "head_dim", "num_key_value_heads"),
        "use_parallel_residual": fields.flag("use_parallel_residual", default=True),
        "attention_bias": True,
    },
    write=lambda config: {
        "gptneox.use_parallel_residual": bool(config.get("use_parallel_residual", True)),
    },
    refused=lambda config: (
        _set(config, ("attention_bias",), to=False) + _set(config, ("tie_word_embeddings",), to=True)
    ),
    aliases=gpt_neox.FAMILY.aliases,
)


def _two_norms(config: Config) -> bool:
    new = bool(config.get("new_decoder_architecture"))
    return new and (config.get("num_ln_in_parallel_attn") or 2) == 2


def _falcon_common(config: Config) -> Config:
    heads, new = int(config["num_attention_heads"]), bool(config.get("new_decoder_architecture"))
    old = 1 if config.get("multi_query", True) else heads
    found = {"intermediate_size": 4 * int(config["hidden_size"]), "max_position_embeddings": 2048, **config}
    return found | {"num_key_value_heads": (config.get("num_kv_heads") or heads) if new else old}


def _falcon_read(fields: Fields, tensors: Tensors, config: Config) -> Config:
    two = "blk.0.attn_norm_2.weight" in tensors
    kv_heads = config["num_key_value_heads"]
    return {
        **_without(config, "head_dim", "num_key_value_heads"),
        "activation": config["hidden_act"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_kv_heads": kv_heads,
        "new_decoder_architecture": two or kv_heads > 1,
        "num_ln_in_parallel_attn": 2 if two else 1,
        "multi_query": True,
        "parallel_attn": True,
        "alibi": False,
        "bias": False,
    }


FALCON = Particular(
    read=_falcon_read,
    write=lambda config: {"falcon.tensor_data_layout": "jploski"},
    refused=lambda config: _set(config, ("alibi", "bias"), to=True) + _set(config, ("parallel_attn",), to=False),
    common=_falcon_common,
    aliases=falcon.FAMILY.aliases,
    fits=lambda config: not _two_norms(config),
)
FALCON_TWO_NORMS = FALCON._replace(fits=_two_norms)


def _bloom_read(fields: Fields, tensors: Tensors, config: Config) -> Config:
    if config["intermediate_size"] != 4 * config["hidden_size"]:
        raise ModelError(
            "bad_config", f"bloom.feed_forward_length {config['intermediate_size']} is not 4 times the width"
        )
    return {**_without(config, "head_dim", "num_key_value_heads"), "seq_length": config["max_position_embeddings"]}


BLOOM = Particular(
    read=_bloom_read,
    refused=lambda config: _set(config, ("apply_residual_connection_post_layernorm",), to=True),
    common=lambda config: {
        "max_position_embeddings": 2048,
        **config,
        "intermediate_size": 4 * int(config["hidden_size"]),
    },
    aliases=bloom.FAMILY.aliases,
)


def _state(fields: Fields, config: Config) -> Config:
    """What both Mambas have."""
    if fields.flag("ssm.dt_b_c_rms", default=False):
        raise ModelError("unsupported_config", "norms inside of a state space (Falcon Mamba) are not supported")
    inner, hidden = fields.get("ssm.inner_size", int), config["hidden_size"]
    if hidden < 1 or inner % hidden:
        raise ModelError("bad_config", f"ssm.inner_size {inner} is no multiple of the width, {hidden}")
    return {
        **config,
        "expand": inner // hidden,
        "state_size": fields.get("ssm.state_size", int),
        "conv_kernel": fields.get("ssm.conv_kernel", int),
        "use_bias": False,
        "use_conv_bias": True,
        "residual_in_fp32": True,
    }


def _state_written(name: str, config: Config, inner: int, rank: int) -> Metadata:
    return {
        f"{name}.ssm.conv_kernel": int(config.get("conv_kernel", 4)),
        f"{name}.ssm.inner_size": inner,
        f"{name}.ssm.state_size": int(config["state_size"]),
        f"{name}.ssm.time_step_rank": rank,
    }


def _state_refused(config: Config) -> list[str]:
    return _set(config, ("use_bias",), to=True) + _set(config, ("use_conv_bias",), to=False)


def _mamba_common(config: Config) -> Config:
    hidden = int(config["hidden_size"])
    rank = config.get("time_step_rank", "auto")
    return {
        "state_size": 16,
        "max_position_embeddings": _ANY_CONTEXT,
        **config,
        "intermediate_size": int(config.get("intermediate_size") or config.get("expand", 2) * hidden),
        "time_step_rank": math.ceil(hidden / 16) if rank == "auto" else int(rank),
    }


def _mamba_read(fields: Fields, tensors: Tensors, config: Config) -> Config:
    config = _state(fields, config)
    rank = fields.get("ssm.time_step_rank", int)
    return {**config, "intermediate_size": config["expand"] * config["hidden_size"], "time_step_rank": rank}


def _mamba_shapes(config: Config) -> Shapes:
    inner, state, rank = config["intermediate_size"], config["state_size"], config["time_step_rank"]
    return {
        "blk.0.ssm_in.weight": (2 * inner, config["hidden_size"]),
        "blk.0.ssm_x.weight": (rank + 2 * state, inner),
        "blk.0.ssm_conv1d.weight": (inner, config["conv_kernel"]),
    }


MAMBA = Particular(
    read=_mamba_read,
    write=lambda config: _state_written("mamba", config, config["intermediate_size"], config["time_step_rank"]),
    refused=lambda config: (
        _state_refused(config)
        + [f"{config['intermediate_size']} channels"] * (config["intermediate_size"] != 2 * int(config["hidden_size"]))
    ),
    shapes=_mamba_shapes,
    common=_mamba_common,
)


def _mamba2_common(config: Config) -> Config:
    defaults = {"state_size": 128, "n_groups": 8, "num_heads": 128, "head_dim": 64, "expand": 2}
    return {**defaults, "max_position_embeddings": _ANY_CONTEXT, **config}


def _mamba2_read(fields: Fields, tensors: Tensors, config: Config) -> Config:
    config = _state(fields, config)
    heads, groups = fields.get("ssm.time_step_rank", int), fields.get("ssm.group_count", int)
    inner = config["expand"] * config["hidden_size"]
    if heads < 1 or groups < 1 or inner % heads or heads % groups:
        raise ModelError("bad_config", f"mamba2.ssm: {inner} channels of {heads} heads in {groups} groups")
    return {**config, "num_heads": heads, "head_dim": inner // heads, "n_groups": groups}


def _mamba2_shapes(config: Config) -> Shapes:
    inner = config["num_heads"] * config["head_dim"]
    channels = inner + 2 * config["n_groups"] * config["state_size"]
    return {
        "blk.0.ssm_in.weight": (inner + channels + config["num_heads"], config["hidden_size"]),
        "blk.0.ssm_conv1d.weight": (channels, config["conv_kernel"]),
    }


def _limit(value: Any) -> float:
    """transformers writes infinity as {"__float__": "Infinity"}."""
    return float(value["__float__"] if isinstance(value, dict) else value)


def _mamba2_refused(config: Config) -> list[str]:
    limits = [_limit(value) for value in config.get("time_step_limit") or (0.0, math.inf)]
    return _state_refused(config) + [f"time_step_limit {limits}"] * (limits != [0.0, math.inf])


MAMBA2 = Particular(
    read=_mamba2_read,
    write=lambda config: {
        **_state_written("mamba2", config, config["num_heads"] * config["head_dim"], int(config["num_heads"])),
        "mamba2.ssm.group_count": int(config["n_groups"]),
    },
    refused=_mamba2_refused,
    shapes=_mamba2_shapes,
    common=_mamba2_common,
)
BITNET = Particular(
    read=lambda fields, tensors, config: _without(config, "mlp_bias"),
    refused=lambda config: _set(config, ("attention_bias",), to=True),
    common=lambda config: {"rope_theta": 500000.0, "rms_norm_eps": 1e-5, "hidden_act": "relu2", **config},
)


def _bert_read(fields: Fields, tensors: Tensors, config: Config) -> Config:
    if fields.flag("attention.causal", default=False):
        raise ModelError("unsupported_config", "bert.attention.causal: BERT with a causal mask is not supported")
    pooling, types = fields.get("pooling_type", int, 0), tensors.get("token_types.weight")
    if pooling not in (0, *POOLING):
        known = ", ".join(f"{number} ({name})" for number, name in POOLING.items())
        raise ModelError("unsupported_pooling", f"bert.pooling_type {pooling} is not supported; {known} are")
    found = {
        **_without(config, "head_dim", "num_key_value_heads"),
        "type_vocab_size": types.shape[0] if types and types.shape else 0,
    }
    return found | ({"pooling_type": POOLING[pooling]} if pooling else {})


BERT = Particular(
    read=_bert_read,
    write=lambda config: {"bert.attention.causal": False, _NUM_TYPES: int(config["type_vocab_size"])},
    refused=lambda config: (
        _set(config, ("is_decoder", "add_cross_attention"), to=True)
        + [
            f"position_embedding_type {kind}"
            for kind in (config.get("position_embedding_type"),)
            if kind not in (None, "absolute")
        ]
    ),
    shapes=_positions,
    common=lambda config: {
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        **config,
    },
    also=("BertForMaskedLM", "BertForPreTraining"),
    pooled=True,
)
