"""A pytest plugin for runs under AddressSanitizer: weights, KV caches and buffers lie on the heap, each as large as was
asked for and no larger, so that a byte too far is seen. In huge pages and behind slack nothing would be.

    pytest -p tests.runtime.heap_memory
"""

from typing import Any

import torch

from wherry_runtime.kernels.cpu import recorder
from wherry_runtime.kvcache import native
from wherry_runtime.quantization import huge_pages

ALIGNMENT = 64  # of every tensor that PyTorch allocates on the CPU, and what kernels may count on


def zeros(num_bytes: int) -> torch.Tensor:
    memory = torch.zeros(num_bytes, dtype=torch.uint8)
    if memory.data_ptr() % ALIGNMENT:
        raise RuntimeError(f"PyTorch's memory does not begin at a multiple of {ALIGNMENT} bytes")
    return memory


def allocate(_: huge_pages.Arena, num_bytes: int) -> torch.Tensor:
    return zeros(num_bytes)


def aligned(dtype: torch.dtype, rows: int, columns: int) -> torch.Tensor:
    return zeros(rows * columns * dtype.itemsize).view(dtype).view(rows, columns)


def take(_: recorder.Arena, *arguments: Any) -> torch.Tensor:
    """New memory every time; `dtype`, rows and columns come last."""
    dtype, rows, columns = arguments[-3:]
    return aligned(dtype, rows, columns)


def give_back(_: recorder.Arena, *arguments: Any) -> None:
    """It goes with its last tensor."""


def pytest_configure() -> None:
    for owner, name, replacement in (
        (huge_pages.Arena, "allocate", allocate),
        (native, "_zeros", zeros),
        (recorder, "aligned", aligned),
        (recorder.Arena, "take", take),
        (recorder.Arena, "give_back", give_back),
    ):
        if not hasattr(owner, name):
            raise RuntimeError(f"{owner}.{name} is not there any more: who allocates this memory now?")
        setattr(owner, name, replacement)
