"""Weights of -1, 0 and 1, five of them in a byte: 3⁵ = 243 fit, so that is 1.6 bits of a weight, where log₂ 3 = 1.58.

As BitNet b1.58 has them (Ma et al., 2024, https://arxiv.org/abs/2402.17764).
"""

from itertools import product

import torch
from torch.nn import functional

from wherry_runtime.quantization.formats import PANEL
from wherry_runtime.quantization.grouped import Grouped
from wherry_runtime.quantization.tensors import split

IN_A_BYTE = 5
PANEL_BYTES = -(-PANEL // IN_A_BYTE)  # of one input of a panel: 13, and 1.625 bits of a weight
_POWERS = torch.tensor([81, 27, 9, 3, 1])
# The five weights of each byte, the first one counting the most.
_WEIGHTS = torch.tensor([*product((-1, 0, 1), repeat=IN_A_BYTE)], dtype=torch.int8)


def pack_trits(codes: torch.Tensor) -> torch.Tensor:
    """[..., C] of -1, 0 and 1 → [..., ⌈C / 5⌉] uint8."""
    fives = split(functional.pad(codes, (0, -codes.shape[-1] % IN_A_BYTE)), -1, (-1, IN_A_BYTE))
    return ((fives.to(torch.int16) + 1) * _POWERS.to(torch.int16)).sum(dim=-1).to(torch.uint8)


def unpack_trits(packed: torch.Tensor, count: int) -> torch.Tensor:
    """Undoes `pack_trits`: [..., count] int8.

    Raises:
        ValueError: there are not as many bytes as that takes, or one is none of the 243.
    """
    if packed.dtype is not torch.uint8 or packed.shape[-1] != -(-count // IN_A_BYTE):
        raise ValueError(f"{count} ternary weights are {-(-count // IN_A_BYTE)} bytes, not {list(packed.shape)}")
    if packed.numel() and int(packed.max()) >= len(_WEIGHTS):
        raise ValueError(f"a byte of {int(packed.max())} is no five ternary weights")
    return _WEIGHTS[packed.long()].flatten(-2)[..., :count]


def quantize_ternary(weights: torch.Tensor) -> Grouped:
    """[N, K] float32, all with one scale, their mean magnitude: equations 1 to 3 of the paper."""
    scale = weights.abs().mean().clamp(min=1e-5).half()
    codes = (weights / scale.float()).round_().clamp_(-1, 1)
    return made(codes.to(torch.int8), scale)


def made(codes: torch.Tensor, scale: torch.Tensor) -> Grouped:
    """Of codes [N, K] in -1, 0 and 1, and one scale."""
    rows, width = codes.shape
    ones = torch.ones(rows, 1, dtype=torch.int16)
    return Grouped((codes + 1).to(torch.uint8), scale.reshape(1, 1).expand(rows, 1), ones, 2, width)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """[N, Kp] int8 → [P, Kp, 13] uint8, N a multiple of 64: the outputs of a panel, five in a byte."""
    return pack_trits(split(codes, 0, (-1, PANEL)).transpose(1, 2)).contiguous()


def unpack(data: torch.Tensor) -> torch.Tensor:
    """Undoes `pack`."""
    return unpack_trits(data, PANEL).transpose(1, 2).flatten(0, 1)
