"""Tensors of mapped files: which of them stay where they are, and what becomes of the pages of the others."""

import ctypes
import mmap

import torch


class Mapped:
    """Lets matrices stay in the files that they were mapped from: what is shown may be kept.

    Attributes:
        kept_bytes: of everything that was kept.
    """

    def __init__(self) -> None:
        self.kept_bytes = 0
        self._span = range(0)
        self._kept = False

    def show(self, tensor: torch.Tensor) -> None:
        """`tensor` is a view of a mapped file that is never written to."""
        start = tensor.data_ptr()
        self._span, self._kept = range(start, start + tensor.nbytes), False

    def keep(self, rows: torch.Tensor) -> bool:
        """Keeps the pages of `rows`, if they are part of what is shown."""
        if rows.data_ptr() not in self._span:
            return False
        self._kept = True
        self.kept_bytes += rows.numel() * rows.itemsize
        return True

    def done(self, tensor: torch.Tensor) -> None:
        """`tensor`, which was shown, has been read: its pages go unless somebody keeps them."""
        if not self._kept:
            let_go(tensor)
        self._span = range(0)


def let_go(tensor: torch.Tensor) -> None:
    """Takes the pages of a tensor in a mapped file out of this process. They stay in the page cache.

    Of memory that is no file's, whole pages inside the tensor are lost: it must not be read again.
    """
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if size > 0 and hasattr(mmap, "MADV_DONTNEED") and tensor.device.type == "cpu":
        # What cannot be let go stays for longer, and nothing else happens.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), ctypes.c_int(mmap.MADV_DONTNEED))
