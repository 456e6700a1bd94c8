"""Granite 3: Llama with factors on the embedding, residuals, scores and logits (https://arxiv.org/abs/2405.04324)."""

from typing import Any

from wherry_runtime.models.families import llama
from wherry_runtime.models.family import Family, Fields


def fields(raw: dict[str, Any]) -> Fields:
    """Factors and biases."""
    return {
        **llama.fields(raw),
        "embedding_scale": raw.get("embedding_multiplier", 1.0),
        "residual_scale": raw.get("residual_multiplier", 1.0),
        "attention_scale": raw.get("attention_multiplier", 1.0),
        "logit_scale": 1.0 / raw.get("logits_scaling", 1.0),
    }


FAMILY = Family(architecture="GraniteForCausalLM", name="granite", fields=fields)
