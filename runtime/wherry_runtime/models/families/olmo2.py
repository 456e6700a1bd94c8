"""OLMo 2: norms after attention and MLP, and of all queries and all keys (https://arxiv.org/abs/2501.00656)."""

from typing import Any

from wherry_runtime.loading.config import NormConfig
from wherry_runtime.models.family import Family, Fields, flag


def fields(raw: dict[str, Any]) -> Fields:
    """Norms and biases."""
    bias = flag(raw, "attention_bias")
    return {"norm": NormConfig(placement="after"), "qk_norm": "whole", "qkv_bias": bias, "output_bias": bias}


FAMILY = Family(architecture="Olmo2ForCausalLM", name="olmo2", fields=fields, defaults={"rms_norm_eps": 1e-5})
