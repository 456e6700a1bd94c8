"""Types whose elements stand alone: floats and whole numbers."""

from collections.abc import Callable

import numpy as np

from wherry_runtime.formats.gguf.blocks.bits import F32, U8, as_type

_DTYPES = {
    "F32": "<f4",
    "F16": "<f2",
    "F64": "<f8",
    "I8": "i1",
    "I16": "<i2",
    "I32": "<i4",
    "I64": "<i8",
}


def _plain(dtype: str) -> Callable[[U8], F32]:
    return lambda blocks: as_type(blocks, dtype).astype(np.float32)


def bf16(blocks: U8) -> F32:
    """bfloat16: the upper half of a float32."""
    return (as_type(blocks, "<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)


DEQUANTIZE = {**{name: _plain(dtype) for name, dtype in _DTYPES.items()}, "BF16": bf16}
