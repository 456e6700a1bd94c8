"""What the native sampling kernels read and work in; kernels/cpu/src/sample*.cpp describe their operands.

The order of calls is argmax, sample_filter, sample_draw, all on one scratch; rows of temperature 0 keep argmax's token.
Penalties, bias and minimum lengths are applied to the logits before, by engine/sampling.py.
"""

import numpy as np
import torch

PARAMS = np.dtype(
    [
        ("temperature", "<f8"),  # 0: the likeliest
        ("top_k", "<i8"),  # 0: off
        ("top_p", "<f8"),
        ("min_p", "<f8"),
        ("seed", "<u8"),
        ("position", "<i8"),
    ]
)
COLUMNS_PER_ITEM = 4096


def params_tensor(max_rows: int) -> torch.Tensor:
    """Memory for the settings of `max_rows` rows; `params_of` is the same memory for NumPy."""
    return torch.zeros(max_rows * PARAMS.itemsize, dtype=torch.uint8)


def params_of(tensor: torch.Tensor) -> "np.ndarray[tuple[int], np.dtype[np.void]]":
    """The structured array, to be filled before each step."""
    return tensor.numpy().view(PARAMS)


def scratch(max_rows: int, vocab_size: int) -> torch.Tensor:
    """What a row's pieces find, for up to `max_rows` rows."""
    return torch.zeros(max_rows * 16 * (1 + -(-vocab_size // COLUMNS_PER_ITEM)), dtype=torch.uint8)


def work(threads: int, vocab_size: int) -> torch.Tensor:
    """[threads, Vp] float32: candidates of each thread's row."""
    return torch.zeros(threads, -(-vocab_size // 64) * 64, dtype=torch.float32)
