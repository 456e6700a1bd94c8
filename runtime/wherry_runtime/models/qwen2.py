"""Qwen2 and Qwen2.5: biases on queries, keys and values (https://arxiv.org/abs/2407.10671)."""

from typing import Any

from wherry_runtime.loading.config import count

ARCHITECTURE = "Qwen2ForCausalLM"
FAMILY = "qwen2"


def fields(raw: dict[str, Any]) -> dict[str, Any]:
    """What differs from the plain decoder, from `config.json`."""
    return {"qkv_bias": True, "windows": windows(raw)}


def windows(raw: dict[str, Any]) -> tuple[int | None, ...]:
    """Each layer's window: `layer_types` says, or else the layers from `max_window_layers` on slide."""
    num_layers = count(raw, "num_hidden_layers")
    window = raw.get("sliding_window")
    if not raw.get("use_sliding_window", False) or window is None:
        return (None,) * num_layers
    layer_types = raw.get("layer_types")
    if isinstance(layer_types, list):
        return tuple(window if kind == "sliding_attention" else None for kind in layer_types)
    first = count(raw, "max_window_layers", 28)
    return tuple(window if index >= first else None for index in range(num_layers))
