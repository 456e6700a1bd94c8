"""From the host's memory to the device's, without waiting."""

import numpy as np
import numpy.typing as npt
import torch


class Staging:
    """Page-locked memory that steps are copied from; elsewhere than on CUDA, an ordinary copy.

    A copy may still be under way when the next step is packed, so each waits for the one before it: in practice never,
    because drawing tokens has waited for the whole step.
    """

    def __init__(self, device: torch.device) -> None:
        self._pinned = torch.empty(0, dtype=torch.int32)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def copy(self, numbers: npt.NDArray[np.int32], target: torch.Tensor) -> None:
        """Copies int32 `numbers` to the beginning of `target`, in the order of the current stream."""
        size = len(numbers)
        if self._copied is None:
            target[:size].copy_(torch.from_numpy(numbers))
            return
        self._copied.synchronize()
        if self._pinned.numel() < size:
            self._pinned = torch.empty(2 * size, dtype=torch.int32, pin_memory=True)
        self._pinned[:size].copy_(torch.from_numpy(numbers))
        target[:size].copy_(self._pinned[:size], non_blocking=True)
        self._copied.record()
