"""One tile of keys and values, as both attention kernels take it.

The running softmax is FlashAttention's (Dao et al., 2022, https://arxiv.org/abs/2205.14135), in powers of two.
"""

import triton
import triton.language as tl

from wherry_runtime.kernels.cuda.elements import from_fp8


@triton.jit
def load_tile(
    cache,
    token,
    head,
    visible,
    TOKEN_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    IS_FP8: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """[tile, BLOCK_DIM] of OPERAND: head `head` of the tokens in slots `token` [tile]; zeros where not `visible`.

    int8 comes without its scale, which is exact in every type of operand.
    """
    column = tl.arange(0, BLOCK_DIM)
    place = (token[:, None] * TOKEN_HEADS + head) * WIDTH + column[None, :]
    mask = visible[:, None] & (column[None, :] < HEAD_DIM)
    values = tl.load(cache + place, mask=mask, other=0)
    if IS_FP8:
        values = from_fp8(values)
    return values.to(OPERAND)


@triton.jit
def load_scales(scales, token, head, visible, TOKEN_HEADS: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    """[tile] float32: what int8's heads are scaled by."""
    return tl.load(scales + ((token * TOKEN_HEADS + head) * WIDTH + HEAD_DIM) // 4, mask=visible, other=0.0)


@triton.jit
def attend_tile(
    query,
    cache,
    scales,
    step,
    table,
    key,
    visible,
    seen,
    kv_head,
    factor,
    top,
    total,
    acc,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    IS_FP8: tl.constexpr,
    IS_INT8: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Adds a tile of keys to the running sums.

    query [rows, BLOCK_DIM] of OPERAND; key [tile]: positions; visible [tile]: whether any row may see them, which is
    whether they are read; seen [rows, tile] or [1, tile]: whether each row does. `table` is where the sequence's block
    table begins in `step`. `factor` is log2(e) / sqrt(head_dim).

    Returns top, total [rows] and acc [rows, BLOCK_DIM]: the largest score, the sum of 2^(score - top), and the values
    weighted with it.
    """
    owner = tl.load(step + table + key // BLOCK_SIZE, mask=visible, other=0).to(tl.int64)
    token = owner * BLOCK_SIZE + key % BLOCK_SIZE
    keys = load_tile(cache, token, kv_head, visible, 2 * KV_HEADS, WIDTH, HEAD_DIM, BLOCK_DIM, IS_FP8, OPERAND)
    scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * factor
    if IS_INT8:
        scores *= load_scales(scales, token, kv_head, visible, 2 * KV_HEADS, WIDTH, HEAD_DIM)[None, :]
    scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, axis=1))
    # A row that has seen nothing yet has no largest score to subtract.
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - base[:, None])
    decay = tl.exp2(top - base)
    total = total * decay + tl.sum(weights, axis=1)
    value_head = kv_head + KV_HEADS
    values = load_tile(cache, token, value_head, visible, 2 * KV_HEADS, WIDTH, HEAD_DIM, BLOCK_DIM, IS_FP8, OPERAND)
    if IS_INT8:
        weights *= load_scales(scales, token, value_head, visible, 2 * KV_HEADS, WIDTH, HEAD_DIM)[None, :]
    acc = tl.dot(weights.to(OPERAND), values, acc * decay[:, None], input_precision="ieee")
    return higher, total, acc
