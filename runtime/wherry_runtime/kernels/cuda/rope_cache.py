"""Norms of queries and keys, rotation, and keys and values into the paged cache, in one kernel.

Rotary position embedding: https://arxiv.org/abs/2104.09864, in the half-split layout, from float32 tables.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from wherry_runtime.kernels.cuda.elements import FP8, FUSED, INT8, block, cache_kind, to_fp8
from wherry_runtime.kvcache.paged import PagedKVCache
from wherry_runtime.layers.norm import RMSNorm
from wherry_runtime.models.ops import Attention

HEADS_AT_ONCE = 8


@triton.jit
def keep(
    cache,
    scales,
    place,
    keeps,
    first,
    second,
    pair,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    IS_FP8: tl.constexpr,
    IS_INT8: tl.constexpr,
):
    """Writes heads, whose halves are `first` and `second` [heads, pairs], to `place` [heads] where it `keeps`."""
    target = cache + place[:, None] * WIDTH + pair[None, :]
    mask = keeps[:, None] & (pair[None, :] < HALF)
    if IS_FP8:
        tl.store(target, to_fp8(first), mask=mask)
        tl.store(target + HALF, to_fp8(second), mask=mask)
    elif IS_INT8:
        top = tl.maximum(tl.max(tl.abs(first), axis=1), tl.max(tl.abs(second), axis=1))
        # The maximum passes over NaN; this sum does not, nor over infinity.
        finite = tl.sum(first * 0.0 + second * 0.0, axis=1) == 0.0
        scale = tl.where(finite, top / 127.0, 0.0)
        inverse = tl.where(scale > 0.0, 1.0 / tl.where(scale > 0.0, scale, 1.0), 0.0)[:, None]
        # Adding 1.5 · 2²³ rounds to nearest, ties to even.
        low_codes = tl.where(finite[:, None], first, 0.0) * inverse + 12582912.0 - 12582912.0
        high_codes = tl.where(finite[:, None], second, 0.0) * inverse + 12582912.0 - 12582912.0
        tl.store(target, low_codes.to(tl.int8), mask=mask)
        tl.store(target + HALF, high_codes.to(tl.int8), mask=mask)
        # `scales` is the cache as float32: the last four bytes of a head.
        word = scales + place * (WIDTH // 4) + 2 * HALF // 4
        tl.store(word, tl.where(finite, scale, float("nan")), mask=keeps)
    else:
        tl.store(target, first, mask=mask)
        tl.store(target + HALF, second, mask=mask)


@triton.jit
def rope_cache_kernel(
    qkv,
    qkv_stride,
    query_norm,
    key_norm,
    eps,
    cosines,
    sines,
    positions,
    slots,
    cache,
    scales,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    NORMED: tl.constexpr,
    IS_FP8: tl.constexpr,
    IS_INT8: tl.constexpr,
):
    """`BLOCK_HEADS` of a row's heads for each program: queries, keys and values. A slot below 0 keeps nothing."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    pair = tl.arange(0, BLOCK_HALF)
    inside = (head[:, None] < HEADS + 2 * KV_HEADS) & (pair[None, :] < HALF)
    place = qkv + row * qkv_stride + head[:, None] * (2 * HALF) + pair[None, :]
    first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(place + HALF, mask=inside, other=0.0).to(tl.float32)
    is_query = head[:, None] < HEADS
    is_value = head[:, None] >= HEADS + KV_HEADS
    a, b = first, second
    if NORMED:
        mean = tl.sum(first * first + second * second, axis=1) / (2 * HALF)
        factor = tl.where(is_value, 1.0, tl.rsqrt(mean + eps)[:, None])
        low, high = pair[None, :], pair[None, :] + HALF
        used = pair[None, :] < HALF
        query_low = tl.load(query_norm + low, mask=used, other=0.0).to(tl.float32)
        query_high = tl.load(query_norm + high, mask=used, other=0.0).to(tl.float32)
        key_low = tl.load(key_norm + low, mask=used, other=0.0).to(tl.float32)
        key_high = tl.load(key_norm + high, mask=used, other=0.0).to(tl.float32)
        a = first * factor * tl.where(is_query, query_low, key_low)
        b = second * factor * tl.where(is_query, query_high, key_high)
    position = tl.load(positions + row).to(tl.int64)
    cos = tl.load(cosines + position * HALF + pair, mask=pair < HALF, other=0.0)[None, :]
    sin = tl.load(sines + position * HALF + pair, mask=pair < HALF, other=0.0)[None, :]
    first = tl.where(is_value, first, a * cos - b * sin)
    second = tl.where(is_value, second, b * cos + a * sin)
    tl.store(place, first, mask=inside & is_query)
    tl.store(place + HALF, second, mask=inside & is_query)

    slot = tl.load(slots + row).to(tl.int64)
    # From which head on something is kept: none of a row without a slot.
    kept = tl.where(slot >= 0, HEADS, HEADS + 2 * KV_HEADS)
    place = slot * (2 * KV_HEADS) + head - HEADS
    keeps = (head >= kept) & (head < HEADS + 2 * KV_HEADS)
    keep(cache, scales, place, keeps, first, second, pair, HALF, WIDTH, IS_FP8, IS_INT8)


@dataclass(slots=True, frozen=True)
class CacheView:
    """A layer of a `PagedKVCache` as kernels address it."""

    elements: torch.Tensor  # floats, or uint8 for fp8, or int8
    scales: torch.Tensor  # the same memory as float32 for int8, whose scales are in it; else `elements`
    kind: int

    @classmethod
    def of(cls, cache: PagedKVCache, layer: int) -> "CacheView":
        stored, tensor = cache.stored, cache.layers[layer]
        kind = cache_kind(stored)
        elements = tensor.view(torch.uint8) if kind == FP8 else tensor
        return cls(elements, tensor.view(torch.float32) if kind == INT8 else elements, kind)


def rope_and_cache(
    attention: Attention,
    qkv: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    positions: torch.Tensor,
    slots: torch.Tensor,
    cache: CacheView,
) -> None:
    """Rotates the queries of qkv in place; writes rotated keys, and values, to the cache.

    Args:
        qkv: [T, (num_heads + 2 num_kv_heads) · head_dim].
        tables: cos and sin, [positions, head_dim / 2] float32.
        positions: [T] int32.
        slots: [T] int32, block · block_size + offset; -1: the row is not kept.
    """
    heads = attention.num_heads + 2 * attention.num_kv_heads
    query_norm, key_norm = (n if isinstance(n, RMSNorm) else None for n in (attention.query_norm, attention.key_norm))
    normed = query_norm is not None and key_norm is not None
    half = attention.head_dim // 2
    grid = (qkv.shape[0], triton.cdiv(heads, HEADS_AT_ONCE))
    rope_cache_kernel[grid](
        *(qkv, qkv.stride(0)),
        query_norm.weight if query_norm is not None and normed else qkv,
        key_norm.weight if key_norm is not None and normed else qkv,
        query_norm.eps if query_norm is not None else 0.0,
        *(*tables, positions, slots, cache.elements, cache.scales),
        HEADS=attention.num_heads,
        KV_HEADS=attention.num_kv_heads,
        HALF=half,
        WIDTH=cache.elements.shape[-1],
        BLOCK_HEADS=HEADS_AT_ONCE,
        BLOCK_HALF=block(half),
        NORMED=normed,
        IS_FP8=cache.kind == FP8,
        IS_INT8=cache.kind == INT8,
        num_warps=4,
        **FUSED,
    )
