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
    """Hands out memory from large regions, so that small matrices share huge pages. Nothing is given back singly.

    Memory is zero at first, and takes room only once it is written to.
    """

    def __init__(self, chunk: int = CHUNK) -> None:
        self._chunk = chunk
        self._regions: list[torch.Tensor] = []  # what is left of each

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """[num_bytes] uint8, zeros, aligned to 64 bytes."""
        taken = _rounded(num_bytes, ALIGNMENT)
        index = next((i for i, left in enumerate(self._regions) if len(left) >= taken), len(self._regions))
        if index == len(self._regions):
            self._regions.append(map_memory(max(self._chunk, _rounded(num_bytes, HUGE_PAGE))))
        found = self._regions[index]
        self._regions[index] = found[taken:]
        return found[:num_bytes]


def _rounded(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def map_memory(num_bytes: int) -> torch.Tensor:
    """[num_bytes] uint8, zeros: anonymous memory that begins at a huge page. The tensor keeps the mapping alive."""
    mapping = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(mapping, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages: slower, nothing else
            mapping.madvise(mmap.MADV_HUGEPAGE, start, num_bytes)
    return whole[start : start + num_bytes]
