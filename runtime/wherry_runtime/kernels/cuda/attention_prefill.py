"""Attention of a prompt's chunk: FlashAttention (https://arxiv.org/abs/2205.14135) over the paged cache.

A program has the queries of some consecutive tokens, and of all the heads that share a key head, as rows of one tile,
so keys are read once for them. The chunk may begin anywhere in its sequence; its own keys are in the cache already.
"""

import math

import torch
import triton
import triton.language as tl

from wherry_runtime.kernels.cuda.attention_tile import attend_keys, shape_of
from wherry_runtime.kernels.cuda.elements import FUSED, block, operand_type
from wherry_runtime.kernels.cuda.rope_cache import CacheView
from wherry_runtime.models.ops import Attention

ROWS = 64  # queries of a program: tokens × heads of a group
TILE = 64  # keys at once


@triton.jit
def prefill_kernel(
    query,
    query_stride,
    cache,
    scales,
    step,
    tiles,
    out,
    factor,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    SHAPE: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Tile program_id(0) of queries, key head program_id(1).

    tiles: int32 [tiles, 4]: the tile's first row, its tokens, the first one's position, and where the block table is.
    """
    kv_head = tl.program_id(1)
    GROUP: tl.constexpr = HEADS // SHAPE[0]
    HEAD_DIM: tl.constexpr = SHAPE[2]
    WINDOW: tl.constexpr = SHAPE[5]
    tile = tiles + tl.program_id(0) * 4
    first_row = tl.load(tile).to(tl.int64)
    count = tl.load(tile + 1)
    position = tl.load(tile + 2)
    table = tl.load(tile + 3)
    row = tl.arange(0, ROWS)
    token = row // GROUP
    column = tl.arange(0, BLOCK_DIM)
    inside = (token < count)[:, None] & (column < HEAD_DIM)[None, :]
    head = kv_head * GROUP + row % GROUP
    place = query + (first_row + token)[:, None] * query_stride + head[:, None] * HEAD_DIM + column[None, :]
    queries = tl.load(place, mask=inside, other=0.0).to(OPERAND)
    own = position + token
    low = 0
    if WINDOW > 0:
        low = tl.maximum(0, position - WINDOW + 1)
    high = position + count
    _, total, acc = attend_keys(queries, cache, scales, step, table, kv_head, own, low, high, factor, SHAPE, OPERAND)
    mean = acc / tl.where(token < count, total, 1.0)[:, None]
    target = out + ((first_row + token)[:, None] * HEADS + head[:, None]) * HEAD_DIM + column[None, :]
    tl.store(target, mean, mask=inside)


def tokens_per_tile(num_heads: int, num_kv_heads: int) -> int:
    """How many tokens' queries a program has."""
    return max(1, ROWS // (num_heads // num_kv_heads))


def prefill_attention(
    attention: Attention,
    query: torch.Tensor,
    cache: CacheView,
    block_size: int,
    step: torch.Tensor,
    tiles: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Attends the rows of all tiles.

    Args:
        query: [T, …], rotated heads first in each row.
        step: int32, in which the block tables are.
        tiles: [tiles, 4] int32, of at most `tokens_per_tile` tokens; see the kernel.
        out: [T, num_heads · head_dim], contiguous.
    """
    head_dim = attention.head_dim
    wide = query.dtype is torch.float32  # multiplied outside of tensor cores, in more registers
    tile = 16 if wide else TILE if head_dim <= 128 else TILE // 2
    prefill_kernel[(tiles.shape[0], attention.num_kv_heads)](
        *(query, query.stride(0), cache.elements, cache.scales, step, tiles, out),
        math.log2(math.e) * attention.score_scale,
        HEADS=attention.num_heads,
        ROWS=ROWS,
        BLOCK_DIM=block(head_dim),
        SHAPE=shape_of(attention, cache, block_size, tile),
        OPERAND=operand_type(query.dtype),
        num_warps=8 if wide or head_dim > 128 else 4,
        num_stages=2,
        **FUSED,
    )
