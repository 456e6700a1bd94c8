"""Queries of one sequence over some of its keys, as both attention kernels compute it.

The running softmax is FlashAttention's (Dao et al., 2022, https://arxiv.org/abs/2205.14135), in powers of two.
"""

import triton
import triton.language as tl

from wherry_runtime.kernels.cuda.elements import FP8, INT8, from_fp8
from wherry_runtime.kernels.cuda.rope_cache import CacheView
from wherry_runtime.models.ops import Attention


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
def attend_keys(
    query, cache, scales, step, table, kv_head, own, low, high, factor, SHAPE: tl.constexpr, OPERAND: tl.constexpr
):
    """Attends query [rows, BLOCK_DIM] of OPERAND, at positions `own` [rows], to keys low … high - 1.

    `table` is where the sequence's block table begins in `step`, `factor` is log2(e) / sqrt(head_dim), and SHAPE comes
    from `shape_of`. Keys are taken in tiles at multiples of the tile.

    Returns top, total [rows] and acc [rows, BLOCK_DIM]: the largest score, the sum of 2^(score - top), and the values
    weighted with it.
    """
    KV_HEADS: tl.constexpr = SHAPE[0]
    WIDTH: tl.constexpr = SHAPE[1]
    HEAD_DIM: tl.constexpr = SHAPE[2]
    BLOCK_SIZE: tl.constexpr = SHAPE[3]
    TILE: tl.constexpr = SHAPE[4]
    WINDOW: tl.constexpr = SHAPE[5]
    IS_FP8: tl.constexpr = SHAPE[6]
    IS_INT8: tl.constexpr = SHAPE[7]
    ROWS: tl.constexpr = query.shape[0]
    DIM: tl.constexpr = query.shape[1]
    value_head = kv_head + KV_HEADS
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    for start in range(low // TILE * TILE, high, TILE):
        key = start + tl.arange(0, TILE)
        visible = (key >= low) & (key < high)
        seen = visible[None, :] & (key[None, :] <= own[:, None])
        if WINDOW > 0:
            seen = seen & (key[None, :] > own[:, None] - WINDOW)
        owner = tl.load(step + table + key // BLOCK_SIZE, mask=visible, other=0).to(tl.int64)
        token = owner * BLOCK_SIZE + key % BLOCK_SIZE
        keys = load_tile(cache, token, kv_head, visible, 2 * KV_HEADS, WIDTH, HEAD_DIM, DIM, IS_FP8, OPERAND)
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
        values = load_tile(cache, token, value_head, visible, 2 * KV_HEADS, WIDTH, HEAD_DIM, DIM, IS_FP8, OPERAND)
        if IS_INT8:
            weights *= load_scales(scales, token, value_head, visible, 2 * KV_HEADS, WIDTH, HEAD_DIM)[None, :]
        acc = tl.dot(weights.to(OPERAND), values, acc * decay[:, None], input_precision="ieee")
        top = higher
    return top, total, acc


def shape_of(attention: Attention, cache: CacheView, block_size: int, tile: int) -> tuple[int, ...]:
    """What `attend_keys` is compiled for; `tile` keys are taken at once."""
    return (
        *(attention.num_kv_heads, cache.elements.shape[-1], attention.head_dim, block_size, tile),
        *(attention.window or 0, int(cache.kind == FP8), int(cache.kind == INT8)),
    )
