"""Packing by the native library, where there is one."""

from typing import TYPE_CHECKING

import torch

from wherry_runtime.kernels.cpu import library

if TYPE_CHECKING:
    from wherry_runtime.quantization.packed import PackedMatrix

_SOURCES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # wherry_pack's numbers


def fill(matrix: "PackedMatrix", first_row: int, rows: torch.Tensor, threads: int | None = None) -> bool:
    """Packs rows [n, K] into `matrix`, on as many threads as PyTorch has if not told otherwise; false where there is no
    library, or it cannot reach them."""
    if (
        rows.dtype not in _SOURCES
        or rows.stride(1) != 1
        or rows.device.type != "cpu"
        or matrix.data.device.type != "cpu"
    ):
        return False
    if not library.available():
        return False
    library.load().pack(
        *(matrix.format.kind, matrix.format.group),
        *(matrix.data.data_ptr(), None if matrix.scales is None else matrix.scales.data_ptr()),
        *(matrix.num_inputs, matrix.padded_inputs, first_row, rows.shape[0]),
        *(rows.data_ptr(), _SOURCES[rows.dtype], rows.stride(0), threads or torch.get_num_threads()),
    )
    return True
