"""FP8 E4M3 (Micikevicius et al., 2022, https://arxiv.org/abs/2209.05433) with scales."""

from dataclasses import dataclass

import torch

LARGEST = 448.0


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
    """Values [N, K] with a scale for each of equal blocks → [N, K] float32.

    Args:
        scales: [A, B] for blocks of 128 where N or K is no multiple, else of ⌈N / A⌉ × ⌈K / B⌉; or a number for all.
    """
    if scales.numel() == 1:
        return values.float() * scales.float().reshape(())
    wide = scales.float().reshape(scales.shape[0], -1)
    for dim in (0, 1):
        size = -(-values.shape[dim] // wide.shape[dim])
        # A last block that is not full: blocks are a power of two then.
        size = size if values.shape[dim] % wide.shape[dim] == 0 else 1 << (size - 1).bit_length()
        wide = wide.repeat_interleave(size, dim)[: values.shape[0] if dim == 0 else None]
    return values.float() * wide[:, : values.shape[1]]
