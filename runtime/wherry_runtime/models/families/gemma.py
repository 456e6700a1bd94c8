"""Gemma: GELU-gated, norms by 1 + w, a scaled embedding (https://arxiv.org/abs/2403.08295)."""

from typing import Any

from wherry_runtime.loading.config import NormConfig
from wherry_runtime.models.family import Family, Fields, flag, refuse


def fields(raw: dict[str, Any]) -> Fields:
    """Older files say `gelu` and mean its approximation by tanh."""
    named = raw.get("hidden_activation") or raw.get("hidden_act")
    refuse(named not in ("gelu", "gelu_pytorch_tanh"), f"hidden_act {named!r}")
    refuse(flag(raw, "use_bidirectional_attention"), "use_bidirectional_attention")
    bias = flag(raw, "attention_bias")
    return {
        "activation": "gelu_tanh",
        "norm": NormConfig(offset=1.0),
        "embedding_scale": raw["hidden_size"] ** 0.5,
        "qkv_bias": bias,
        "output_bias": bias,
    }


FAMILY = Family(
    architecture="GemmaForCausalLM",
    name="gemma",
    fields=fields,
    defaults={"head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True},
)
