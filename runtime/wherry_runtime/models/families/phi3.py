"""Phi-3, 3.5 and 4: Llama with fused matrices, and longrope for long contexts (https://arxiv.org/abs/2404.14219,
https://arxiv.org/abs/2412.08905)."""

from typing import Any

from wherry_runtime.loading.config import Layout, count
from wherry_runtime.loading.rope_config import rope_config
from wherry_runtime.models.family import Family, Fields

LAYOUT = Layout(
    fused={
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    },
)


def fields(raw: dict[str, Any]) -> Fields:
    """The first files say `su` or `yarn` and mean longrope, whose original context is beside the other settings."""
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    settings = {key: value for key, value in given.items() if key not in ("type", "rope_type")}
    kind = given.get("rope_type") or given.get("type") or "default"
    settings["rope_type"] = "longrope" if kind in ("su", "yarn") else kind
    if (original := raw.get("original_max_position_embeddings")) is not None:
        settings["original_max_position_embeddings"] = original
    return {
        "rope": rope_config({**raw, "rope_parameters": settings}),
        "windows": (raw.get("sliding_window"),) * count(raw, "num_hidden_layers"),
        "layout": LAYOUT,
    }


FAMILY = Family(
    architecture="Phi3ForCausalLM", name="phi3", fields=fields, defaults={"rms_norm_eps": 1e-5}, rotary=False
)
