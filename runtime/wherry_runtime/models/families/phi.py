"""Phi-1, 1.5 and 2: attention and MLP at once, behind one norm; half of each head rotates
(https://arxiv.org/abs/2306.11644, https://arxiv.org/abs/2309.05463)."""

from typing import Any

from wherry_runtime.loading.config import Layout, NormConfig
from wherry_runtime.models.family import Family, Fields, flag

LAYOUT = Layout(
    names={
        "model.norm": "model.final_layernorm",
        "self_attn.o_proj": "self_attn.dense",
        "self_attn.q_norm": "self_attn.q_layernorm",
        "self_attn.k_norm": "self_attn.k_layernorm",
        "mlp.up_proj": "mlp.fc1",
        "mlp.down_proj": "mlp.fc2",
    },
)


def fields(raw: dict[str, Any]) -> Fields:
    """Everything has a bias."""
    return {
        "norm": NormConfig(kind="layer", bias=True),
        "norm_eps": raw.get("layer_norm_eps", 1e-5),
        "qk_norm": "head" if flag(raw, "qk_layernorm") else None,
        "parallel": True,
        "shared_norm": True,
        "gated": False,
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "head_bias": True,
        "layout": LAYOUT,
    }


FAMILY = Family(
    architecture="PhiForCausalLM", name="phi", fields=fields, defaults={"hidden_act": "gelu_new"}, partial=0.5
)
