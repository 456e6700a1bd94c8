"""What is known of a layer's inputs."""

from dataclasses import dataclass

import torch


@dataclass
class Inputs:
    """Sums over rows x [K] that went into a layer, in float32.

    Attributes:
        hessian: [K, K] Σ x xᵀ: half the second derivative of a layer's squared error.
        total: [K] Σ |x|.
        largest: [K] max |x|.
    """

    hessian: torch.Tensor
    total: torch.Tensor
    largest: torch.Tensor
    rows: int = 0

    @classmethod
    def empty(cls, width: int) -> "Inputs":
        return cls(torch.zeros(width, width), torch.zeros(width), torch.zeros(width))

    @classmethod
    def unknown(cls, width: int) -> "Inputs":
        """Of which nothing is known: all alike and none with another, so that rounding to nearest is best."""
        return cls(torch.eye(width), torch.ones(width), torch.ones(width), 1)

    def add(self, x: torch.Tensor) -> None:
        """x [T, K] of any float dtype."""
        x = x.float()
        self.hessian.addmm_(x.T, x)
        self.total += x.abs().sum(dim=0)
        torch.maximum(self.largest, x.abs().amax(dim=0), out=self.largest)
        self.rows += x.shape[0]

    def divided(self, scales: torch.Tensor) -> "Inputs":
        """Of x / scales."""
        return Inputs(self.hessian / torch.outer(scales, scales), self.total / scales, self.largest / scales, self.rows)

    def error(self, off: torch.Tensor) -> torch.Tensor:
        """off [N, K], what is wrong with weights → [N], the squared error of each output over all rows."""
        return ((off @ self.hessian) * off).sum(dim=1)
