"""Gemma 2: norms around attention and MLP, capped scores and logits, every second layer with a window
(https://arxiv.org/abs/2408.00118)."""

from typing import Any

from wherry_runtime.loading.config import NormConfig
from wherry_runtime.models.families import gemma
from wherry_runtime.models.families.qwen2 import typed_windows
from wherry_runtime.models.family import Family, Fields


def fields(raw: dict[str, Any]) -> Fields:
    """What Gemma 3 has too."""
    return {
        **gemma.fields(raw),
        "norm": NormConfig(offset=1.0, placement="around"),
        "windows": typed_windows(raw, lambda index: index % 2 == 0),
        "attention_scale": raw["query_pre_attn_scalar"] ** -0.5,
        "attention_softcap": raw.get("attn_logit_softcapping"),
        "logit_softcap": raw.get("final_logit_softcapping"),
    }


DEFAULTS = {**gemma.FAMILY.defaults, "query_pre_attn_scalar": 256, "sliding_window": 4096}
CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}

FAMILY = Family(architecture="Gemma2ForCausalLM", name="gemma2", fields=fields, defaults={**DEFAULTS, **CAPS})
