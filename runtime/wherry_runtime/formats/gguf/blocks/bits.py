"""Taking fields out of blocks of bytes."""

from typing import Any

import numpy as np
import numpy.typing as npt

# What is in them is said by the names; the operations here have more types than annotations follow.
U8 = npt.NDArray[Any]
F32 = npt.NDArray[Any]


def split(blocks: U8, *sizes: int) -> list[U8]:
    """Columns of `blocks` [n, bytes], `sizes` bytes wide each; the last one takes what is left."""
    return np.split(blocks, np.cumsum(sizes).tolist(), axis=1)


def as_type(columns: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """The bytes [n, k] as little-endian numbers: [n, k / size]."""
    return np.ascontiguousarray(columns).view(dtype)


def half(columns: npt.NDArray[Any]) -> F32:
    """Scales in float16 [n, 2 k] → [n, k] float32."""
    return as_type(columns, "<f2").astype(np.float32)


def fields(words: npt.NDArray[Any], width: int, shifts: range | list[int]) -> npt.NDArray[Any]:
    """`width` bits of each of the words [...], at each of `shifts`: [..., shifts]."""
    dtype = words.dtype.type
    return (words[..., None] >> np.array(shifts, dtype)) & dtype((1 << width) - 1)


def planes(packed: U8, run: int, width: int) -> U8:
    """Fields of `width` bits that lie side by side in runs: [n, k] → [n, k * 8 / width].

    A run of `run` bytes has its elements 0 … run-1 in the lowest bits, the next `run` in those above, and so on.
    """
    runs = packed.reshape(len(packed), -1, run)
    out = np.empty((*runs.shape[:2], 8 // width, run), np.uint8)
    for i in range(8 // width):  # far faster than one shift by an array of shifts
        np.right_shift(runs, i * width, out=out[:, :, i])
    out &= (1 << width) - 1
    return out.reshape(len(packed), -1)


def packed_planes(q: U8, run: int, width: int) -> U8:
    """What `planes` takes apart, put together: [n, k] → [n, k * width / 8]."""
    fields_of_run = q.reshape(len(q), -1, 8 // width, run)
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    return np.asarray(np.bitwise_or.reduce(fields_of_run << shifts, axis=2).reshape(len(q), -1), np.uint8)


def half_bytes(d: F32) -> U8:
    """Scales [n, k] as float16: [n, 2 k] uint8."""
    return d.astype("<f2").view(np.uint8)
