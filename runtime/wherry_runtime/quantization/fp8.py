"""FP8 E4M3 (Micikevicius et al., 2022, https://arxiv.org/abs/2209.05433) with scales."""

from dataclasses import dataclass

import torch

LARGEST = 448.0
BLOCK = 128


@dataclass(frozen=True, slots=True)
class Scaled:
    """w[n, k] = values[n, k] · scales[n]: values [N, K] float8_e4m3fn, scales [N, 1] float32."""

    values: torch.Tensor
    scales: torch.Tensor

    def dequantized(self) -> torch.Tensor:
        """[N, K] float32."""
        return self.values.float() * self.scales


def quantize_rows(weights: torch.Tensor) -> Scaled:
    """[N, K] float32, each row scaled so that its largest magnitude is the largest number."""
    scales = (weights.abs().amax(dim=-1, keepdim=True) / LARGEST).clamp(min=1e-12)
    return Scaled((weights / scales).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scales)


def dequantize_blocks(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Values [N, K] with a scale for each block → [N, K] float32.

    Args:
        scales: a number for all, or [A, B], each of A and B being 1, as many as there are rows or columns, or as many
            as there are blocks of 128 of them.

    Raises:
        ValueError: they are something else.
    """
    if scales.numel() == 1:
        return values.float() * scales.float().reshape(())
    wide = scales.float().reshape(scales.shape[0], -1)
    for dim, size in enumerate(values.shape):
        if wide.shape[dim] == -(-size // BLOCK) and size > BLOCK:
            wide = wide.repeat_interleave(BLOCK, dim).narrow(dim, 0, size)
        elif wide.shape[dim] not in (1, size):
            raise ValueError(f"scales {list(scales.shape)} are not those of blocks of {BLOCK} of {list(values.shape)}")
    return values.float() * wide
