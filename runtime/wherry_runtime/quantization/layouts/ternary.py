"""Ternary weights: five in a byte, as Wherry writes them, and four in a byte, as transformers has BitNet's.

ternary  weight_trits [N, ⌈K / 5⌉] uint8 in base 3, weight_scale [1] float16, weight_shape [2]
bitnet   weight [N / 4, K] uint8: row r holds rows r, r + N / 4, … in two bits each, plus one; weight_scale [1], by
         which `bitlinear` divides and `autobitlinear` multiplies
"""

from typing import Any

import torch

from wherry_runtime.quantization.formats import Format
from wherry_runtime.quantization.grouped import Grouped
from wherry_runtime.quantization.layouts.base import Kind, Layout, Parts, Writer, setting
from wherry_runtime.quantization.ternary import made, pack_trits, unpack_trits


def _format(parts: Parts) -> Format | None:
    scale = parts["weight_scale"].float()
    return Format("int4", 128) if torch.equal(scale.half().float(), scale) else None


def _read(parts: Parts) -> Grouped:
    rows, width = (int(size) for size in parts["weight_shape"])
    packed = parts["weight_trits"]
    if packed.shape[0] != rows:
        raise ValueError(f"{packed.shape[0]} rows are not the {rows} of its shape")
    return made(unpack_trits(packed, width), parts["weight_scale"])


def _kinds(config: dict[str, Any]) -> tuple[Kind, ...]:
    return (Kind(("weight_trits", "weight_scale", "weight_shape"), _read, _format, ternary=True),)


def _bitnet_kinds(config: dict[str, Any]) -> tuple[Kind, ...]:
    setting(config, "quantization_mode", ("offline",), "offline")
    setting(config, "use_rms_norm", (False,), False)
    divides = setting(config, "linear_class", ("bitlinear", "autobitlinear"), "bitlinear") == "bitlinear"

    def read(parts: Parts) -> Grouped:
        packed, scale = parts["weight"], parts["weight_scale"].float()
        codes = torch.cat([packed >> 2 * i & 3 for i in range(4)])
        if packed.dtype is not torch.uint8 or int(codes.max()) > 2:
            raise ValueError("weights are no ternary ones, four in a byte")
        return made(codes.to(torch.int8) - 1, 1 / scale if divides else scale)

    def format_(parts: Parts) -> Format | None:
        scale = parts["weight_scale"].float()
        return _format({"weight_scale": 1 / scale if divides else scale})

    return (Kind(("weight_scale", "weight"), read, format_, ternary=True),)


def _tensors(matrix: Grouped) -> dict[str, torch.Tensor]:
    return {
        "weight_trits": pack_trits(matrix.codes.to(torch.int8) - 1),
        "weight_scale": matrix.scales[0].half().contiguous(),
        "weight_shape": torch.tensor(matrix.shape),
    }


LAYOUTS = (Layout("ternary", _kinds), Layout("bitnet", _bitnet_kinds))
WRITER = Writer(_tensors, lambda settings, kept: {"quant_method": "ternary"})
