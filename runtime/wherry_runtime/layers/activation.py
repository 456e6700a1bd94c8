"""The MLP's activations."""

from dataclasses import dataclass

import torch
from torch.nn import functional

from wherry_runtime.loading.config import ActivationKind


@dataclass(slots=True, frozen=True)
class Activation:
    """act(a) · b where x = (a, b), side by side and equally wide (https://arxiv.org/abs/2002.05202), or act(x).

    `clamped_silu` is GPT-OSS's: a · sigmoid(alpha · a) · (b + 1), a cut off above `limit`, b on both sides.
    """

    kind: ActivationKind
    gated: bool = True
    alpha: float = 1.702
    limit: float = 7.0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, width] → [T, width / 2] or, ungated, [T, width]."""
        if not self.gated:
            return _apply(self.kind, x)
        gate, up = x.chunk(2, dim=-1)
        if self.kind == "clamped_silu":
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
            return (up + 1) * gate * torch.sigmoid(gate * self.alpha)
        return _apply(self.kind, gate).mul_(up)


def _apply(kind: ActivationKind, x: torch.Tensor) -> torch.Tensor:
    match kind:
        case "silu":
            return functional.silu(x)
        case "gelu":
            return functional.gelu(x)
        case "gelu_tanh":
            return functional.gelu(x, approximate="tanh")
        case "relu":
            return functional.relu(x)
        case "relu2":
            return functional.relu(x).square_()
        case "clamped_silu":
            raise TypeError("clamped_silu is for gated MLPs")
