"""OPT: learned positions, ReLU, biases everywhere (https://arxiv.org/abs/2205.01068)."""

from typing import Any

from wherry_runtime.loading.config import Layout, NormConfig
from wherry_runtime.models.family import Family, Fields, flag, refuse

LAYOUT = Layout(
    names={
        "model.embed_tokens": "model.decoder.embed_tokens",
        "model.embed_positions": "model.decoder.embed_positions",
        "model.layers": "model.decoder.layers",
        "model.norm": "model.decoder.final_layer_norm",
        "input_layernorm": "self_attn_layer_norm",
        "post_attention_layernorm": "final_layer_norm",
        "self_attn.o_proj": "self_attn.out_proj",
        "mlp.up_proj": "fc1",
        "mlp.down_proj": "fc2",
    },
)
UNUSED_POSITIONS = 2  # rows of the table, which fairseq kept for padding


def fields(raw: dict[str, Any]) -> Fields:
    """The one model that has its norms after the residual, and a narrower embedding (350m), is refused."""
    refuse(not flag(raw, "do_layer_norm_before", default=True), "do_layer_norm_before = false")
    refuse((raw.get("word_embed_proj_dim") or raw["hidden_size"]) != raw["hidden_size"], "word_embed_proj_dim")
    bias, affine = flag(raw, "enable_bias", default=True), flag(raw, "layer_norm_elementwise_affine", default=True)
    return {
        "norm": NormConfig(kind="layer", weight=affine, bias=affine),
        "norm_eps": 1e-5,
        "final_norm": not flag(raw, "_remove_final_layer_norm"),
        "learned_positions": UNUSED_POSITIONS,
        "gated": False,
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": bias,
        "layout": LAYOUT,
    }


FAMILY = Family(
    architecture="OPTForCausalLM",
    name="opt",
    fields=fields,
    defaults={"hidden_act": "relu", "tie_word_embeddings": True},
    aliases={"ffn_dim": "intermediate_size", "activation_function": "hidden_act"},
    rotary=False,
)
