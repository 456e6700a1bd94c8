"""Llama 2, 3 and everything shaped like them (https://arxiv.org/abs/2307.09288, https://arxiv.org/abs/2407.21783)."""

from typing import Any

ARCHITECTURE = "LlamaForCausalLM"
FAMILY = "llama"


def fields(raw: dict[str, Any]) -> dict[str, Any]:
    """What differs from the plain decoder, from `config.json`."""
    bias = bool(raw.get("attention_bias", False))
    return {"qkv_bias": bias, "output_bias": bias, "mlp_bias": bool(raw.get("mlp_bias", False))}
