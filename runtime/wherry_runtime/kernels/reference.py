"""What each native kernel computes, in plain PyTorch: what parity tests compare with. Sampling's is engine/sampling.py.

Everything in float32, or in the type of what is handed in: float64 shows how far a kernel is from the truth.
"""

import torch
from torch.nn import functional

from wherry_runtime.kvcache.formats import KVFormat, decode, encode


def embed(table: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """table [V, H], token_ids [T] → [T, H] float32."""
    return table.index_select(0, token_ids).float()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., width] → the same shape."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight


def silu_mul(x: torch.Tensor) -> torch.Tensor:
    """x [T, 2 I], gate before up → [T, I]."""
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate) * up


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [T, heads, D] in the half-split layout; cos, sin [T, D / 2]."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def as_kept(x: torch.Tensor, stored: KVFormat) -> torch.Tensor:
    """What a cache gives back for x [..., head_dim]."""
    return decode(encode(x, stored), stored, x.dtype)


def attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: int,
    window: int | None,
    softcap: float | None = None,
    slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """One sequence.

    Args:
        query: [T, H, D], at positions start … start + T - 1.
        keys: [start + T, KV, D], from position 0 on.
        values: the same shape.
        start: positions before the first query.
        window: how many keys back a query sees, itself included; None: all.
        softcap: scores become c · tanh(score / c).
        slopes: [H]; what scores lose for each token of distance.

    Returns:
        [T, H * D].
    """
    num_rows, num_heads, head_dim = query.shape
    group = num_heads // keys.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    distance = torch.arange(start, start + num_rows)[:, None] - torch.arange(keys.shape[0])[None, :]
    hidden = (distance < 0) | (distance >= window) if window else distance < 0
    scores = torch.einsum("thd,khd->htk", query, keys) * head_dim**-0.5
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if slopes is not None:
        scores = scores - slopes[:, None, None] * distance
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    return torch.einsum("htk,khd->thd", weights, values).reshape(num_rows, -1)
