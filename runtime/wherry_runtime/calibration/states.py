"""What is between two layers, on disk: memory does not grow with the calibration text."""

from pathlib import Path

import numpy as np
import torch


class States:
    """Rows of every window before a layer: a file [windows, length, hidden_size] float32 in `directory`.

    A file is complete once the layer's number is in the log; it is mapped, so the page cache holds what there is room
    for.
    """

    def __init__(self, directory: Path, windows: int, length: int, width: int) -> None:
        self._directory = directory
        self._shape = (windows, length, width)

    def create(self, layer: int) -> "np.memmap[tuple[int, ...], np.dtype[np.float32]]":
        """Room for what goes into a layer."""
        return np.memmap(self._path(layer), dtype=np.float32, mode="w+", shape=self._shape)

    def open(self, layer: int) -> "np.memmap[tuple[int, ...], np.dtype[np.float32]]":
        """What goes into a layer, to be read. Raises OSError or ValueError where it is not there as a whole."""
        return np.memmap(self._path(layer), dtype=np.float32, mode="c", shape=self._shape)

    def remove(self, layer: int) -> None:
        """Nobody needs it any more."""
        self._path(layer).unlink(missing_ok=True)

    def _path(self, layer: int) -> Path:
        return self._directory / f"states-{layer}.bin"


def clear(directory: Path) -> None:
    """Removes what is left of all layers: a run that was cut off may leave the inputs of one that was done."""
    for path in directory.glob("states-*.bin"):
        path.unlink()


def rows(states: "np.memmap[tuple[int, ...], np.dtype[np.float32]]", window: int) -> torch.Tensor:
    """[length, hidden_size] float32 of one window; writing to it writes to the file, if that was created."""
    return torch.from_numpy(states[window])
