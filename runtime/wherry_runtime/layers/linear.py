"""Matrix products with weights, fused where inputs are shared."""

from collections.abc import Sequence

import torch
from torch.nn import functional

Slots = dict[str, torch.Tensor]


class Linear:
    """y = x Wᵀ + b, for one or more projections of the same x, their outputs side by side.

    Args:
        parts: checkpoint name (without `.weight`) and output width of each projection.
        num_inputs: width of x.
        bias: whether the projections have biases.
    """

    def __init__(
        self, parts: Sequence[tuple[str, int]], num_inputs: int, *, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        num_outputs = sum(width for _, width in parts)
        self.weight = torch.empty(num_outputs, num_inputs, dtype=dtype, device=device)
        self.bias = torch.empty(num_outputs, dtype=dtype, device=device) if bias else None
        self._parts = tuple(parts)

    def slots(self) -> Slots:
        """Checkpoint name → view of the fused weight that it fills."""
        slots: Slots = {}
        row = 0
        for name, width in self._parts:
            slots[f"{name}.weight"] = self.weight[row : row + width]
            if self.bias is not None:
                slots[f"{name}.bias"] = self.bias[row : row + width]
            row += width
        return slots

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, num_inputs] → [T, num_outputs], in the dtype of the weights."""
        return project(x, self.weight, self.bias)


def project(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, I], weight [O, I], bias [O] → [T, O].

    On CPU, a single bfloat16 row goes as two: oneDNN takes a matrix-vector path for one row that rounds differently,
    and a token must not depend on how many others are in its batch.
    """
    if x.shape[0] == 1 and x.dtype is torch.bfloat16 and x.device.type == "cpu":
        return functional.linear(x.expand(2, -1), weight, bias)[:1]
    return functional.linear(x, weight, bias)
