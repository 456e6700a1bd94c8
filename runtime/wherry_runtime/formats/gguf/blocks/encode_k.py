"""K-quants from float32: for each group the scale (and minimum) whose rounding has the least weighted square error.

For a number of candidate steps the group is rounded, and the scale and minimum that then fit best are solved for; the
best candidate stays. Larger weights count for more. Then the groups' scales are rounded themselves, and the elements
once more with what came of that. The method is that of ggml (https://github.com/ggml-org/llama.cpp/pull/1684).
"""

import numpy as np

from wherry_runtime.formats.gguf.blocks.bits import F32, U8, half_bytes, packed_planes

_GROUPS = 8  # of 32 elements, in Q4_K and Q5_K
_NOTHING = np.float32(1e-15)  # groups whose largest element is below are zero


def _dot(a: F32, b: F32) -> F32:
    return np.einsum("...i,...i->...", a, b)[..., None]


def _ratio(a: F32, b: F32) -> F32:
    """a / b, and 0 where b is 0."""
    return np.divide(a, b, out=np.zeros_like(a), where=b != 0)


def _affine_fit(x: F32, levels: int, candidates: F32) -> tuple[F32, F32]:
    """Scale and minimum of each group: x ≈ scale q - minimum, q in 0 … levels, neither negative.

    Args:
        x: [groups, elements]
        candidates: how many levels more or less the range is divided into.

    Returns: two of [groups, 1].
    """
    weight = np.sqrt((x * x).mean(axis=-1, keepdims=True)) + np.abs(x)
    low = np.minimum(x.min(axis=-1, keepdims=True), 0)
    span = x.max(axis=-1, keepdims=True) - low
    wx = weight * x
    sum_w, sum_x = weight.sum(axis=-1, keepdims=True), wx.sum(axis=-1, keepdims=True)
    scale, least = span / levels, low
    q = np.rint(_ratio(np.float32(levels) * (x - low), span)).clip(0, levels)
    best = _dot(weight, (scale * q + least - x) ** 2)
    for candidate in candidates:
        q = np.rint(_ratio((levels + candidate) * (x - low), span)).clip(0, levels)
        wq = weight * q
        sum_q, sum_qq, sum_xq = wq.sum(axis=-1, keepdims=True), _dot(wq, q), _dot(wx, q)
        det = sum_w * sum_qq - sum_q * sum_q
        this_scale = _ratio(sum_w * sum_xq - sum_x * sum_q, det)
        this_least = _ratio(sum_qq * sum_x - sum_q * sum_xq, det)
        this_scale = np.where(this_least > 0, _ratio(sum_xq, sum_qq), this_scale)
        this_least = np.minimum(this_least, 0)
        error = _dot(weight, (this_scale * q + this_least - x) ** 2)
        better = (det > 0) & (error < best)
        best = np.where(better, error, best)
        scale, least = np.where(better, this_scale, scale), np.where(better, this_least, least)
    return scale, -least


def _affine_blocks(values: F32, levels: int, candidates: F32) -> tuple[U8, U8]:
    """(d, dmin and the packed scales [n, 16], q [n, 256]) of Q4_K and Q5_K."""
    x = values.reshape(-1, _GROUPS, 32)
    scale, least = (part[..., 0] for part in _affine_fit(x, levels, candidates))
    packed, steps = [], []
    for part in (scale, least):
        d = (part.max(axis=1, keepdims=True) / 63).astype(np.float16).astype(np.float32)
        rounded = np.rint(_ratio(part, np.broadcast_to(d, part.shape))).clip(0, 63)
        packed.append((half_bytes(d), rounded.astype(np.uint8)))
        steps.append((d * rounded)[..., None])
    step, minimum = steps
    q = np.rint(_ratio(x + minimum, np.broadcast_to(step, x.shape))).clip(0, levels)
    (d_bytes, s), (dmin_bytes, m) = packed
    first = np.concatenate([s[:, :4] | (s[:, 4:] >> 4 << 6), m[:, :4] | (m[:, 4:] >> 4 << 6)], axis=1)
    second = (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)
    return np.concatenate([d_bytes, dmin_bytes, first, second], axis=1), q.astype(np.uint8).reshape(len(x), -1)


def q4_k(values: F32) -> U8:
    """[n, 256] → [n, 144]."""
    head, q = _affine_blocks(values, 15, np.arange(-10, 11, dtype=np.float32) / 10)
    return np.concatenate([head, packed_planes(q, 32, 4)], axis=1)


def q5_k(values: F32) -> U8:
    """[n, 256] → [n, 176]."""
    head, q = _affine_blocks(values, 31, np.arange(-5, 11, dtype=np.float32) / 10)
    return np.concatenate([head, packed_planes(q >> 4, 32, 1), packed_planes(q & 15, 32, 4)], axis=1)


def _signed_fit(x: F32) -> F32:
    """The scale of each group of Q6_K: x ≈ scale q, q in -32 … 31. [groups, elements] → [groups, 1]."""
    weight = x * x
    extreme = np.take_along_axis(x, np.abs(x).argmax(axis=-1, keepdims=True), axis=-1)
    scale, best = np.zeros_like(extreme), np.full_like(extreme, -1)
    for tenths in (0, *range(-9, 0), *range(1, 10)):
        q = np.rint(_ratio(-(32 + np.float32(tenths) / 10) * x, np.broadcast_to(extreme, x.shape))).clip(-32, 31)
        sum_xq, sum_qq = _dot(weight * x, q), _dot(weight * q, q)
        gain = _ratio(sum_xq * sum_xq, sum_qq)  # what the fit takes away from the error
        better = gain > best
        best = np.where(better, gain, best)
        scale = np.where(better, _ratio(sum_xq, sum_qq), scale)
    return np.where(np.abs(extreme) < _NOTHING, np.float32(0), scale)


def q6_k(values: F32) -> U8:
    """[n, 256] → [n, 210]."""
    x = values.reshape(-1, 16, 16)
    scale = _signed_fit(x)[..., 0]
    extreme = np.take_along_axis(scale, np.abs(scale).argmax(axis=1, keepdims=True), axis=1)
    d = (extreme / -128).astype(np.float16).astype(np.float32)
    rounded = np.rint(_ratio(scale, np.broadcast_to(d, scale.shape))).clip(-128, 127)
    step = (d * rounded)[..., None]
    q = (np.rint(_ratio(x, np.broadcast_to(step, x.shape))).clip(-32, 31) + 32).astype(np.uint8).reshape(len(x), -1)
    scales = rounded.astype(np.int8).view(np.uint8)
    return np.concatenate([packed_planes(q & 15, 64, 4), packed_planes(q >> 4, 32, 2), scales, half_bytes(d)], axis=1)
