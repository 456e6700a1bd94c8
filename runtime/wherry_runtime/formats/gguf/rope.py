"""Llama 3's rope scaling: GGUF files have what each frequency is divided by (`rope_freqs.weight`), config.json how that
is computed (https://arxiv.org/abs/2407.21783)."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from wherry_runtime.loading.errors import ModelError

Factors = npt.NDArray[np.float32]
# What every Llama 3.x has, with an original context of some power of two; a file's own numbers must come of that.
_LOW, _HIGH = 1.0, 4.0
_ORIGINAL = (8192, *(1 << k for k in range(5, 21)))


def inverse_frequencies(rope: dict[str, Any], theta: float, head_dim: int) -> Factors:
    """What each frequency is divided by: [head_dim / 2] float32.

    Raises:
        ModelError: bad_config.
    """
    try:
        factor, low, high = (float(rope[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
        original = int(rope["original_max_position_embeddings"])
    except (KeyError, TypeError, ValueError) as e:
        raise ModelError("bad_config", f"config.json: rope: {e}") from None
    return _factors(theta, head_dim, factor, low, high, original)


def _factors(theta: float, head_dim: int, factor: float, low: float, high: float, original: int) -> Factors:
    waves = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (original / waves - low) / (high - low)
    blended = 1 / ((1 - smooth) / factor + smooth)
    middle = np.where(waves > original / low, factor, blended)
    return np.where(waves < original / high, 1.0, middle).astype(np.float32)


def llama3_scaling(factors: Factors, theta: float, head_dim: int) -> dict[str, Any]:
    """The settings of config.json that give `factors`.

    Raises:
        ModelError: unsupported_rope, if none are known.
    """
    if factors.shape == (head_dim // 2,) and np.isfinite(factors).all():
        factor = round(float(factors.max()), 4)
        for original in _ORIGINAL:
            if np.allclose(_factors(theta, head_dim, factor, _LOW, _HIGH, original), factors, rtol=1e-4):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": _LOW,
                    "high_freq_factor": _HIGH,
                    "original_max_position_embeddings": original,
                }
    raise ModelError("unsupported_rope", "rope_freqs.weight is not the scaling of Llama 3")
