"""XLM-RoBERTa, and what was trained from it to embed texts of many languages (multilingual E5, BGE-M3):
Conneau et al., 2019 (https://arxiv.org/abs/1911.02116)."""

from wherry_runtime.models.families.roberta import DEFAULTS, fields
from wherry_runtime.models.family import Family

FAMILY = Family(
    architecture="XLMRobertaModel",
    name="xlm-roberta",
    fields=fields,
    also=("XLMRobertaForMaskedLM",),
    defaults=DEFAULTS,
    rotary=False,
    encoder=True,
)
