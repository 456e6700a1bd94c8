"""Memory for weights, in huge pages where the kernel allows.

Decoding reads every weight once per step. With pages of 4 KiB the processor walks page tables at the pace of the reads;
pages of 2 MiB made the same read over half as fast again where it was measured.
"""

import contextlib
import mmap

import torch

HUGE_PAGE = 2 << 20
CHUNK = 64 << 20
ALIGNMENT = 64  # a cache line, and the widest vector


class Arena:
    """Hands out memory from large regions, so that small matrices share huge pages. Nothing is given back singly: a
    region goes when its last tensor does. Memory is zero at first, and takes room only once it is written to."""

    def __init__(self, chunk: int = CHUNK) -> None:
        self._chunk = chunk
        self._region = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """[num_bytes] uint8, zeros, aligned to 64 bytes."""
        if self._used + num_bytes > self._region.numel():
            self._region = _map(max(self._chunk, _rounded(num_bytes, HUGE_PAGE)))
            self._used = 0
        start = self._used
        self._used += _rounded(num_bytes, ALIGNMENT)
        return self._region[start : start + num_bytes]


def _rounded(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _map(num_bytes: int) -> torch.Tensor:
    """Anonymous memory that begins at a huge page. The tensor keeps the mapping alive."""
    mapping = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(mapping, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages: slower, nothing else
            mapping.madvise(mmap.MADV_HUGEPAGE, start, num_bytes)
    return whole[start : start + num_bytes]
