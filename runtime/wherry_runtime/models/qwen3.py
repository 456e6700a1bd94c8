"""Qwen3: norms on queries and keys instead of biases (https://arxiv.org/abs/2505.09388)."""

from typing import Any

from wherry_runtime.models.qwen2 import windows

ARCHITECTURE = "Qwen3ForCausalLM"
FAMILY = "qwen3"


def fields(raw: dict[str, Any]) -> dict[str, Any]:
    """What differs from the plain decoder, from `config.json`."""
    bias = bool(raw.get("attention_bias", False))
    head_dim = raw.get("head_dim") or 128
    return {"qk_norm": True, "qkv_bias": bias, "output_bias": bias, "windows": windows(raw), "head_dim": head_dim}
