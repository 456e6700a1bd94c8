"""Packing by the native library, where there is one."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from wherry_runtime.quantization.packed import PackedMatrix


def fill(matrix: "PackedMatrix", first_row: int, rows: torch.Tensor) -> bool:
    """Packs rows [n, K] into `matrix` and tells whether it could."""
    del matrix, first_row, rows
    return False
