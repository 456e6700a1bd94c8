"""A pytest plugin for runs under AddressSanitizer: weights, KV caches and buffers lie on the heap, each as large as was
asked for and no larger, so that a byte too far is seen. In huge pages and behind slack nothing would be.

    pytest -p tests.runtime.heap_memory
"""

import torch

from wherry_runtime.kernels.cpu import recorder
from wherry_runtime.kvcache import native
from wherry_runtime.quantization.huge_pages import Arena

ALIGNMENT = 64  # of every tensor that PyTorch allocates on the CPU, and what kernels may count on


def zeros(num_bytes: int) -> torch.Tensor:
    memory = torch.zeros(num_bytes, dtype=torch.uint8)
    if memory.data_ptr() % ALIGNMENT:
        raise RuntimeError(f"PyTorch's memory does not begin at a multiple of {ALIGNMENT} bytes")
    return memory


def allocate(_: Arena, num_bytes: int) -> torch.Tensor:
    return zeros(num_bytes)


def aligned(dtype: torch.dtype, rows: int, columns: int) -> torch.Tensor:
    return zeros(rows * columns * dtype.itemsize).view(dtype).view(rows, columns)


def pytest_configure() -> None:
    Arena.allocate = allocate  # type: ignore[method-assign]
    native._zeros = zeros
    recorder.aligned = aligned
    recorder.Arena.take = lambda _, dtype, rows, columns: aligned(dtype, rows, columns)  # type: ignore[method-assign]
    recorder.Arena.give_back = lambda _, buffer: None  # type: ignore[method-assign]
