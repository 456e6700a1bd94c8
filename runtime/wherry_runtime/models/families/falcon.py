"""Falcon: one key head, or a few with their queries; attention and MLP at once (https://arxiv.org/abs/2311.16867)."""

from typing import Any

from wherry_runtime.loading.config import Layout, NormConfig
from wherry_runtime.loading.rope_config import rope_config
from wherry_runtime.models.family import Family, Fields, flag, refuse

NAMES = {
    "model.embed_tokens": "transformer.word_embeddings",
    "model.layers": "transformer.h",
    "model.norm": "transformer.ln_f",
    "self_attn.o_proj": "self_attention.dense",
    "mlp.up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
}
FUSED: dict[str, tuple[str, ...]] = {
    "self_attention.query_key_value": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
}
TWO_NORMS = {"input_layernorm": "ln_attn", "post_attention_layernorm": "ln_mlp"}


def fields(raw: dict[str, Any]) -> Fields:
    """The layout of 40B and 180B (`new_decoder_architecture`), that of 7B, and that of the first ones (ALiBi, all key
    heads, one block after the other)."""
    new, parallel = flag(raw, "new_decoder_architecture"), flag(raw, "parallel_attn", default=True)
    heads, norms = raw["num_attention_heads"], raw.get("num_ln_in_parallel_attn") or (2 if new else 1)
    refuse(new and not parallel, "new_decoder_architecture without parallel_attn")
    refuse(not new and norms == 2, "num_ln_in_parallel_attn = 2 without new_decoder_architecture")
    bias, alibi = flag(raw, "bias"), flag(raw, "alibi")
    old_heads = 1 if flag(raw, "multi_query", default=True) else heads
    two = parallel and norms == 2
    return {
        "norm": NormConfig(kind="layer", bias=True),
        "norm_eps": raw.get("layer_norm_epsilon", 1e-5),
        "num_kv_heads": (raw.get("num_kv_heads") or heads) if new else old_heads,
        "rope": None if alibi else rope_config(raw),
        # Scores are scaled after the biases were added.
        "alibi": (raw["hidden_size"] // heads) ** -0.5 if alibi else 0.0,
        "parallel": parallel,
        "shared_norm": parallel and not two,
        "gated": False,
        "intermediate_size": raw.get("intermediate_size") or 4 * raw["hidden_size"],
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": bias,
        "layout": Layout(
            prefix="transformer.", names={**NAMES, **TWO_NORMS} if two else NAMES, fused=FUSED, grouped=True
        ),
    }


FAMILY = Family(
    architecture="FalconForCausalLM",
    name="falcon",
    fields=fields,
    defaults={"hidden_act": "gelu", "tie_word_embeddings": True},
    aliases={"ffn_hidden_size": "intermediate_size", "activation": "hidden_act", "n_embed": "hidden_size"},
    rotary=False,
)
