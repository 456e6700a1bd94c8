"""GPT-OSS: experts, in MXFP4 as released, attention sinks, every second layer with a window
(https://arxiv.org/abs/2508.10925)."""

from typing import Any

from wherry_runtime.loading.config import ExpertsConfig, Layout, count
from wherry_runtime.models.families.qwen2 import typed_windows
from wherry_runtime.models.family import Family, Fields, flag, refuse

ROPE = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}


def fields(raw: dict[str, Any]) -> Fields:
    """Everything has a bias."""
    bias, packed = flag(raw, "attention_bias", default=True), bool(raw.get("quantization_config"))
    for name, known in (("swiglu_alpha", 1.702), ("swiglu_limit", 7.0)):
        refuse(raw.get(name, known) != known, f"{name} {raw.get(name)}")
    refuse(packed and raw["hidden_size"] % 32 + raw["intermediate_size"] % 32 != 0, "MXFP4 of an odd width")
    experts = ExpertsConfig(
        layers=(True,) * count(raw, "num_hidden_layers"),
        num_experts=raw["num_local_experts"],
        experts_per_token=raw["num_experts_per_tok"],
        intermediate_size=raw["intermediate_size"],
        softmax="chosen",
        bias=True,
        fused=True,
        packed=packed,
    )
    return {
        "activation": "clamped_silu",
        "windows": typed_windows(raw, lambda index: index % 2 == 0),
        "sinks": True,
        "qkv_bias": bias,
        "output_bias": bias,
        "experts": experts,
        "layout": Layout(names={"mlp.gate": "mlp.router"}),
    }


FAMILY = Family(
    architecture="GptOssForCausalLM",
    name="gpt_oss",
    fields=fields,
    defaults={
        "head_dim": 64,
        "num_key_value_heads": 8,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "rms_norm_eps": 1e-5,
        "sliding_window": 128,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    },
    aliases={"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"},
    theta=150000.0,
    quantization="mxfp4",
)
