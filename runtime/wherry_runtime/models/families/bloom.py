"""BLOOM: linear biases instead of positions, a norm after the embedding (https://arxiv.org/abs/2211.05100)."""

from typing import Any

from wherry_runtime.loading.config import Layout, NormConfig
from wherry_runtime.models.family import Family, Fields, flag, refuse

LAYOUT = Layout(
    prefix="transformer.",
    names={
        "model.embed_tokens": "transformer.word_embeddings",
        "model.embed_norm": "transformer.word_embeddings_layernorm",
        "model.layers": "transformer.h",
        "model.norm": "transformer.ln_f",
        "self_attn.o_proj": "self_attention.dense",
        "mlp.up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    },
    fused={"self_attention.query_key_value": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")},
    grouped=True,
)


def fields(raw: dict[str, Any]) -> Fields:
    """Everything has a bias."""
    setting = "apply_residual_connection_post_layernorm"
    refuse(flag(raw, setting), setting)
    return {
        "norm": NormConfig(kind="layer", bias=True),
        "norm_eps": raw.get("layer_norm_epsilon", 1e-5),
        "embedding_norm": True,
        "alibi": 1.0,
        "activation": "gelu_tanh",
        "gated": False,
        "intermediate_size": 4 * raw["hidden_size"],
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "layout": LAYOUT,
    }


FAMILY = Family(
    architecture="BloomForCausalLM",
    name="bloom",
    fields=fields,
    defaults={"tie_word_embeddings": True},
    aliases={
        "n_embed": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "seq_length": "max_position_embeddings",
    },
    rotary=False,
)
