"""Command R: attention and MLP at once behind one layer norm, neighbours rotate, scaled logits
(https://docs.cohere.com/docs/command-r)."""

from typing import Any

from wherry_runtime.loading.config import NormConfig
from wherry_runtime.models.family import Family, Fields, flag


def fields(raw: dict[str, Any]) -> Fields:
    """Command R+ has norms of heads."""
    bias = flag(raw, "attention_bias")
    return {
        "norm": NormConfig(kind="layer"),
        "norm_eps": raw.get("layer_norm_eps", 1e-5),
        "qk_norm": "heads" if flag(raw, "use_qk_norm") else None,
        "parallel": True,
        "shared_norm": True,
        "qkv_bias": bias,
        "output_bias": bias,
        "logit_scale": raw.get("logit_scale", 0.0625),
    }


FAMILY = Family(
    architecture="CohereForCausalLM",
    name="cohere",
    fields=fields,
    defaults={"tie_word_embeddings": True},
    theta=500000.0,
    interleaved=True,
)
