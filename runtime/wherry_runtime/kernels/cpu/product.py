"""Single matrix products on the native kernels, for models whose other operations PyTorch computes."""

from collections.abc import Callable

import torch

from wherry_runtime.kernels.cpu.library import Pool, Program, Step
from wherry_runtime.kernels.cpu.recorder import Capacity, Recorder, Rows, Value
from wherry_runtime.layers.linear import Linear

ROWS = 64  # at once; so many read the weights seldom enough


class Products:
    """Makes products of layers with packed weights. They share threads and buffers: one runs at a time."""

    def __init__(self, threads: int) -> None:
        self._recorder = Recorder(Pool(threads), Capacity(ROWS, ROWS))

    def __call__(self, layer: Linear) -> Callable[[torch.Tensor], torch.Tensor]:
        """x [T, K] → x Wᵀ + b [T, N] float32; x is rounded to int8 as W's format asks for."""
        x = Value(self._recorder.arena, ROWS, layer.num_inputs, sampled=False)
        y = self._recorder.linear(layer, x)
        (stage,) = self._recorder.take_stages()
        return _Product(stage.program, x, y)


class _Product:
    def __init__(self, program: Program, x: Rows, y: Rows) -> None:
        self._program = program
        self._x, self._y = x.buffer[:, : x.width], y.buffer[:, : y.width]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(x.shape[0], self._y.shape[1])
        for start in range(0, x.shape[0], ROWS):
            part = x[start : start + ROWS]
            self._x[: len(part)] = part
            self._program.run(Step(len(part)))
            out[start : start + ROWS] = self._y[: len(part)]
        return out
