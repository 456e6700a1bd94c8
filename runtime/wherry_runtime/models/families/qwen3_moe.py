"""Qwen3-MoE: Qwen3 with experts (https://arxiv.org/abs/2505.09388)."""

from typing import Any

from wherry_runtime.loading.config import count
from wherry_runtime.models.families import qwen2_moe, qwen3
from wherry_runtime.models.family import Family, Fields, flag


def fields(raw: dict[str, Any]) -> Fields:
    """A window, if there is one, is every layer's."""
    window = raw.get("sliding_window") if flag(raw, "use_sliding_window") else None
    windows = (window,) * count(raw, "num_hidden_layers")
    return {**qwen3.fields(raw), "windows": windows, "experts": qwen2_moe.experts(raw)}


FAMILY = Family(
    architecture="Qwen3MoeForCausalLM",
    name="qwen3_moe",
    fields=fields,
    aliases={"num_local_experts": "num_experts"},
    defaults={
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    },
)
