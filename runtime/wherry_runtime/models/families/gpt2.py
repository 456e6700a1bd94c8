"""GPT-2: learned positions, layer norm with biases, matrices the other way round
(https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf)."""

from typing import Any

from wherry_runtime.loading.config import Layout, NormConfig
from wherry_runtime.models.family import Family, Fields, flag, refuse

LAYOUT = Layout(
    prefix="transformer.",
    names={
        "model.embed_tokens": "transformer.wte",
        "model.embed_positions": "transformer.wpe",
        "model.layers": "transformer.h",
        "model.norm": "transformer.ln_f",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        "self_attn.o_proj": "attn.c_proj",
        "mlp.up_proj": "mlp.c_fc",
        "mlp.down_proj": "mlp.c_proj",
    },
    fused={"attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")},
    transposed=True,
)
ALIASES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "activation_function": "hidden_act",
}


def fields(raw: dict[str, Any]) -> Fields:
    """Everything has a bias."""
    for setting in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        refuse(flag(raw, setting), setting)
    return {
        "norm": NormConfig(kind="layer", bias=True),
        "norm_eps": raw.get("layer_norm_epsilon", 1e-5),
        "learned_positions": 0,
        "gated": False,
        "intermediate_size": raw.get("intermediate_size") or 4 * raw["hidden_size"],
        "attention_scale": None if flag(raw, "scale_attn_weights", default=True) else 1.0,
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "layout": LAYOUT,
    }


FAMILY = Family(
    architecture="GPT2LMHeadModel",
    name="gpt2",
    fields=fields,
    defaults={"max_position_embeddings": 1024, "hidden_act": "gelu_new", "tie_word_embeddings": True},
    aliases=ALIASES,
    rotary=False,
)
