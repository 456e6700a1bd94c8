"""float32 and bfloat16: nothing is lost but bfloat16's own rounding."""

import torch

from wherry_runtime.quantization.formats import PANEL
from wherry_runtime.quantization.tensors import split


def pack_float32(rows: torch.Tensor) -> torch.Tensor:
    """[N, Kp] → [P, Kp, 64] float32, N a multiple of 64."""
    return split(rows.float(), 0, (-1, PANEL)).transpose(1, 2).contiguous()


def unpack_float32(data: torch.Tensor) -> torch.Tensor:
    """Undoes `pack_float32`."""
    return data.transpose(1, 2).flatten(0, 1)


def pack_bfloat16(rows: torch.Tensor) -> torch.Tensor:
    """[N, Kp] → [P, Kp / 2, 64, 2] bfloat16: pairs of inputs lie together, as dot products of two take them."""
    return split(split(rows.bfloat16(), 0, (-1, PANEL)), 2, (-1, 2)).transpose(1, 2).contiguous()


def unpack_bfloat16(data: torch.Tensor) -> torch.Tensor:
    """Undoes `pack_bfloat16`."""
    return data.transpose(1, 2).flatten(2).flatten(0, 1)
