"""What each format does to rows of a matrix, behind one interface."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from wherry_runtime.quantization import floats, int4, int8, super_blocks, ternary
from wherry_runtime.quantization.formats import PANEL, Format, Method

Quantized = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Packing:
    """A format's pure functions. Codes are [N, Kp], N a multiple of 64: int8, or floats as they are."""

    dtype: torch.dtype  # of the packed elements
    pack: Callable[[torch.Tensor], torch.Tensor]
    unpack: Callable[[torch.Tensor], torch.Tensor]
    shape: Callable[[int, int], tuple[int, ...]]  # of the packed elements: panels, Kp → shape
    zero: int  # the byte that memory of zero weights is made of
    quantize: Callable[[torch.Tensor, int], Quantized] | None = None  # [N, Kp] float32, group → codes, scales


_K_BITS: dict[Method, int] = {"k4": 4, "k5": 5, "k6": 6}


def _two_level(bits: int) -> Packing:
    words = 8 if bits == 5 else 4  # inputs whose bits lie together
    return Packing(
        torch.uint8,
        lambda codes: super_blocks.pack(codes, bits),
        lambda data: super_blocks.unpack(data, bits),
        lambda panels, depth: (panels, depth // words, PANEL * words * bits // 8),
        0,
    )


PACKINGS: dict[Method, Packing] = {
    "float32": Packing(
        torch.float32, floats.pack_float32, floats.unpack_float32, lambda panels, depth: (panels, depth, PANEL), 0
    ),
    "bfloat16": Packing(
        *(torch.bfloat16, floats.pack_bfloat16, floats.unpack_bfloat16),
        *(lambda panels, depth: (panels, depth // 2, PANEL, 2), 0),
    ),
    "int8": Packing(
        *(torch.uint8, int8.pack, int8.unpack, lambda panels, depth: (panels, depth // 4, PANEL, 4), 128),
        quantize=int8.quantize,
    ),
    "int4": Packing(
        *(torch.uint8, int4.pack, int4.unpack, lambda panels, depth: (panels, depth // 4, PANEL // 2, 4), 0x88),
        quantize=int4.quantize,
    ),
    **{method: _two_level(bits) for method, bits in _K_BITS.items()},
    "ternary": Packing(
        *(torch.uint8, ternary.pack, ternary.unpack),
        *(lambda panels, depth: (panels, depth, ternary.PANEL_BYTES), 121),
    ),
}


def quantize(rows: torch.Tensor, format_: Format) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[N, Kp] of any float dtype → codes, and scales [N, Kp / group] float16 where the format has them."""
    method = PACKINGS[format_.method]
    if method.quantize is None:
        return rows.to(method.dtype), None
    return method.quantize(rows.float(), format_.group)
