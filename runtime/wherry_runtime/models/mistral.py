"""Mistral: Llama with a sliding window in every layer (https://arxiv.org/abs/2310.06825)."""

from typing import Any

from wherry_runtime.loading.config import count

ARCHITECTURE = "MistralForCausalLM"
FAMILY = "mistral"


def fields(raw: dict[str, Any]) -> dict[str, Any]:
    """What differs from the plain decoder, from `config.json`."""
    return {"windows": (raw.get("sliding_window"),) * count(raw, "num_hidden_layers")}
