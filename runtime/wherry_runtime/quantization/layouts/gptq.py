"""GPTQ's layout, as AutoGPTQ and GPTQModel write it.

qweight [K · bits / 32, N] int32: codes along the inputs
qzeros  [G, N · bits / 32] int32: zero points along the outputs; one less in the first version of the format
scales  [G, N] float16
g_idx   [K] int32: the group of each input
"""

import re
from collections.abc import Sequence
from typing import Any

import torch

from wherry_runtime.quantization.bits import pack_bits, unpack_bits
from wherry_runtime.quantization.formats import Format
from wherry_runtime.quantization.grouped import Grouped, packed_format
from wherry_runtime.quantization.layouts.base import Kind, Layout, Parts, Writer, setting

BITS = (2, 3, 4, 8)
SECOND = "gptq_v2"


def _kinds(config: dict[str, Any]) -> tuple[Kind, ...]:
    bits: int = setting(config, "bits", BITS)
    less = 0 if setting(config, "checkpoint_format", ("gptq", SECOND), "gptq") == SECOND else 1
    size = config.get("group_size", -1)

    def parameters(parts: Parts) -> tuple[torch.Tensor, torch.Tensor, int, int, torch.Tensor | None]:
        scales = parts["scales"].T.contiguous()
        zeros = unpack_bits(parts["qzeros"], bits, scales.shape[0]).T.to(torch.int16) + less
        groups = parts["g_idx"].long() if "g_idx" in parts else None
        inputs = parts["qweight"].shape[0] * 32 // bits if groups is None else len(groups)
        group = size if isinstance(size, int) and size > 0 else inputs
        if groups is not None and torch.equal(groups, torch.arange(inputs) // group):
            groups = None
        return scales, zeros, inputs, group, groups

    def format_(parts: Parts) -> Format | None:
        scales, zeros, _, group, groups = parameters(parts)
        return packed_format(scales, zeros, bits, group, groups)

    def read(parts: Parts) -> Grouped:
        scales, zeros, inputs, group, groups = parameters(parts)
        return Grouped(unpack_bits(parts["qweight"].T.contiguous(), bits, inputs), scales, zeros, bits, group, groups)

    return (Kind(("qweight", "qzeros", "scales"), read, format_, optional=("g_idx",)),)


def _tensors(matrix: Grouped) -> dict[str, torch.Tensor]:
    # Zero points around the middle are written as the first version has them, which everybody reads.
    less = 1 if _symmetric(matrix) else 0
    width = matrix.shape[1]
    return {
        "qweight": pack_bits(matrix.codes, matrix.bits).T.contiguous(),
        "qzeros": pack_bits((matrix.zeros.T - less).contiguous(), matrix.bits),
        "scales": matrix.scales.half().T.contiguous(),
        "g_idx": (torch.arange(width) // matrix.group).to(torch.int32),
    }


def _symmetric(matrix: Grouped) -> bool:
    return bool((matrix.zeros == 1 << (matrix.bits - 1)).all())


def _config(settings: Any, kept: Sequence[str]) -> dict[str, Any]:
    # As GPTQModel has it; the head never is.
    dynamic: dict[str, Any] = {"dynamic": {f"-:^{re.escape(name)}$": {} for name in kept[1:]}} if kept[1:] else {}
    return {
        **dynamic,
        "quant_method": "gptq",
        "bits": settings.bits,
        "group_size": settings.group,
        "sym": settings.symmetric,
        "desc_act": False,  # groups lie side by side, whatever the order was in which columns were rounded
        "checkpoint_format": "gptq" if settings.symmetric else SECOND,
        "lm_head": False,
    }


LAYOUT = Layout("gptq", _kinds)
WRITER = Writer(_tensors, _config)
