"""bitsandbytes' layout of 4-bit weights (NF4 and FP4 differ in their table, which is in the file).

weight                                [⌈N · K / 2⌉, 1] uint8
weight.absmax                         the largest magnitude of each block, float32; or uint8, quantized again, with
weight.nested_absmax, nested_quant_map  its own blocks and table, and an offset in the state
weight.quant_map                      [16] float32
weight.quant_state.bitsandbytes__nf4  JSON as uint8: blocksize, shape, nested_blocksize, nested_offset
"""

import json
from collections.abc import Sequence
from typing import Any

import torch

from wherry_runtime.quantization.layouts.base import Kind, Layout, Parts, UnsupportedLayoutError, Writer
from wherry_runtime.quantization.nf4 import BLOCK, NF4, VALUES, unpack_nf4

_STATE = "weight.quant_state.bitsandbytes__"


def _kinds(config: dict[str, Any]) -> tuple[Kind, ...]:
    if not config.get("load_in_4bit", config.get("_load_in_4bit")):
        raise UnsupportedLayoutError("bitsandbytes checkpoints are supported with load_in_4bit only (nf4, fp4)")
    tables = ("weight", "weight.absmax", "weight.quant_map")
    nested = ("weight.nested_absmax", "weight.nested_quant_map")
    return tuple(
        Kind((f"{_STATE}{name}", *tables), _reader(f"{_STATE}{name}"), optional=nested) for name in ("nf4", "fp4")
    )


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
