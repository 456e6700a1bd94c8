"""Gemma 3, its text model: norms of queries and keys instead of caps, five layers with a window and a rotary base of
their own for each without (https://arxiv.org/abs/2503.19786)."""

from typing import Any

from wherry_runtime.loading.rope_config import rope_config
from wherry_runtime.models.families import gemma2
from wherry_runtime.models.families.qwen2 import typed_windows
from wherry_runtime.models.family import Family, Fields

THETA, LOCAL_THETA = 1e6, 1e4


def fields(raw: dict[str, Any]) -> Fields:
    """Both rotary embeddings: by kind of layer (transformers 5), or the local base beside the other's settings."""
    kinds = raw.get("rope_parameters") or {}
    plain = {key: value for key, value in raw.items() if key not in ("rope_parameters", "rope_scaling")}
    if "full_attention" in kinds or "sliding_attention" in kinds:
        far, near = ({**plain, "rope_parameters": kinds.get(f"{kind}_attention")} for kind in ("full", "sliding"))
    else:
        far, near = raw, {**plain, "rope_theta": raw.get("rope_local_base_freq")}
    pattern = raw.get("sliding_window_pattern", 6)
    return {
        **gemma2.fields(raw),
        "qk_norm": "head",
        "windows": typed_windows(raw, lambda index: (index + 1) % pattern != 0),
        "rope": rope_config(far, theta=THETA),
        "local_rope": rope_config(near, theta=LOCAL_THETA),
    }


FAMILY = Family(architecture="Gemma3ForCausalLM", name="gemma3", fields=fields, defaults=gemma2.DEFAULTS, rotary=False)
