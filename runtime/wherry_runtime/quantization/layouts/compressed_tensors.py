"""The layouts of the compressed-tensors library: packed whole numbers, int8, FP8 (E4M3) and MXFP4.

What a matrix is can be told from its tensors, so which settings in config.json are whose, as they may differ from
matrix to matrix, need not be looked through. All that is taken from there is how large groups may be, as the last one
of a matrix may be cut.

    pack-quantized        weight_packed [N, ⌈K · bits / 32⌉] int32, weight_scale [N, G], weight_shape [2], perhaps
                          weight_zero_point [⌈N · bits / 32⌉, G] int32 and weight_g_idx [K]; codes are q + 2^(bits - 1)
    int-quantized         weight [N, K] int8, weight_scale [N, G] or [1]
    float-quantized       weight [N, K] float8_e4m3fn, weight_scale [N, G] or [1]
    mxfp4-pack-quantized  weight_packed [N, K / 2] uint8, weight_scale [N, K / 32] uint8: 2^(e - 127)
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from wherry_runtime.quantization.bits import pack_bits, unpack_bits
from wherry_runtime.quantization.formats import Format
from wherry_runtime.quantization.fp4 import MXFP4, unpack_mxfp4
from wherry_runtime.quantization.fp8 import Scaled, dequantize_blocks
from wherry_runtime.quantization.grouped import Grouped, packed_format
from wherry_runtime.quantization.layouts.base import Kind, Layout, Parts, Writer, setting

FORMATS = (
    *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mxfp4-pack-quantized"),
    "mixed-precision",
)


def _kinds(config: dict[str, Any]) -> tuple[Kind, ...]:
    setting(config, "format", FORMATS)
    setting(config, "quantization_status", ("compressed", "frozen"), "compressed")
    activations = ("input_scale", "input_zero_point", "output_scale")
    sizes = _group_sizes(config)
    packed = Kind(
        *(("weight_packed", "weight_scale"), partial(_read_packed, sizes), partial(_packed_format, sizes)),
        *(("weight_shape", "weight_zero_point", "weight_g_idx"), activations),
    )
    of_whole = (("weight", "weight_scale"), partial(_read_whole, sizes), partial(_whole_format, sizes))
    whole = Kind(*of_whole, ("weight_zero_point",), activations)
    return packed, whole


def _group_sizes(config: dict[str, Any]) -> set[int]:
    schemes = config.get("config_groups")
    weights = [s.get("weights") for s in schemes.values() if isinstance(s, dict)] if isinstance(schemes, dict) else []
    sizes = {w.get("group_size") for w in weights if isinstance(w, dict)}
    return {size for size in sizes if isinstance(size, int) and size > 0}


def _group(sizes: set[int], inputs: int, count: int) -> int:
    """Inputs that share a scale, where there are so many scales."""
    return next((size for size in sorted(sizes) if -(-inputs // size) == count), -(-inputs // count))


def _packed_params(
    sizes: set[int], parts: Parts
) -> tuple[torch.Tensor, torch.Tensor, int, int, int, torch.Tensor | None]:
    """Scales, zero points, bits, inputs, group, and the inputs' groups where they do not lie side by side."""
    packed, scales = parts["weight_packed"], parts["weight_scale"]
    outputs, inputs = (int(size) for size in parts["weight_shape"])
    bits = packed.shape[1] * 32 // inputs
    middle = 1 << (bits - 1)
    group = _group(sizes, inputs, scales.shape[1])
    if "weight_zero_point" in parts:
        zeros = unpack_bits(parts["weight_zero_point"].T.contiguous(), bits, outputs).T.to(torch.int16)
    else:
        zeros = torch.full(scales.shape, middle, dtype=torch.int16)
    groups = parts["weight_g_idx"].long() if "weight_g_idx" in parts else None
    return scales, zeros, bits, inputs, group, groups


def _read_packed(sizes: set[int], parts: Parts) -> Grouped | torch.Tensor:
    if parts["weight_packed"].dtype is torch.uint8:
        return unpack_mxfp4(parts["weight_packed"], parts["weight_scale"]).float()
    scales, zeros, bits, inputs, group, groups = _packed_params(sizes, parts)
    return Grouped(unpack_bits(parts["weight_packed"], bits, inputs), scales, zeros, bits, group, groups)


def _packed_format(sizes: set[int], parts: Parts) -> Format | None:
    if parts["weight_packed"].dtype is torch.uint8:
        return None
    scales, zeros, bits, _, group, groups = _packed_params(sizes, parts)
    return packed_format(scales, zeros, bits, group, groups)


def _int8_params(sizes: set[int], parts: Parts) -> tuple[torch.Tensor, torch.Tensor, int]:
    outputs, inputs = parts["weight"].shape
    scales = parts["weight_scale"].reshape(-1, 1) if parts["weight_scale"].dim() < 2 else parts["weight_scale"]
    scales = scales.expand(outputs, -1)
    zeros = torch.full(scales.shape, 128, dtype=torch.int16)
    if "weight_zero_point" in parts:
        zeros = zeros + parts["weight_zero_point"].reshape(-1, scales.shape[1]).to(torch.int16)
    return scales, zeros, _group(sizes, inputs, scales.shape[1])


def _read_whole(sizes: set[int], parts: Parts) -> Grouped | torch.Tensor:
    weight = parts["weight"]
    if weight.dtype is torch.float8_e4m3fn:
        return dequantize_blocks(weight, parts["weight_scale"])
    if weight.dtype is not torch.int8:
        raise ValueError(f"weights of {weight.dtype} have scales; int8 and float8_e4m3fn may")
    scales, zeros, group = _int8_params(sizes, parts)
    return Grouped((weight.to(torch.int16) + 128).to(torch.uint8), scales, zeros, 8, group)


def _whole_format(sizes: set[int], parts: Parts) -> Format | None:
    if parts["weight"].dtype is not torch.int8:
        return None
    scales, zeros, group = _int8_params(sizes, parts)
    return packed_format(scales, zeros, 8, group, None)


def _scheme(
    format_: str, kept: Sequence[str], weights: dict[str, Any], activations: dict[str, Any] | None = None
) -> dict[str, Any]:
    return _schemes(format_, kept, [(["Linear"], weights)], activations)


def _schemes(
    format_: str,
    kept: Sequence[str],
    groups: list[tuple[list[str], dict[str, Any]]],
    activations: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Of several kinds of matrices, each with what it is for."""
    found = {
        f"group_{i}": {
            "targets": targets,
            "weights": {"dynamic": False, **weights},
            "input_activations": activations,
        }
        for i, (targets, weights) in enumerate(groups)
    }
    return {
        "quant_method": "compressed-tensors",
        "format": format_,
        "quantization_status": "compressed",
        "config_groups": found,
        "ignore": list(kept),
    }


def _by_token(kind: str) -> dict[str, Any]:
    """Activations in 8 bits, scaled as they come."""
    return {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}


def _packed_tensors(matrix: Grouped) -> dict[str, torch.Tensor]:
    return {
        "weight_packed": pack_bits(matrix.codes, matrix.bits),
        "weight_scale": matrix.scales.half().contiguous(),
        "weight_shape": torch.tensor(matrix.shape),
    }


def _packed_weights(settings: Any) -> dict[str, Any]:
    weights = {"num_bits": settings.bits, "type": "int", "symmetric": True}
    return {**weights, "strategy": "group", "group_size": settings.group}


def _packed_config(settings: Any, kept: Sequence[str]) -> dict[str, Any]:
    return _scheme("pack-quantized", kept, _packed_weights(settings))


def _packed_mixed(settings: Mapping[str, Any], kept: Sequence[str]) -> dict[str, Any]:
    groups: dict[tuple[int, int], list[str]] = {}
    for name, own in settings.items():
        groups.setdefault((own.bits, own.group), []).append(name)
    of = [(names, _packed_weights(settings[names[0]])) for _, names in sorted(groups.items())]
    return _schemes("pack-quantized", kept, of)


def _int8_tensors(matrix: Grouped) -> dict[str, torch.Tensor]:
    codes = (matrix.codes.to(torch.int16) - 128).to(torch.int8)
    return {"weight": codes, "weight_scale": matrix.scales.half().contiguous()}


def _int8_config(settings: Any, kept: Sequence[str]) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    return _scheme("int-quantized", kept, weights, _by_token("int"))


def _fp8_tensors(matrix: Scaled) -> dict[str, torch.Tensor]:
    return {"weight": matrix.values, "weight_scale": matrix.scales}


def _fp8_config(settings: Any, kept: Sequence[str]) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
    return _scheme("float-quantized", kept, weights, _by_token("float"))


def _mxfp4_tensors(matrix: MXFP4) -> dict[str, torch.Tensor]:
    return {"weight_packed": matrix.packed, "weight_scale": matrix.exponents}


def _mxfp4_config(settings: Any, kept: Sequence[str]) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32}
    return _scheme("mxfp4-pack-quantized", kept, {**weights, "scale_dtype": "torch.uint8"})


LAYOUT = Layout("compressed-tensors", _kinds)
PACKED = Writer(_packed_tensors, _packed_config, _packed_mixed)
INT8 = Writer(_int8_tensors, _int8_config)
FP8 = Writer(_fp8_tensors, _fp8_config)
MX = Writer(_mxfp4_tensors, _mxfp4_config)
