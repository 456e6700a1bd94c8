"""Mistral: Llama with a sliding window in every layer (https://arxiv.org/abs/2310.06825)."""

from typing import Any

from wherry_runtime.loading.config import count
from wherry_runtime.models.family import Family, Fields


def fields(raw: dict[str, Any]) -> Fields:
    """The window."""
    return {"windows": (raw.get("sliding_window"),) * count(raw, "num_hidden_layers")}


FAMILY = Family(architecture="MistralForCausalLM", name="mistral", fields=fields)
