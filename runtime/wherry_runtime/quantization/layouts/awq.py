"""AutoAWQ's layout for its matrix-matrix kernel: 4 bits with zero points.

qweight [K, N / 8] int32, qzeros [G, N / 8] int32: eight outputs in a word, the even ones before the odd ones
scales  [G, N] float16
"""

from collections.abc import Sequence
from typing import Any

import torch

from wherry_runtime.quantization.formats import Format
from wherry_runtime.quantization.grouped import Grouped, packed_format
from wherry_runtime.quantization.layouts.base import Kind, Layout, Parts, Writer, setting
from wherry_runtime.quantization.tensors import split

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output that each half byte of a word holds, lowest first


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """[R, N] → [R, N / 8] int32."""
    eights = split(codes.to(torch.int32), 1, (-1, 8))
    words = torch.zeros(eights.shape[:2], dtype=torch.int32)
    for place, output in enumerate(ORDER):
        words |= eights[..., output] << BITS * place
    return words


def _unpack(words: torch.Tensor) -> torch.Tensor:
    """[R, N / 8] int32 → [R, N] uint8."""
    eights = torch.empty(*words.shape, 8, dtype=torch.uint8)
    for place, output in enumerate(ORDER):
        eights[..., output] = (words >> BITS * place & 15).to(torch.uint8)
    return eights.flatten(1)


def _kinds(config: dict[str, Any]) -> tuple[Kind, ...]:
    setting(config, "bits", (BITS,))
    setting(config, "version", ("gemm", "GEMM"), "gemm")

    def parameters(parts: Parts) -> tuple[torch.Tensor, torch.Tensor, int]:
        scales = parts["scales"].T.contiguous()
        if "qzeros" in parts:
            zeros = _unpack(parts["qzeros"]).T.to(torch.int16).contiguous()
        else:
            zeros = torch.full(scales.shape, 8, dtype=torch.int16)
        return scales, zeros, parts["qweight"].shape[0] // scales.shape[1]

    def format_(parts: Parts) -> Format | None:
        scales, zeros, group = parameters(parts)
        return packed_format(scales, zeros, BITS, group, None)

    def read(parts: Parts) -> Grouped:
        scales, zeros, group = parameters(parts)
        return Grouped(_unpack(parts["qweight"]).T.contiguous(), scales, zeros, BITS, group)

    return (Kind(("qweight", "scales"), read, format_, optional=("qzeros",)),)


def fits(outputs: int, inputs: int, group: int) -> bool:
    """Whether a matrix can be written so: whole words, and whole groups."""
    return outputs % 8 == 0 and inputs % group == 0


def _tensors(matrix: Grouped) -> dict[str, torch.Tensor]:
    return {
        "qweight": _pack(matrix.codes.T),
        "qzeros": _pack(matrix.zeros.T),
        "scales": matrix.scales.half().T.contiguous(),
    }


def _config(settings: Any, kept: Sequence[str]) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "bits": BITS,
        "group_size": settings.group,
        "version": "gemm",
        "zero_point": True,
        "modules_to_not_convert": list(kept[1:]) or None,  # the head never is
    }


LAYOUT = Layout("awq", _kinds)
WRITER = Writer(_tensors, _config)
