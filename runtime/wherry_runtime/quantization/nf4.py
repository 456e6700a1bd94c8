"""NF4: sixteen quantiles of a normal distribution (Dettmers et al., 2023, https://arxiv.org/abs/2305.14314)."""

from dataclasses import dataclass

import torch

from wherry_runtime.quantization.tensors import split

BLOCK = 64
OFFSET = 0.9677083  # the quantile that ±1 stand for


def _quantiles() -> torch.Tensor:
    """Eight above zero, seven below, and zero; the largest are ±1."""
    above = torch.special.ndtri(torch.linspace(OFFSET, 0.5, 9, dtype=torch.float64))[:-1]
    below = -torch.special.ndtri(torch.linspace(OFFSET, 0.5, 8, dtype=torch.float64))[:-1]
    values = torch.cat((above, torch.zeros(1, dtype=torch.float64), below)).sort().values
    return (values / values.max()).float()


VALUES = _quantiles()


@dataclass(frozen=True, slots=True)
class NF4:
    """packed [⌈N · K / 2⌉] uint8, the first weight in the high half of a byte; largest [blocks] float32."""

    packed: torch.Tensor
    largest: torch.Tensor
    shape: tuple[int, int]

    def dequantized(self) -> torch.Tensor:
        """[N, K] float32."""
        return unpack_nf4(self.packed, self.largest, VALUES, BLOCK, self.shape)


def quantize_nf4(weights: torch.Tensor) -> NF4:
    """[N, K] float32; weights one after another in blocks of 64, each divided by its largest magnitude."""
    flat = torch.nn.functional.pad(weights.flatten(), (0, -weights.numel() % BLOCK))
    blocks = split(flat, 0, (-1, BLOCK))
    largest = blocks.abs().amax(dim=-1)
    scaled = blocks / torch.where(largest == 0, 1.0, largest).unsqueeze(-1)
    codes = torch.bucketize(scaled, (VALUES[1:] + VALUES[:-1]) / 2).to(torch.uint8).flatten()[: weights.numel()]
    codes = torch.nn.functional.pad(codes, (0, codes.numel() % 2))
    return NF4(codes[::2] << 4 | codes[1::2], largest, (weights.shape[0], weights.shape[1]))


def unpack_nf4(
    packed: torch.Tensor, largest: torch.Tensor, values: torch.Tensor, block: int, shape: tuple[int, ...]
) -> torch.Tensor:
    """`shape` float32 of codes, the largest magnitude of each block, and what the sixteen codes stand for."""
    count = torch.Size(shape).numel()
    codes = torch.stack((packed.flatten() >> 4, packed.flatten() & 15), dim=-1).flatten()[:count].long()
    scales = largest.float().repeat_interleave(block)[:count]
    return (values.float()[codes] * scales).view(shape)
