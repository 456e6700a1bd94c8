"""Products with int8 and int4 weights that are widened in registers: only activations and sums are floats in memory.

The weights stay in the layout of `PackedMatrix`: panels of 64 outputs, in which the bytes of four consecutive inputs
lie together. A row of a panel is 256 bytes (int8) or 128 (int4), read as 32-bit words.

A weight is q · scale, rounded to the type of the activations, as a checkpoint of that type would have it. Activations
are not rounded to int8 as on CPUs: decoding is bound by reading weights, and that would not save a byte of them.

Few rows: `multiply_kernel`, whose programs share out the inputs as well as the outputs where outputs alone are too few
to occupy a GPU; partial sums are added up in order by `add_parts_kernel`. How they are shared out follows from the
matrix alone. Many rows: `widen_kernel` writes a slab of widened weights, for cuBLAS.
"""

import torch
import triton
import triton.language as tl

from wherry_runtime.kernels.cuda.elements import FUSED, operand_type
from wherry_runtime.quantization.formats import PANEL
from wherry_runtime.quantization.packed import PackedMatrix

CHUNK = 128  # inputs at once
FEW_ROWS = 16  # that one tile of rows takes
MOST_ROWS = 128  # beyond, weights are widened once and not for each tile of rows
PROGRAMS = 256  # that a matrix is shared out among, where it is large enough
LEAST_CHUNKS = 4  # of a program
SLAB_BYTES = 64 << 20  # of widened weights at once


@triton.jit
def widen(word, shift: tl.constexpr, scale, INT4: tl.constexpr):
    """q · scale in float32, of the q that begins at bit `shift` of each word: two integer operations and one product.

    The code's bits (q + 8 or q + 128) go to the top of the fraction of a float between 1 and 2, which is 1 + code / 16
    or 1 + code / 256. Of that, one multiplication and addition make the weight, exactly but for its own rounding.
    """
    LOWEST: tl.constexpr = 19 if INT4 else 15
    MASK: tl.constexpr = 0x780000 if INT4 else 0x7F8000
    bits = word << (LOWEST - shift) if shift <= LOWEST else word >> (shift - LOWEST)
    value = ((bits & MASK) | 0x3F800000).to(tl.float32, bitcast=True)
    if INT4:
        return tl.fma(value, scale * 16.0, scale * -24.0)
    return tl.fma(value, scale * 256.0, scale * -384.0)


@triton.jit
def load_inputs(x, x_stride, row, column, num_rows, INPUTS: tl.constexpr, OPERAND: tl.constexpr):
    """x [rows, columns] as four of [rows, columns / 4]: the inputs of the first to fourth byte of each word."""
    mask = (row < num_rows)[:, None] & (column < INPUTS)[None, :]
    values = tl.load(x + row.to(tl.int64)[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(OPERAND)
    even, odd = tl.split(tl.reshape(values, [values.shape[0], values.shape[1] // 4, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def store_sums(
    y,
    bias,
    residual,
    residual_stride,
    out,
    row,
    column,
    mask,
    OUTPUTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """Writes y [rows, columns] with bias and residual, if there are any."""
    if HAS_BIAS:
        y += tl.load(bias + column, mask=column < OUTPUTS, other=0.0)[None, :]
    if HAS_RESIDUAL:
        beside = residual + row.to(tl.int64)[:, None] * residual_stride + column[None, :]
        y += tl.load(beside, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row.to(tl.int64)[:, None] * OUTPUTS + column[None, :], y, mask=mask)


@triton.jit
def add_products(
    acc, first, second, third, fourth, word, SHIFT: tl.constexpr, scale, INT4: tl.constexpr, OPERAND: tl.constexpr
):
    """acc plus the products with the weights from bit SHIFT on of each byte of the words."""
    acc = tl.dot(first, widen(word, SHIFT, scale, INT4).to(OPERAND), acc, input_precision="ieee")
    acc = tl.dot(second, widen(word, 8 + SHIFT, scale, INT4).to(OPERAND), acc, input_precision="ieee")
    acc = tl.dot(third, widen(word, 16 + SHIFT, scale, INT4).to(OPERAND), acc, input_precision="ieee")
    return tl.dot(fourth, widen(word, 24 + SHIFT, scale, INT4).to(OPERAND), acc, input_precision="ieee")


@triton.jit(do_not_specialize=["num_rows"])
def multiply_kernel(
    x,
    x_stride,
    words,
    scales,
    bias,
    residual,
    residual_stride,
    out,
    parts,
    num_rows,
    INPUTS: tl.constexpr,
    PADDED: tl.constexpr,
    OUTPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr,
    INT4: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Panel program_id(0), inputs from program_id(1) · SPAN on, rows from program_id(2) · BLOCK_ROWS on.

    words: int32 [panels, PADDED / 4, COLUMNS]; an int4 word has column c in the low halves of its bytes, c + 32 in the
    high ones, so a panel is 32 words wide and gives two tiles. parts: [SPLIT, num_rows, OUTPUTS] float32, if SPLIT > 1.
    """
    panel = tl.program_id(0)
    split = tl.program_id(1)
    row = tl.program_id(2) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    word_column = tl.arange(0, COLUMNS)
    panel_words = words + panel.to(tl.int64) * (PADDED // 4 * COLUMNS)
    panel_scales = scales + panel.to(tl.int64) * (PADDED // GROUP * 64)
    # Only int4 uses the second.
    acc = tl.zeros([BLOCK_ROWS, COLUMNS], tl.float32)
    acc_high = tl.zeros([BLOCK_ROWS, COLUMNS], tl.float32)
    begin = split * SPAN
    for start in range(begin, tl.minimum(begin + SPAN, PADDED), CHUNK):
        quad = start // 4 + tl.arange(0, CHUNK // 4)
        word = tl.load(panel_words + quad[:, None] * COLUMNS + word_column[None, :])
        place = panel_scales + (quad * 4 // GROUP)[:, None] * 64 + word_column[None, :]
        scale = tl.load(place).to(tl.float32)
        if INT4:
            scale_high = tl.load(place + 32).to(tl.float32)
        inputs = start + tl.arange(0, CHUNK)
        first, second, third, fourth = load_inputs(x, x_stride, row, inputs, num_rows, INPUTS, OPERAND)
        acc = add_products(acc, first, second, third, fourth, word, 0, scale, INT4, OPERAND)
        if INT4:
            acc_high = add_products(acc_high, first, second, third, fourth, word, 4, scale_high, INT4, OPERAND)
    for half in tl.static_range(2 if INT4 else 1):
        y = acc if half == 0 else acc_high
        column = panel * 64 + half * 32 + word_column
        mask = (row < num_rows)[:, None] & (column < OUTPUTS)[None, :]
        if SPLIT > 1:
            place = (split.to(tl.int64) * num_rows + row[:, None]) * OUTPUTS + column[None, :]
            tl.store(parts + place, y, mask=mask)
        else:
            store_sums(y, bias, residual, residual_stride, out, row, column, mask, OUTPUTS, HAS_BIAS, HAS_RESIDUAL)


@triton.jit(do_not_specialize=["num_rows"])
def add_parts_kernel(
    parts,
    bias,
    residual,
    residual_stride,
    out,
    num_rows,
    OUTPUTS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """`BLOCK` columns of a row for each program: the sum of `SPLIT` parts."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < OUTPUTS
    y = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLIT):
        y += tl.load(parts + (split * num_rows + row) * OUTPUTS + column, mask=mask, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias + column, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        y += tl.load(residual + row * residual_stride + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * OUTPUTS + column, y, mask=mask)


@triton.jit(do_not_specialize=["first_panel"])
def widen_kernel(
    words,
    scales,
    out,
    first_panel,
    out_stride,
    INPUTS: tl.constexpr,
    PADDED: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
    INT4: tl.constexpr,
):
    """Panel first_panel + program_id(0), CHUNK inputs from program_id(1) · CHUNK on → out [INPUTS, panels · 64]."""
    panel = (first_panel + tl.program_id(0)).to(tl.int64)
    quad = tl.program_id(1) * (CHUNK // 4) + tl.arange(0, CHUNK // 4)
    column = tl.arange(0, COLUMNS)
    word = tl.load(words + (panel * (PADDED // 4) + quad[:, None]) * COLUMNS + column[None, :])
    place = scales + (panel * (PADDED // GROUP) + (quad * 4 // GROUP)[:, None]) * 64 + column[None, :]
    scale = tl.load(place).to(tl.float32)
    if INT4:
        scale_high = tl.load(place + 32).to(tl.float32)
    for byte in tl.static_range(4):
        input_ = quad * 4 + byte
        target = out + input_.to(tl.int64)[:, None] * out_stride + tl.program_id(0) * 64 + column[None, :]
        mask = (input_ < INPUTS)[:, None] & (column < 64)[None, :]
        tl.store(target, widen(word, 8 * byte, scale, INT4), mask=mask)
        if INT4:
            tl.store(target + 32, widen(word, 8 * byte + 4, scale_high, INT4), mask=mask)


def shares(matrix: PackedMatrix) -> tuple[int, int]:
    """How many programs share out the inputs of a panel, and how many inputs each of them has."""
    chunks = matrix.padded_inputs // CHUNK
    wanted = min(-(-PROGRAMS // matrix.num_panels), max(1, chunks // LEAST_CHUNKS))
    span = -(-chunks // wanted)
    return -(-chunks // span), span * CHUNK


def multiply(
    x: torch.Tensor, matrix: PackedMatrix, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """x Wᵀ, plus bias and residual where they are given.

    Args:
        x: [T, K], rows contiguous in themselves.
        matrix: W [N, K], int8 or int4.
        bias: [at least N] float32.
        residual: [T, N].

    Returns:
        [T, N] in x's dtype. Rows up to FEW_ROWS are computed alike, however many they are.
    """
    if matrix.scales is None:
        raise TypeError(f"{matrix.format} weights are not quantized")
    # float32 is not multiplied by tensor cores, and a large tile of it has no room in registers.
    if x.shape[0] > (FEW_ROWS if x.dtype is torch.float32 else MOST_ROWS):
        return _multiply_widened(x, matrix, bias, residual)
    num_rows, num_outputs = x.shape[0], matrix.num_outputs
    out = torch.empty(num_rows, num_outputs, dtype=x.dtype, device=x.device)
    if not num_rows:
        return out
    split, span = shares(matrix)
    parts = out
    if split > 1:
        parts = torch.empty(split, num_rows, num_outputs, dtype=torch.float32, device=x.device)
    block_rows = FEW_ROWS if num_rows <= FEW_ROWS else 64
    beside, beside_stride = (out, 0) if residual is None else (residual, residual.stride(0))
    multiply_kernel[(matrix.num_panels, split, triton.cdiv(num_rows, block_rows))](
        *(x, x.stride(0), matrix.data.view(torch.int32), matrix.scales, matrix.scales if bias is None else bias),
        *(beside, beside_stride, out, parts, num_rows),
        INPUTS=matrix.num_inputs,
        PADDED=matrix.padded_inputs,
        OUTPUTS=num_outputs,
        GROUP=matrix.format.group,
        SPAN=span,
        CHUNK=CHUNK,
        BLOCK_ROWS=block_rows,
        COLUMNS=_columns(matrix),
        SPLIT=split,
        INT4=matrix.format.method == "int4",
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        OPERAND=operand_type(x.dtype),
        num_warps=4 if block_rows == FEW_ROWS else 8,
        num_stages=4,
        **FUSED,
    )
    if split > 1:
        block = 512
        add_parts_kernel[(num_rows, triton.cdiv(num_outputs, block))](
            *(parts, matrix.scales if bias is None else bias, beside, beside_stride, out, num_rows),
            OUTPUTS=num_outputs,
            SPLIT=split,
            BLOCK=block,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            **FUSED,
        )
    return out


def _columns(matrix: PackedMatrix) -> int:
    """Words that a row of a panel takes."""
    return PANEL * matrix.format.bits // 8


def widened(matrix: PackedMatrix, panels: range, dtype: torch.dtype) -> torch.Tensor:
    """Some panels' weights, [K, 64 · panels] of `dtype`."""
    if matrix.scales is None:
        raise TypeError(f"{matrix.format} weights are not quantized")
    out = torch.empty(matrix.num_inputs, len(panels) * PANEL, dtype=dtype, device=matrix.data.device)
    widen_kernel[(len(panels), matrix.padded_inputs // CHUNK)](
        *(matrix.data.view(torch.int32), matrix.scales, out, panels.start, out.stride(0)),
        INPUTS=matrix.num_inputs,
        PADDED=matrix.padded_inputs,
        GROUP=matrix.format.group,
        CHUNK=CHUNK,
        COLUMNS=_columns(matrix),
        INT4=matrix.format.method == "int4",
        **FUSED,
    )
    return out


def _multiply_widened(
    x: torch.Tensor, matrix: PackedMatrix, bias: torch.Tensor | None, residual: torch.Tensor | None
) -> torch.Tensor:
    """`multiply` through slabs of widened weights."""
    out = torch.empty(x.shape[0], matrix.num_outputs, dtype=x.dtype, device=x.device)
    at_once = max(1, SLAB_BYTES // (matrix.num_inputs * PANEL * x.dtype.itemsize))
    for start in range(0, matrix.num_panels, at_once):
        panels = range(start, min(start + at_once, matrix.num_panels))
        columns = slice(start * PANEL, min(panels.stop * PANEL, matrix.num_outputs))
        product = torch.mm(x, widened(matrix, panels, x.dtype)[:, : columns.stop - columns.start])
        if bias is not None:
            product += bias[columns]
        if residual is not None:
            product += residual[:, columns]
        out[:, columns] = product
    return out
