"""Weights from the files that they were mapped from into panels in huge pages, while the model is being used.

A model can compute as soon as its files are mapped: the kernels turn a block of rows into a block of a panel when they
need it. That takes longer than reading panels, so a thread packs one matrix after the other, and lets the file's pages
go. It yields to whatever else wants its core, and begins when the first step is done.
"""

import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Sequence

from wherry_runtime.quantization.packed import PackedMatrix

log = logging.getLogger(__name__)

NICE = 10  # a tenth of what a thread of the kernels gets when both want the same core
PATIENCE_S = 1.0  # for the first step


class Settling:
    """Packs `matrices`, in order, in a thread of its own. Nothing waits for it but `wait`; it ends with its owner."""

    def __init__(self, matrices: Sequence[PackedMatrix]) -> None:
        self.stepped = threading.Event()  # to be set after the first step
        self.done = threading.Event()
        self.matrices = tuple(matrices)
        self._next = iter(self.matrices)
        me = weakref.ref(self)
        if matrices:
            threading.Thread(target=_settle, args=(me, self.stepped), name="wherry-settling", daemon=True).start()
        else:
            self.done.set()

    def next(self) -> PackedMatrix | None:
        """The next to pack."""
        return next(self._next, None)


def _settle(of: weakref.ref[Settling], stepped: threading.Event) -> None:
    stepped.wait(PATIENCE_S)
    with contextlib.suppress(OSError):  # without it, it takes more of the cores
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
    began, num_bytes = time.monotonic(), 0
    while (settling := of()) is not None and (matrix := settling.next()) is not None:
        settling = None
        matrix.settle(threads=1)
        num_bytes += matrix.data.nbytes
    if settling is not None:
        settling.done.set()
        log.info("packed %d MiB of mapped weights in %.1f s", num_bytes >> 20, time.monotonic() - began)
