"""Scaled dot-product attention over paged keys and values, in plain PyTorch: the reference of every other kernel.

Grouped queries (Ainslie et al., 2023, https://arxiv.org/abs/2305.13245) are folded into query rows: the G heads that
share a key head become G rows of one matrix, so keys are never repeated in memory.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

from wherry_runtime.attention.metadata import AttentionMetadata, DecodeGroup, Prefill


def paged_attention(
    query: torch.Tensor, cache: torch.Tensor, num_kv_heads: int, metadata: AttentionMetadata
) -> torch.Tensor:
    """Attends each row of the step to its own sequence.

    Args:
        query: [T, num_heads, head_dim].
        cache: [num_blocks, block_size, 2 * num_kv_heads, head_dim], with the step's own keys and values written.
        num_kv_heads: key heads; num_heads is a multiple.
        metadata: of the step.

    Returns:
        [T, num_heads * head_dim] in the query's dtype.
    """
    num_tokens, num_heads, head_dim = query.shape
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    grouped = query.view(num_tokens, num_kv_heads, -1, head_dim)
    grouped_out = out.view(num_tokens, num_kv_heads, -1, head_dim)
    flat = cache.view(cache.shape[0], -1)
    for group in metadata.decodes:
        rows = slice(group.first, group.first + group.size)
        grouped_out[rows] = _decode(grouped[rows], flat, head_dim, group)
    for prefill in metadata.prefills:
        _prefill(grouped, grouped_out, flat, prefill)
    return out.view(num_tokens, num_heads * head_dim)


def _decode(query: torch.Tensor, flat: torch.Tensor, head_dim: int, group: DecodeGroup) -> torch.Tensor:
    """query [B, K, G, D] → [B, K, G, D]."""
    num_kv_heads, num_groups = query.shape[1:3]
    pages = flat.index_select(0, group.blocks).view(group.size, -1, 2 * num_kv_heads, head_dim).transpose(1, 2)
    # Expanded, not broadcast: PyTorch's CPU flash kernel is chosen for masks with full query rows.
    mask = group.mask.expand(-1, -1, num_groups, -1)
    return scaled_dot_product_attention(query, pages[:, :num_kv_heads], pages[:, num_kv_heads:], attn_mask=mask)


def _prefill(grouped: torch.Tensor, out: torch.Tensor, flat: torch.Tensor, prefill: Prefill) -> None:
    """grouped, out [T, K, G, D]; writes the rows of `prefill`."""
    num_kv_heads, num_groups, head_dim = grouped.shape[1:]
    pages = flat.index_select(0, prefill.blocks).view(-1, 2 * num_kv_heads, head_dim).transpose(0, 1).unsqueeze(0)
    for tile in prefill.tiles:
        rows = slice(tile.first, tile.first + tile.size)
        keys = pages[:, :num_kv_heads, tile.low : tile.high]
        values = pages[:, num_kv_heads:, tile.low : tile.high]
        # [n, K, G, D] → [1, K, G·n, D]: the rows of one group after those of another, so the mask repeats.
        query = grouped[rows].permute(1, 2, 0, 3).reshape(1, num_kv_heads, num_groups * tile.size, head_dim)
        mask = tile.mask.repeat(num_groups, 1)[None, None]
        attended = scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        out[rows] = attended.view(num_kv_heads, num_groups, tile.size, head_dim).permute(2, 0, 1, 3)
