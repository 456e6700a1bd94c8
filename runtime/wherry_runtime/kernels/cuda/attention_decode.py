"""Attention of one new token for each sequence.

A sequence's keys are cut into parts of `PART` keys at multiples of PART, whatever else is in the batch. Each pair of a
row and a part is an item of work that any program may take, so one long sequence occupies the whole GPU (as in
Flash-Decoding: Dao et al., 2023); a second kernel sums the parts up, in order. The number of items is read on the
device, so that a CUDA graph replays for any lengths.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from wherry_runtime.kernels.cuda.attention_tile import attend_keys, shape_of
from wherry_runtime.kernels.cuda.elements import FUSED, block, operand_type
from wherry_runtime.kernels.cuda.rope_cache import CacheView
from wherry_runtime.models.ops import Attention

PART = 256  # keys
TILE = 64  # keys at once
PARTS_AT_ONCE = 16  # that are summed up at once
PROGRAMS_PER_PROCESSOR = 4


@triton.jit
def decode_kernel(
    query,
    query_stride,
    cache,
    scales,
    step,
    tables,
    lengths,
    work,
    first_items,
    first_parts,
    sums,
    levels,
    factor,
    HEADS: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PART: tl.constexpr,
    SHAPE: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Items program_id(0), program_id(0) + num_programs(0), … of key head program_id(1).

    work: [2] the number of items, and where in `step` each item's row begins to be listed. Writes each item's weighted
    mean of values to sums [items, HEADS, HEAD_DIM], and log2 of its summed weights to levels [items, HEADS].
    """
    kv_head = tl.program_id(1)
    GROUP: tl.constexpr = HEADS // SHAPE[0]
    HEAD_DIM: tl.constexpr = SHAPE[2]
    WINDOW: tl.constexpr = SHAPE[5]
    member = tl.arange(0, BLOCK_GROUP)
    head = kv_head * GROUP + member
    column = tl.arange(0, BLOCK_DIM)
    inside = (member[:, None] < GROUP) & (column[None, :] < HEAD_DIM)
    num_items = tl.load(work)
    rows = step + tl.load(work + 1)
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        row = tl.load(rows + item)
        part = tl.load(first_parts + row) + item - tl.load(first_items + row)
        length = tl.load(lengths + row)
        table = tl.load(tables + row)
        place = query + row.to(tl.int64) * query_stride + head[:, None] * HEAD_DIM + column[None, :]
        queries = tl.load(place, mask=inside, other=0.0).to(OPERAND)
        low = part * PART
        if WINDOW > 0:
            low = tl.maximum(low, length - WINDOW)
        high = tl.minimum((part + 1) * PART, length)
        own = length - 1 + member * 0
        top, total, acc = attend_keys(
            queries, cache, scales, step, table, kv_head, own, low, high, factor, SHAPE, OPERAND
        )
        place = (item * HEADS + head).to(tl.int64)
        target = sums + place[:, None] * HEAD_DIM + column[None, :]
        tl.store(target, acc / total[:, None], mask=inside)
        tl.store(levels + place, top + tl.log2(total), mask=member < GROUP)


@triton.jit
def combine_kernel(
    sums,
    levels,
    first_items,
    out,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Row program_id(0), head program_id(1): the mean of its items by their levels; zero where there are none."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    column = tl.arange(0, BLOCK_DIM)
    begin = tl.load(first_items + row)
    end = tl.load(first_items + row + 1)
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([BLOCK_DIM], tl.float32)
    for start in range(begin, end, PARTS):
        item = start + tl.arange(0, PARTS)
        place = item.to(tl.int64) * HEADS + head
        level = tl.load(levels + place, mask=item < end, other=float("-inf"))
        higher = tl.maximum(top, tl.max(level, axis=0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.where(item < end, tl.exp2(level - base), 0.0)
        mask = (item < end)[:, None] & (column < HEAD_DIM)[None, :]
        means = tl.load(sums + place[:, None] * HEAD_DIM + column[None, :], mask=mask, other=0.0)
        decay = tl.exp2(top - base)
        total = total * decay + tl.sum(weight, axis=0)
        acc = acc * decay + tl.sum(means * weight[:, None], axis=0)
        top = higher
    mean = acc / tl.where(begin < end, total, 1.0)
    target = out + (row.to(tl.int64) * HEADS + head) * HEAD_DIM + column
    tl.store(target, mean, mask=column < HEAD_DIM)


@dataclass(slots=True, frozen=True)
class Partials:
    """What items leave for the second kernel: one layer's at a time."""

    sums: torch.Tensor  # [items, num_heads, head_dim] float32
    levels: torch.Tensor  # [items, num_heads] float32

    @classmethod
    def of(cls, items: int, num_heads: int, head_dim: int, device: torch.device) -> "Partials":
        return cls(
            torch.empty(items, num_heads, head_dim, dtype=torch.float32, device=device),
            torch.empty(items, num_heads, dtype=torch.float32, device=device),
        )

    @property
    def capacity(self) -> int:
        """Items."""
        return self.sums.shape[0]


@dataclass(slots=True, frozen=True)
class DecodeWork:
    """The decodes of a step, for layers with one window."""

    work: torch.Tensor  # [2] int32: items, and where their rows are listed in the step
    first_items: torch.Tensor  # [rows + 1] int32
    first_parts: torch.Tensor  # [rows] int32: the first part that the row sees


def decode_attention(
    attention: Attention,
    query: torch.Tensor,
    cache: CacheView,
    block_size: int,
    step: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    work: DecodeWork,
    partials: Partials,
    programs: int,
    out: torch.Tensor,
) -> None:
    """Attends row r of `query` to the first lengths[r] tokens of its sequence, as far as the window reaches.

    Args:
        query: [rows, …], rotated heads first in each row.
        step: int32, in which block tables and items are.
        tables: [rows] int32, where each row's block table begins in `step`.
        lengths: [rows] int32; 0: the row gets zeros.
        programs: that share the work, for each key head.
        out: [rows, num_heads · head_dim], contiguous.
    """
    heads, head_dim = attention.num_heads, attention.head_dim
    group = heads // attention.num_kv_heads
    tile = TILE if head_dim <= 128 and query.dtype is not torch.float32 else TILE // 2
    decode_kernel[(max(1, programs), attention.num_kv_heads)](
        *(query, query.stride(0), cache.elements, cache.scales, step, tables, lengths),
        *(work.work, work.first_items, work.first_parts, partials.sums, partials.levels),
        math.log2(math.e) * attention.score_scale,
        HEADS=heads,
        BLOCK_GROUP=block(group),
        BLOCK_DIM=block(head_dim),
        PART=PART,
        SHAPE=shape_of(attention, cache, block_size, tile),
        OPERAND=operand_type(query.dtype),
        num_warps=4,
        num_stages=2,
        **FUSED,
    )
    combine_kernel[(query.shape[0], heads)](
        *(partials.sums, partials.levels, work.first_items, out),
        HEADS=heads,
        HEAD_DIM=head_dim,
        BLOCK_DIM=block(head_dim),
        PARTS=PARTS_AT_ONCE,
        num_warps=2,
        **FUSED,
    )


def num_programs(num_kv_heads: int, device: torch.device) -> int:
    """Programs for each key head that fill the GPU."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return max(1, PROGRAMS_PER_PROCESSOR * processors // num_kv_heads)
