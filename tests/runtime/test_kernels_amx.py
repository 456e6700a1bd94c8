"""AMX's bfloat16 products against Intel's description of the instruction, to the bit.

Runs where the processor has AMX, and with AMX emulated from test_kernels_targets.py. There the emulation is C++
(kernels/cpu/src/amx.h); here the same is said once more, in NumPy.
"""

import numpy as np
import numpy.typing as npt
import pytest
import torch

from wherry_runtime.kernels.cpu import library
from wherry_runtime.kernels.cpu.library import Pool, Step
from wherry_runtime.kernels.cpu.recorder import Capacity, Recorder, Value
from wherry_runtime.layers.linear import Linear
from wherry_runtime.parallel.shard import Span
from wherry_runtime.quantization.storage import Storage

pytestmark = pytest.mark.skipif(
    not library.available() or library.target() != "amx",
    reason="this processor has no AMX; test_kernels_targets.py runs this with AMX emulated",
)

Floats = npt.NDArray[np.float32]

TILE = 32  # bfloat16 numbers of a row


def flushed(x: npt.NDArray[np.floating]) -> Floats:
    """Rounded to float32, subnormal numbers to zero."""
    x = x.astype(np.float32)
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x)


def product(x: Floats, w: Floats) -> Floats:
    """[rows, outputs]; of x [rows, inputs] and w [outputs, inputs], whose numbers are bfloat16.

    Per tile, a chain of fused multiply-adds over the even elements and one over the odd ones, each from zero; their sum
    is added to the result. A product of two bfloat16 is exact in float64, and so is its sum with a float32 here, where
    numbers are of like size: rounded to float32, that is a fused multiply-add.
    """
    x, w = flushed(x), flushed(w)
    sums = np.zeros((len(x), len(w)), np.float32)
    for first in range(0, x.shape[1], TILE):
        chains = [np.zeros_like(sums), np.zeros_like(sums)]
        for k in range(first, min(first + TILE, x.shape[1])):
            exact = np.outer(x[:, k].astype(np.float64), w[:, k].astype(np.float64))
            chains[k % 2] = flushed(chains[k % 2] + exact)
        sums = flushed(sums + flushed(chains[0] + chains[1]))
    return sums


@pytest.mark.parametrize("scale", [0.1, 1e-37], ids=["usual", "subnormal"])
@pytest.mark.parametrize("rows", [1, 5, 17, 40])
def test_bfloat16_product(rows: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(rows)
    storage = Storage(torch.bfloat16, torch.device("cpu"), native=True)
    layer = Linear([("w", Span.all(70))], Span.all(200), bias=False, storage=storage, role="qkv")
    weight = torch.randn(70, 200, generator=generator) * scale
    layer.slots()["w.weight"].fill(weight)
    recorder = Recorder(Pool(2), Capacity(rows, rows))
    value = Value(recorder.arena, rows, 200, sampled=False)
    y = recorder.linear(layer, value)
    x = torch.randn(rows, 200, generator=generator)
    value.buffer[:, :200] = x
    recorder.program.run(Step(rows))
    want = product(x.bfloat16().float().numpy(), weight.bfloat16().float().numpy())
    assert want.any()
    np.testing.assert_array_equal(y.buffer[:, :70].numpy(), want)
