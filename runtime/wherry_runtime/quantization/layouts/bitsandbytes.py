"""bitsandbytes' layouts: 4-bit weights (NF4 and FP4 differ in their table, which is in the file), and int8 ones with
outliers of activations kept apart (LLM.int8, https://arxiv.org/abs/2208.07339).

weight        [N, K] int8
SCB           [N] float32: the largest magnitude of each row: w = weight · SCB / 127
weight_format uint8: 0: row by row, which is all that is written today

Scales are held in float16, if that is as near as float16 is: nearer than plain weights in bfloat16 would be.

weight                                [⌈N · K / 2⌉, 1] uint8
weight.absmax                         the largest magnitude of each block, float32; or uint8, quantized again, with
weight.nested_absmax, nested_quant_map  its own blocks and table, and an offset in the state
weight.quant_map                      [16] float32
weight.quant_state.bitsandbytes__nf4  JSON as uint8: blocksize, shape, nested_blocksize, nested_offset
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from wherry_runtime.quantization.formats import Format
from wherry_runtime.quantization.grouped import Grouped, packed_format
from wherry_runtime.quantization.layouts.base import Kind, Layout, Parts, UnsupportedLayoutError, Writer, setting
from wherry_runtime.quantization.nf4 import BLOCK, NF4, VALUES, unpack_nf4

THRESHOLD = 6.0  # of the paper, section 3.2
FLOAT16_ERROR = 2.0**-11  # relative, of what is not too small for it
_STATE = "weight.quant_state.bitsandbytes__"


def _kinds(config: dict[str, Any]) -> tuple[Kind, ...]:
    if config.get("load_in_8bit", config.get("_load_in_8bit")):
        return (_int8_kind(config),)
    if not config.get("load_in_4bit", config.get("_load_in_4bit")):
        raise UnsupportedLayoutError("bitsandbytes checkpoints are supported with load_in_4bit or load_in_8bit")
    tables = ("weight", "weight.absmax", "weight.quant_map")
    nested = ("weight.nested_absmax", "weight.nested_quant_map")
    return tuple(
        Kind((f"{_STATE}{name}", *tables), _reader(f"{_STATE}{name}"), optional=nested) for name in ("nf4", "fp4")
    )


def _int8_kind(config: dict[str, Any]) -> Kind:
    setting(config, "llm_int8_has_fp16_weight", (False,), False)
    threshold = config.get("llm_int8_threshold", THRESHOLD)
    if not isinstance(threshold, int | float) or threshold < 0:
        raise UnsupportedLayoutError(f"llm_int8_threshold {threshold!r} is not supported; a magnitude or 0 is")

    def scales(parts: Parts) -> torch.Tensor:
        exact = (parts["SCB"].float() / 127).unsqueeze(-1)
        near = exact.half().float()
        return near if bool(((near - exact).abs() <= FLOAT16_ERROR * exact).all()) else exact

    def format_(parts: Parts) -> Format | None:
        wide = scales(parts)
        found = packed_format(wide, torch.full(wide.shape, 128), 8, parts["weight"].shape[1], None)
        return found and replace(found, outliers=float(threshold))

    def read(parts: Parts) -> Grouped:
        weight, wide = parts["weight"], scales(parts)
        if weight.dtype is not torch.int8 or ("weight_format" in parts and int(parts["weight_format"])):
            raise ValueError("weights are no int8 ones, row by row")
        codes, zeros = (weight.to(torch.int16) + 128).to(torch.uint8), torch.full(wide.shape, 128, dtype=torch.int16)
        return Grouped(codes, wide, zeros, 8, weight.shape[1])

    return Kind(("SCB", "weight"), read, format_, optional=("weight_format",))


def _reader(state_name: str) -> Any:
    def read(parts: Parts) -> torch.Tensor:
        state = json.loads(bytes(parts[state_name].tolist()))
        largest = parts["weight.absmax"]
        if "weight.nested_absmax" in parts:
            table, outer = parts["weight.nested_quant_map"], parts["weight.nested_absmax"]
            outer = outer.repeat_interleave(int(state["nested_blocksize"]))[: largest.numel()]
            largest = table.float()[largest.long()] * outer + float(state["nested_offset"])
        shape = tuple(int(size) for size in state["shape"])
        return unpack_nf4(parts["weight"], largest, parts["weight.quant_map"], int(state["blocksize"]), shape)

    return read


def _tensors(matrix: NF4) -> dict[str, torch.Tensor]:
    state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": list(matrix.shape)}
    return {
        "weight": matrix.packed.unsqueeze(-1),
        "weight.absmax": matrix.largest,
        "weight.quant_map": VALUES.clone(),
        f"{_STATE}nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def _int8_tensors(matrix: Grouped) -> dict[str, torch.Tensor]:
    return {
        "weight": (matrix.codes.to(torch.int16) - 128).to(torch.int8),
        "SCB": matrix.scales.float().flatten() * 127,
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def _int8_config(settings: Any, kept: Sequence[str]) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": False,
        "load_in_8bit": True,
        "llm_int8_threshold": settings.outliers,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_skip_modules": list(kept),
    }


def _config(settings: Any, kept: Sequence[str]) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": list(kept),
    }


LAYOUT = Layout("bitsandbytes", _kinds)
WRITER = Writer(_tensors, _config)
INT8 = Writer(_int8_tensors, _int8_config)
