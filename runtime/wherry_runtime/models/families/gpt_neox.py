"""GPT-NeoX and Pythia: attention and MLP at once, each behind its norm; a quarter of each head rotates
(https://arxiv.org/abs/2204.06745, https://arxiv.org/abs/2304.01373)."""

from typing import Any

from wherry_runtime.loading.config import Layout, NormConfig
from wherry_runtime.models.family import Family, Fields, flag

LAYOUT = Layout(
    names={
        "model.embed_tokens": "gpt_neox.embed_in",
        "model.layers": "gpt_neox.layers",
        "model.norm": "gpt_neox.final_layer_norm",
        "lm_head": "embed_out",
        "self_attn.o_proj": "attention.dense",
        "mlp.up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    },
    fused={"attention.query_key_value": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")},
    grouped=True,
)


def fields(raw: dict[str, Any]) -> Fields:
    """Everything has a bias; attention may have none."""
    bias = flag(raw, "attention_bias", default=True)
    return {
        "norm": NormConfig(kind="layer", bias=True),
        "norm_eps": raw.get("layer_norm_eps", 1e-5),
        "parallel": flag(raw, "use_parallel_residual", default=True),
        "gated": False,
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": True,
        "layout": LAYOUT,
    }


FAMILY = Family(
    architecture="GPTNeoXForCausalLM",
    name="gpt_neox",
    fields=fields,
    defaults={"hidden_act": "gelu"},
    aliases={"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"},
    partial=0.25,
)
