"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 with many small experts, and one for every token behind a gate
(https://arxiv.org/abs/2407.10671)."""

from typing import Any

from wherry_runtime.loading.config import ExpertsConfig, count
from wherry_runtime.models.families.qwen2 import typed_windows
from wherry_runtime.models.family import Family, Fields, flag


def fields(raw: dict[str, Any]) -> Fields:
    """Biases, windows and experts."""
    window = raw["sliding_window"] if flag(raw, "use_sliding_window") else None
    last = raw["max_window_layers"]
    return {
        "qkv_bias": flag(raw, "qkv_bias", default=True),
        "windows": typed_windows({**raw, "sliding_window": window}, lambda i: i % 2 == 0 and i < last),
        "experts": experts(raw, shared_intermediate_size=raw["shared_expert_intermediate_size"]),
    }


def experts(raw: dict[str, Any], *, shared_intermediate_size: int = 0) -> ExpertsConfig:
    """In every so many layers, but for those that are listed."""
    step, plain = raw["decoder_sparse_step"], raw.get("mlp_only_layers") or []
    return ExpertsConfig(
        layers=tuple(i not in plain and (i + 1) % step == 0 for i in range(count(raw, "num_hidden_layers"))),
        num_experts=raw["num_experts"],
        experts_per_token=raw["num_experts_per_tok"],
        intermediate_size=raw["moe_intermediate_size"],
        normalized=flag(raw, "norm_topk_prob"),
        shared_intermediate_size=shared_intermediate_size,
    )


FAMILY = Family(
    architecture="Qwen2MoeForCausalLM",
    name="qwen2_moe",
    fields=fields,
    aliases={"num_local_experts": "num_experts"},
    defaults={
        "decoder_sparse_step": 1,
        "max_window_layers": 28,
        "moe_intermediate_size": 1408,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "shared_expert_intermediate_size": 5632,
        "sliding_window": 4096,
    },
)
