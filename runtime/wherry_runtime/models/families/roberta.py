"""RoBERTa: BERT with other positions and a byte-level vocabulary (Liu et al., 2019,
https://arxiv.org/abs/1907.11692)."""

from typing import Any

from wherry_runtime.models.families.bert import encoder_fields
from wherry_runtime.models.family import Family, Fields, refuse


def fields(raw: dict[str, Any]) -> Fields:
    """Positions count on from the padding token's id, so the rows up to its own are nobody's."""
    padding = raw.get("pad_token_id")
    skipped = 1 + (1 if padding is None else padding)
    refuse(raw["max_position_embeddings"] <= skipped, f"pad_token_id {padding}")
    own = {"learned_positions": skipped, "max_position_embeddings": raw["max_position_embeddings"] - skipped}
    return {**encoder_fields(raw, "roberta.", ("lm_head.",)), **own}


DEFAULTS = {"max_position_embeddings": 514, "hidden_act": "gelu", "type_vocab_size": 1}
FAMILY = Family(
    architecture="RobertaModel",
    name="roberta",
    fields=fields,
    also=("RobertaForMaskedLM",),
    defaults=DEFAULTS,
    rotary=False,
    encoder=True,
)
