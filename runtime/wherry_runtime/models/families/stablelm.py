"""StableLM: Llama with layer norm; a quarter of each head rotates (https://arxiv.org/abs/2402.17834)."""

from typing import Any

from wherry_runtime.loading.config import Layout, NormConfig
from wherry_runtime.models.family import Family, Fields, flag

LAYOUT = Layout(
    names={
        "self_attn.q_norm": "self_attn.q_layernorm.norms.{}",
        "self_attn.k_norm": "self_attn.k_layernorm.norms.{}",
    },
)


def fields(raw: dict[str, Any]) -> Fields:
    """Of the 12B: attention and MLP at once, and norms of heads."""
    parallel = flag(raw, "use_parallel_residual")
    return {
        "norm": NormConfig(kind="layer", bias=True),
        "norm_eps": raw.get("layer_norm_eps", 1e-5),
        "qk_norm": "heads" if flag(raw, "qk_layernorm") else None,
        "parallel": parallel,
        "shared_norm": parallel,
        "qkv_bias": flag(raw, "use_qkv_bias"),
        "layout": LAYOUT,
    }


FAMILY = Family(architecture="StableLmForCausalLM", name="stablelm", fields=fields, partial=0.25)
