"""Mistral: Llama with a sliding window in every layer (https://arxiv.org/abs/2310.06825)."""

from typing import Any

ARCHITECTURE = "MistralForCausalLM"
FAMILY = "mistral"


def fields(raw: dict[str, Any]) -> dict[str, Any]:
    """What differs from the plain decoder, from `config.json`."""
    return {"windows": (raw.get("sliding_window"),) * int(raw.get("num_hidden_layers") or 0)}
