"""FP8 as DeepSeek-V3 and Qwen3 publish it: weights in E4M3, with a scale for each block of 128 × 128.

weight [N, K] float8_e4m3fn, weight_scale_inv [⌈N / 128⌉, ⌈K / 128⌉] float32, which weights are multiplied with
"""

from typing import Any

import torch

from wherry_runtime.quantization.fp8 import dequantize_blocks
from wherry_runtime.quantization.layouts.base import Kind, Layout, Parts, UnsupportedLayoutError, setting


def _kinds(config: dict[str, Any]) -> tuple[Kind, ...]:
    setting(config, "fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    block = config.get("weight_block_size")
    if block not in (None, [128, 128]):
        raise UnsupportedLayoutError(f"weight_block_size {block} is not supported; [128, 128] is")

    def read(name: str) -> Any:
        def scaled(parts: Parts) -> torch.Tensor:
            return dequantize_blocks(parts["weight"], parts[name])

        return scaled

    names = ("weight_scale_inv", "weight_scale")
    return tuple(Kind((name, "weight"), read(name), unused=("input_scale", "activation_scale")) for name in names)


LAYOUT = Layout("fp8", _kinds)
