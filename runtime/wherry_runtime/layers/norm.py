"""Root mean square normalization: Zhang and Sennrich, 2019 (https://arxiv.org/abs/1910.07467)."""

import torch
from torch.nn import functional

from wherry_runtime.layers.linear import Slot, Slots, State


class RMSNorm:
    """y = x / sqrt(mean(x²) + eps) · w over the last dimension."""

    def __init__(self, name: str, width: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        self.weight = torch.empty(width, dtype=dtype, device=device)
        self.eps = eps
        self._name = name

    def slots(self) -> Slots:
        return {f"{self._name}.weight": Slot.of(self.weight)}

    def state(self) -> State:
        return {f"{self._name}.weight": self.weight}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., width] → the same shape and dtype."""
        return functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
