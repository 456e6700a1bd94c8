"""GPT-J: attention and MLP at once, behind one norm; a part of each head rotates, in neighbours
(https://github.com/kingoflolz/mesh-transformer-jax)."""

from typing import Any

from wherry_runtime.loading.config import Layout, NormConfig
from wherry_runtime.loading.rope_config import RopeConfig
from wherry_runtime.models.families import gpt2
from wherry_runtime.models.family import Family, Fields

LAYOUT = Layout(
    prefix="transformer.",
    names={
        "model.embed_tokens": "transformer.wte",
        "model.layers": "transformer.h",
        "model.norm": "transformer.ln_f",
        "input_layernorm": "ln_1",
        "self_attn.q_proj": "attn.q_proj",
        "self_attn.k_proj": "attn.k_proj",
        "self_attn.v_proj": "attn.v_proj",
        "self_attn.o_proj": "attn.out_proj",
        "mlp.up_proj": "mlp.fc_in",
        "mlp.down_proj": "mlp.fc_out",
    },
)


def fields(raw: dict[str, Any]) -> Fields:
    """Biases of the MLP and of the head only."""
    head_dim = raw["hidden_size"] // raw["num_attention_heads"]
    return {
        "norm": NormConfig(kind="layer", bias=True),
        "norm_eps": raw.get("layer_norm_epsilon", 1e-5),
        "rope": RopeConfig(partial_rotary_factor=raw.get("rotary_dim", 64) / head_dim, interleaved=True),
        "parallel": True,
        "shared_norm": True,
        "gated": False,
        "intermediate_size": raw.get("intermediate_size") or 4 * raw["hidden_size"],
        "mlp_bias": True,
        "head_bias": True,
        "layout": LAYOUT,
    }


FAMILY = Family(
    architecture="GPTJForCausalLM",
    name="gptj",
    fields=fields,
    defaults={"hidden_act": "gelu_new"},
    aliases=gpt2.ALIASES,
    rotary=False,
)
