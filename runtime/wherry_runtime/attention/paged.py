"""Scaled dot-product attention over paged keys and values, in plain PyTorch: the reference of every other kernel.

Grouped queries (Ainslie et al., 2023, https://arxiv.org/abs/2305.13245) are folded into query rows: the G heads that
share a key head become G rows of one matrix, so keys are never repeated in memory.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

from wherry_runtime.attention.metadata import AttentionMetadata, DecodeGroup, Prefill
from wherry_runtime.kvcache.formats import KVFormat, decode, encode, format_of
from wherry_runtime.models.ops import Attention


def write_cache(cache: torch.Tensor, slots: torch.Tensor, heads: torch.Tensor) -> None:
    """Keeps keys and values, in whatever type the cache has.

    Args:
        cache: one layer of a `PagedKVCache`.
        slots: [T] int64, block * block_size + offset.
        heads: [T, 2 * num_kv_heads, head_dim], rotated keys and then values.
    """
    kept = encode(heads, format_of(cache.dtype))
    # As bytes: not every type of element can be copied by index.
    flat = cache.view(-1, *cache.shape[2:]).view(torch.uint8)
    flat.index_copy_(0, slots, kept.view(torch.uint8))


def paged_attention(
    query: torch.Tensor, cache: torch.Tensor, attention: Attention, metadata: AttentionMetadata
) -> torch.Tensor:
    """Attends each row of the step to its own sequence.

    Args:
        query: [T, num_heads, head_dim].
        cache: one layer of a `PagedKVCache`, with the step's own keys and values written.
        attention: the layer's.
        metadata: of the step, with distances where the layer's scores depend on them.

    Returns:
        [T, num_heads * head_dim] in the query's dtype.
    """
    num_tokens, num_heads, head_dim = query.shape
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    grouped = query.view(num_tokens, attention.num_kv_heads, -1, head_dim)
    grouped_out = out.view(num_tokens, attention.num_kv_heads, -1, head_dim)
    for group in metadata.decodes:
        rows = slice(group.first, group.first + group.size)
        grouped_out[rows] = _decode(grouped[rows], cache, attention, group)
    for prefill in metadata.prefills:
        _prefill(grouped, grouped_out, cache, attention, prefill)
    return out.view(num_tokens, num_heads * head_dim)


def _gather(cache: torch.Tensor, blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[len(blocks) * block_size, 2 * num_kv_heads, head_dim] of `dtype`."""
    stored: KVFormat = format_of(cache.dtype)
    flat = cache.view(torch.uint8).view(cache.shape[0], -1)
    pages = flat.index_select(0, blocks).view(cache.dtype).view(-1, *cache.shape[2:])
    return pages if stored.element == dtype else decode(pages, stored, dtype)


def _decode(query: torch.Tensor, cache: torch.Tensor, attention: Attention, group: DecodeGroup) -> torch.Tensor:
    """query [B, K, G, D] → [B, K, G, D]."""
    num_kv_heads, num_groups, head_dim = query.shape[1:]
    pages = _gather(cache, group.blocks, query.dtype).view(group.size, -1, 2 * num_kv_heads, head_dim).transpose(1, 2)
    # Expanded, not broadcast: PyTorch's CPU flash kernel is chosen for masks with full query rows.
    mask = group.mask.expand(-1, -1, num_groups, -1)
    return _attend(query, pages[:, :num_kv_heads], pages[:, num_kv_heads:], mask, attention, group.distance)


def _prefill(
    grouped: torch.Tensor, out: torch.Tensor, cache: torch.Tensor, attention: Attention, prefill: Prefill
) -> None:
    """grouped, out [T, K, G, D]; writes the rows of `prefill`."""
    num_kv_heads, num_groups, head_dim = grouped.shape[1:]
    pages = _gather(cache, prefill.blocks, grouped.dtype).transpose(0, 1).unsqueeze(0)
    for tile in prefill.tiles:
        rows = slice(tile.first, tile.first + tile.size)
        keys = pages[:, :num_kv_heads, tile.low : tile.high]
        values = pages[:, num_kv_heads:, tile.low : tile.high]
        # [n, K, G, D] → [1, K, G·n, D]: the rows of one group after those of another, so the mask repeats.
        query = grouped[rows].permute(1, 2, 0, 3).reshape(1, num_kv_heads, num_groups * tile.size, head_dim)
        mask = tile.mask.repeat(num_groups, 1)[None, None]
        distance = tile.distance.repeat(num_groups, 1)[None, None] if tile.distance is not None else None
        attended = _attend(query, keys, values, mask, attention, distance)
        out[rows] = attended.view(num_kv_heads, num_groups, tile.size, head_dim).permute(2, 0, 1, 3)


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    attention: Attention,
    distance: torch.Tensor | None,
) -> torch.Tensor:
    """query [B, K, Q, D], whose rows are those of one head of a group after another's; keys and values [B, K, L, D];
    mask and distance broadcast to [B, K, Q, L] → [B, K, Q, D]."""
    scale = attention.score_scale
    if attention.slopes is not None and distance is not None:
        mask = (mask - _of_rows(attention.slopes, query) * distance).to(query.dtype)
    if attention.softcap is None and attention.sinks is None:
        return scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    scores = query.float() @ keys.float().transpose(-1, -2) * scale
    if attention.softcap is not None:
        scores = torch.tanh(scores / attention.softcap) * attention.softcap
    scores = scores + mask.float()
    if attention.sinks is None:
        weights = scores.softmax(dim=-1)
    else:
        sinks = _of_rows(attention.sinks.float(), query).expand(*scores.shape[:-1], 1)
        weights = torch.cat((scores, sinks), dim=-1).softmax(dim=-1)[..., :-1]
    return (weights @ values.float()).to(query.dtype)


def _of_rows(of_heads: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """of_heads [num_heads] → [1, K, Q, 1]: what belongs to each of the query's rows."""
    num_kv_heads, rows = query.shape[1:3]
    groups = of_heads.view(num_kv_heads, -1)
    return groups.repeat_interleave(rows // groups.shape[1], dim=1)[None, :, :, None]
