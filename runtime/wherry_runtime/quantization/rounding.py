"""Rounding to whole numbers with a scale, and perhaps a zero point, for each group of inputs."""

from dataclasses import dataclass

import torch
from torch.nn import functional

from wherry_runtime.quantization.grouped import Grouped
from wherry_runtime.quantization.tensors import split

# Shares of a group's range that scales are tried with: what lies beyond is clipped, and all else is finer.
SHRINKS = tuple(1 - i / 40 for i in range(17))


@dataclass(frozen=True, slots=True)
class Grid:
    """b bits, a scale (float16) for each `group` of inputs; symmetric: around 2^(b - 1), else around a zero point."""

    bits: int
    group: int
    symmetric: bool

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def params(self, grouped: torch.Tensor, shrink: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales (as float16 has them) and zero points, each [...] float32, from the range of groups [..., group]."""
        low, high = grouped.amin(dim=-1).clamp(max=0) * shrink, grouped.amax(dim=-1).clamp(min=0) * shrink
        if self.symmetric:
            scales = torch.maximum(high, -low) / (self.top // 2)
            zeros = torch.full_like(scales, (self.top + 1) // 2)
        else:
            scales = (high - low) / self.top
            zeros = torch.where(scales > 0, -low / scales, 0).round_().clamp_(0, self.top)
        return _float16(scales), zeros

    def fit(self, grouped: torch.Tensor, weights: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """`params` with the shrink that leaves the least squared error, for each group by itself.

        Args:
            grouped: [N, ..., group] float32.
            weights: of each input's error, [..., group]; None: all equal.
        """
        best, zeros = self.params(grouped)
        least = self._error(grouped, best, zeros, weights)
        for shrink in SHRINKS[1:]:
            scales, tried = self.params(grouped, shrink)
            error = self._error(grouped, scales, tried, weights)
            better = error < least
            best, zeros = torch.where(better, scales, best), torch.where(better, tried, zeros)
            least = torch.where(better, error, least)
        return best, zeros

    def round(self, values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        """Codes as float32, to nearest (ties to even)."""
        return (values / torch.where(scales == 0, 1.0, scales) + zeros).round_().clamp_(0, self.top)

    def nearest(self, weights: torch.Tensor, *, search: bool = False) -> Grouped:
        """[N, K] float32 rounded to nearest; `search`: with the scales that leave the least squared error."""
        grouped = self.grouped(weights)
        scales, zeros = self.fit(grouped) if search else self.params(grouped)
        codes = self.round(grouped, scales.unsqueeze(-1), zeros.unsqueeze(-1)).flatten(1)[:, : weights.shape[1]]
        return self.made(codes, scales, zeros)

    def grouped(self, weights: torch.Tensor) -> torch.Tensor:
        """[N, K] → [N, ⌈K / group⌉, group], padded with zeros."""
        return split(functional.pad(weights, (0, -weights.shape[1] % self.group)), 1, (-1, self.group))

    def made(self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> Grouped:
        """Of codes [N, K], scales and zeros [N, G], each float32."""
        return Grouped(codes.to(torch.uint8), scales.half(), zeros.to(torch.int16), self.bits, self.group)

    def _error(
        self, grouped: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, weights: torch.Tensor | None
    ) -> torch.Tensor:
        wide, offset = scales.unsqueeze(-1), zeros.unsqueeze(-1)
        off = (self.round(grouped, wide, offset) - offset).mul_(wide).sub_(grouped).square_()
        return (off if weights is None else off * weights).sum(dim=-1)


def _float16(scales: torch.Tensor) -> torch.Tensor:
    return scales.half().float()
