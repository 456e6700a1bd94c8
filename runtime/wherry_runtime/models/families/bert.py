"""BERT, and what was trained from it to embed texts (MiniLM, BGE, E5, GTE): Devlin et al., 2018
(https://arxiv.org/abs/1810.04805)."""

from typing import Any

from wherry_runtime.loading.config import Layout, NormConfig
from wherry_runtime.loading.encoder_config import EncoderConfig
from wherry_runtime.models.family import Family, Fields, flag, refuse

# Relative to the model; what it was pretrained with comes after.
HEADS = ("pooler.", "embeddings.position_ids", "embeddings.token_type_ids")


def layout(prefix: str) -> Layout:
    """BERT's names behind `prefix`."""
    return Layout(
        prefix=prefix,
        names={
            "model.embed_tokens": f"{prefix}embeddings.word_embeddings",
            "model.embed_positions": f"{prefix}embeddings.position_embeddings",
            "model.embed_types": f"{prefix}embeddings.token_type_embeddings",
            "model.embed_norm": f"{prefix}embeddings.LayerNorm",
            "model.layers": f"{prefix}encoder.layer",
            "self_attn.q_proj": "attention.self.query",
            "self_attn.k_proj": "attention.self.key",
            "self_attn.v_proj": "attention.self.value",
            "self_attn.o_proj": "attention.output.dense",
            "post_attention_layernorm": "attention.output.LayerNorm",
            "mlp.up_proj": "intermediate.dense",
            "mlp.down_proj": "output.dense",
            "post_feedforward_layernorm": "output.LayerNorm",
        },
    )


def encoder_fields(raw: dict[str, Any], prefix: str, heads: tuple[str, ...]) -> Fields:
    """The fields of BERT and of those that have its layers; `heads`: names of those of other tasks."""
    for setting in ("is_decoder", "add_cross_attention"):
        refuse(flag(raw, setting), setting)
    kind = raw.get("position_embedding_type") or "absolute"
    refuse(kind != "absolute", f"position_embedding_type {kind!r}")
    return {
        "norm": NormConfig(kind="layer", bias=True, placement="after"),
        "norm_eps": raw.get("layer_norm_eps", 1e-12),
        "learned_positions": 0,
        "gated": False,
        "encoder": EncoderConfig(
            token_types=raw.get("type_vocab_size", 2),
            heads=(*(f"{prefix}{name}" for name in HEADS), *HEADS, *heads),
        ),
        "layout": layout(prefix),
    }


def fields(raw: dict[str, Any]) -> Fields:
    """A position from the first row on."""
    return encoder_fields(raw, "bert.", ("cls.",))


FAMILY = Family(
    architecture="BertModel",
    name="bert",
    fields=fields,
    also=("BertForMaskedLM", "BertForPreTraining"),
    defaults={"max_position_embeddings": 512, "hidden_act": "gelu"},
    rotary=False,
    encoder=True,
)
