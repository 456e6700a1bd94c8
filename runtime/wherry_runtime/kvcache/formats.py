"""The types that keys and values are kept in.

fp8 is E4M3 (Micikevicius et al., 2022, https://arxiv.org/abs/2209.05433) without a scale, saturating at 448. int8 has a
scale for each token and head: absmax / 127.
"""

from dataclasses import dataclass

import torch

from wherry_runtime.loading.errors import ModelError

FP8_MOST = 448.0
SCALE_BYTES = 4


@dataclass(slots=True, frozen=True)
class KVFormat:
    """A type of cache.

    `native` is its number in kernels/cpu/src/kv.h; None: the native kernels have none such.
    """

    name: str
    element: torch.dtype
    native: int | None
    scaled: bool = False  # a float32 scale per token and head, behind the elements

    @property
    def quantized(self) -> bool:
        return self.element.itemsize == 1

    def width(self, head_dim: int) -> int:
        """Elements that one token's head takes in a `PagedKVCache`."""
        return head_dim + (SCALE_BYTES if self.scaled else 0)


FORMATS = {
    f.name: f
    for f in (
        KVFormat("float32", torch.float32, 0),
        KVFormat("bfloat16", torch.bfloat16, 1),
        KVFormat("float16", torch.float16, None),
        KVFormat("fp8", torch.float8_e4m3fn, 2),
        KVFormat("int8", torch.int8, 3, scaled=True),
    )
}
_BY_DTYPE = {f.element: f for f in FORMATS.values()}


def choose_format(kv_cache_dtype: str, model_dtype: torch.dtype) -> KVFormat:
    """`auto` keeps what the model computes in; else one of FORMATS by name.

    Raises:
        ModelError: bad_setting, for an unknown name.
    """
    if kv_cache_dtype == "auto":
        return _BY_DTYPE[model_dtype]
    if kv_cache_dtype not in FORMATS:
        raise ModelError(
            "bad_setting", f"kv_cache_dtype {kv_cache_dtype!r}: choose auto or one of {', '.join(FORMATS)}"
        )
    return FORMATS[kv_cache_dtype]


def format_of(stored: KVFormat | torch.dtype) -> KVFormat:
    """The format that keeps elements of `stored`."""
    return stored if isinstance(stored, KVFormat) else _BY_DTYPE[stored]


def encode(x: torch.Tensor, stored: KVFormat) -> torch.Tensor:
    """x [..., head_dim] of any float type → [..., stored.width(head_dim)] of stored.element."""
    if not stored.quantized:
        return x.to(stored.element)
    wide = x.float()
    if not stored.scaled:
        # A conversion alone would make NaN of what is too large.
        return wide.clamp(-FP8_MOST, FP8_MOST).to(stored.element)
    scale = wide.abs().amax(dim=-1, keepdim=True) / 127
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    codes = torch.nan_to_num(wide * inverse).round().clamp(-127, 127).to(torch.int8)
    # What is not finite must stay so for whoever looks at this token.
    scale = torch.where(torch.isfinite(scale), scale, torch.full_like(scale, float("nan")))
    return torch.cat((codes, scale.view(torch.int8)), dim=-1)


def decode(x: torch.Tensor, stored: KVFormat, dtype: torch.dtype) -> torch.Tensor:
    """Undoes `encode`: [..., stored.width(head_dim)] → [..., head_dim] of `dtype`."""
    if not stored.scaled:
        return x.to(dtype)
    codes, scale = x[..., :-SCALE_BYTES], x[..., -SCALE_BYTES:].contiguous().view(torch.float32)
    return (codes.float() * scale).to(dtype)
