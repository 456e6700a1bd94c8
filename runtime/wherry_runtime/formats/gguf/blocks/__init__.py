"""Every ggml type's blocks as float32. Each has a function from blocks [n, bytes] uint8 to [n, elements] float32."""

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from wherry_runtime.formats.gguf.blocks import floats, fours, grids, integers, k_quants, ternary
from wherry_runtime.formats.gguf.types import GGMLType

Blocks = npt.NDArray[np.uint8]
Values = npt.NDArray[np.float32]

DEQUANTIZE: dict[str, Callable[[Blocks], Values]] = {
    **floats.DEQUANTIZE,
    **integers.DEQUANTIZE,
    **k_quants.DEQUANTIZE,
    **grids.DEQUANTIZE,
    **fours.DEQUANTIZE,
    **ternary.DEQUANTIZE,
}
PIECE = 1 << 20  # elements that are computed at once, so that what is in between stays small


def dequantize(raw: Blocks, kind: GGMLType) -> Values:
    """The elements of `raw`, whole blocks of `kind`: [elements] float32, bit for bit what llama.cpp computes.

    float64 and int64 are rounded to float32.
    """
    out = np.empty(raw.size // kind.size * kind.block, np.float32)
    done = 0
    for piece in dequantized_pieces(raw, kind):
        out[done : done + piece.size] = piece
        done += piece.size
    return out


def dequantized_pieces(raw: Blocks, kind: GGMLType) -> Iterator[Values]:
    """The same in pieces of about a million elements."""
    blocks = raw.reshape(-1, kind.size)
    step = max(1, PIECE // kind.block)
    for start in range(0, len(blocks), step):
        # Scales of damaged or hostile files are anything, infinities too: what comes of them is a value like others.
        with np.errstate(all="ignore"):
            yield DEQUANTIZE[kind.name](np.ascontiguousarray(blocks[start : start + step])).ravel()
