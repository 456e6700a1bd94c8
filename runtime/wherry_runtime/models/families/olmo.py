"""OLMo: layer norm without weights (https://arxiv.org/abs/2402.00838)."""

from typing import Any

from wherry_runtime.loading.config import NormConfig
from wherry_runtime.models.family import Family, Fields, flag


def fields(raw: dict[str, Any]) -> Fields:
    """7B cuts queries, keys and values off."""
    bias = flag(raw, "attention_bias")
    return {
        "norm": NormConfig(kind="layer", weight=False),
        "norm_eps": 1e-5,
        "clip_qkv": raw.get("clip_qkv"),
        "qkv_bias": bias,
        "output_bias": bias,
    }


FAMILY = Family(architecture="OlmoForCausalLM", name="olmo", fields=fields)
