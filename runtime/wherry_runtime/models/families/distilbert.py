"""DistilBERT: BERT with half the layers and no token types (Sanh et al., 2019, https://arxiv.org/abs/1910.01108)."""

from typing import Any

from wherry_runtime.loading.config import Layout
from wherry_runtime.loading.encoder_config import EncoderConfig
from wherry_runtime.models.families.bert import encoder_fields
from wherry_runtime.models.family import Family, Fields

LAYOUT = Layout(
    prefix="distilbert.",
    names={
        "model.embed_tokens": "distilbert.embeddings.word_embeddings",
        "model.embed_positions": "distilbert.embeddings.position_embeddings",
        "model.embed_norm": "distilbert.embeddings.LayerNorm",
        "model.layers": "distilbert.transformer.layer",
        "self_attn.q_proj": "attention.q_lin",
        "self_attn.k_proj": "attention.k_lin",
        "self_attn.v_proj": "attention.v_lin",
        "self_attn.o_proj": "attention.out_lin",
        "post_attention_layernorm": "sa_layer_norm",
        "mlp.up_proj": "ffn.lin1",
        "mlp.down_proj": "ffn.lin2",
        "post_feedforward_layernorm": "output_layer_norm",
    },
)


def fields(raw: dict[str, Any]) -> Fields:
    """Positions are a table, learned or filled with sines."""
    shape = EncoderConfig(heads=("distilbert.embeddings.position_ids", "vocab_"))
    return {**encoder_fields(raw, "distilbert.", ()), "encoder": shape, "layout": LAYOUT}


FAMILY = Family(
    architecture="DistilBertModel",
    name="distilbert",
    fields=fields,
    also=("DistilBertForMaskedLM",),
    defaults={"max_position_embeddings": 512, "hidden_act": "gelu"},
    aliases={
        "dim": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "hidden_dim": "intermediate_size",
        "activation": "hidden_act",
    },
    rotary=False,
    encoder=True,
)
