"""Qwen3: norms on queries and keys instead of biases (https://arxiv.org/abs/2505.09388)."""

from typing import Any

from wherry_runtime.models.families.qwen2 import windows
from wherry_runtime.models.family import Family, Fields, flag


def fields(raw: dict[str, Any]) -> Fields:
    """Norms of heads, biases and windows."""
    bias = flag(raw, "attention_bias")
    return {"qk_norm": "head", "qkv_bias": bias, "output_bias": bias, "windows": windows(raw)}


FAMILY = Family(architecture="Qwen3ForCausalLM", name="qwen3", fields=fields, defaults={"head_dim": 128})
