"""RMSNorm (https://arxiv.org/abs/1910.07467), of all rows or of some."""

import torch
import triton
import triton.language as tl

from wherry_runtime.kernels.cuda.elements import FUSED, block


@triton.jit
def rms_norm_kernel(
    x, rows, weight, out, x_stride, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, GATHER: tl.constexpr
):
    """A row of `out` for each program."""
    row = tl.program_id(0).to(tl.int64)
    source = row
    if GATHER:
        source = tl.load(rows + row).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    values = tl.load(x + source * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / WIDTH + eps)
    weights = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + columns, values * scale * weights, mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, rows: torch.Tensor | None = None) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) · w.

    Args:
        x: [T, width], rows contiguous in themselves.
        weight: [width].
        rows: [S] int32, which rows of x; None: all.

    Returns:
        [T or S, width] in x's dtype.
    """
    num_rows, width = x.shape if rows is None else (rows.shape[0], x.shape[1])
    out = torch.empty(num_rows, width, dtype=x.dtype, device=x.device)
    if num_rows:
        size = block(width)
        rms_norm_kernel[(num_rows,)](
            *(x, x if rows is None else rows, weight, out, x.stride(0), eps),
            WIDTH=width,
            BLOCK=size,
            GATHER=rows is not None,
            num_warps=min(16, max(1, size // 512)),
            **FUSED,
        )
    return out
