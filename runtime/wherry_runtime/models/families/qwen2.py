"""Qwen2 and Qwen2.5: biases on queries, keys and values (https://arxiv.org/abs/2407.10671)."""

from collections.abc import Callable
from typing import Any

from wherry_runtime.loading.config import count
from wherry_runtime.models.family import Family, Fields, flag


def fields(raw: dict[str, Any]) -> Fields:
    """Biases and windows."""
    return {"qkv_bias": True, "windows": windows(raw)}


def windows(raw: dict[str, Any]) -> tuple[int | None, ...]:
    """Each layer's window: `layer_types` says, or else the layers from `max_window_layers` on slide."""
    window = raw.get("sliding_window")
    if not flag(raw, "use_sliding_window") or window is None:
        return (None,) * count(raw, "num_hidden_layers")
    first = count(raw, "max_window_layers", 28)
    return typed_windows(raw, lambda index: index >= first)


def typed_windows(raw: dict[str, Any], slides: Callable[[int], bool]) -> tuple[int | None, ...]:
    """Each layer's window: `layer_types` says, or else `slides` of the layer's number."""
    window = raw.get("sliding_window")
    kinds = raw.get("layer_types")
    if not isinstance(kinds, list):
        kinds = ["sliding_attention" if slides(i) else "" for i in range(count(raw, "num_hidden_layers"))]
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


FAMILY = Family(architecture="Qwen2ForCausalLM", name="qwen2", fields=fields)
