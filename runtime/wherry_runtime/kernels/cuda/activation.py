"""SwiGLU's elementwise half (https://arxiv.org/abs/2002.05202)."""

import torch
import triton
import triton.language as tl

from wherry_runtime.kernels.cuda.elements import FUSED

BLOCK = 1024


@triton.jit
def silu_mul_kernel(x, out, x_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """`BLOCK` columns of a row for each program."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    gate = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * x_stride + WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + columns, gate / (1.0 + tl.exp(-gate)) * up, mask=inside)


def silu_mul(x: torch.Tensor) -> torch.Tensor:
    """x [T, 2 I], gate before up → silu(gate) · up, [T, I] in x's dtype."""
    num_rows, width = x.shape[0], x.shape[1] // 2
    out = torch.empty(num_rows, width, dtype=x.dtype, device=x.device)
    if num_rows:
        grid = (num_rows, triton.cdiv(width, BLOCK))
        silu_mul_kernel[grid](x, out, x.stride(0), WIDTH=width, BLOCK=BLOCK, **FUSED)
    return out
