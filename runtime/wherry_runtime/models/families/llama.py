"""Llama 2, 3 and everything shaped like them (https://arxiv.org/abs/2307.09288, https://arxiv.org/abs/2407.21783)."""

from typing import Any

from wherry_runtime.models.family import Family, Fields, flag


def fields(raw: dict[str, Any]) -> Fields:
    """Biases, where a model has them."""
    bias = flag(raw, "attention_bias")
    return {"qkv_bias": bias, "output_bias": bias, "mlp_bias": flag(raw, "mlp_bias")}


FAMILY = Family(architecture="LlamaForCausalLM", name="llama", fields=fields)
