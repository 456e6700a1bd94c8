"""XLM-RoBERTa, and what was trained from it to embed texts of many languages (multilingual E5, BGE-M3):
Conneau et al., 2019 (https://arxiv.org/abs/1911.02116)."""

from wherry_runtime.models.family import Family
from wherry_runtime.models.roberta import DEFAULTS, fields

FAMILY = Family(
    architecture="XLMRobertaModel",
    name="xlm-roberta",
    fields=fields,
    also=("XLMRobertaForMaskedLM",),
    defaults=DEFAULTS,
    rotary=False,
)
