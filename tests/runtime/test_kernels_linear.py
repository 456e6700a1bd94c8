"""The native matrix products against their reference in PyTorch, on odd shapes and every batch size that matters.

Bounds, relative to the largest output: float32 2e-6 and bfloat16 2e-6 (the same products in another order of addition),
integers 1e-6 (exact within a group of weights, then float32). On processors without bfloat16 instructions, and on those
that have them, the products of bfloat16 numbers are exact in float32.
"""

import numpy as np
import pytest
import torch

from wherry_runtime.kernels.cpu import library
from wherry_runtime.kernels.cpu.library import Pool, Step
from wherry_runtime.kernels.cpu.recorder import Capacity, Recorder, Value
from wherry_runtime.layers.linear import Linear
from wherry_runtime.parallel.shard import Span
from wherry_runtime.quantization.packed import linear as reference
from wherry_runtime.quantization.storage import Storage

pytestmark = pytest.mark.skipif(not library.available(), reason="there are no native kernels on this machine")

CPU = torch.device("cpu")
FORMATS = {
    "float32": (Storage(torch.float32, CPU, native=True), 2e-6),
    "bfloat16": (Storage(torch.bfloat16, CPU, native=True), 2e-6),
    "int8": (Storage(torch.bfloat16, CPU, "int8", native=True), 1e-6),
    "int8-g32": (Storage(torch.bfloat16, CPU, "int8", 32, native=True), 1e-6),
    "int4": (Storage(torch.bfloat16, CPU, "int4", native=True), 1e-6),
    "int4-g64": (Storage(torch.bfloat16, CPU, "int4", 64, native=True), 1e-6),
    "int4-g128": (Storage(torch.bfloat16, CPU, "int4", 128, native=True), 1e-6),
}
SHAPES = [(64, 128), (1, 2), (100, 96), (130, 257), (65, 640), (512, 300), (192, 1000)]  # outputs, inputs
ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 13, 16, 31, 64, 97, 200]


def make(storage: Storage, outputs: int, inputs: int, *, bias: bool = True) -> Linear:
    generator = torch.Generator().manual_seed(outputs * 1000 + inputs)
    layer = Linear([("w", Span.all(outputs))], Span.all(inputs), bias=bias, storage=storage, role="qkv")
    weight = torch.randn(outputs, inputs, generator=generator) * 0.1
    slots = layer.slots()
    slots["w.weight"].fill(weight)
    if bias:
        slots["w.bias"].fill(torch.randn(outputs, generator=generator))
    return layer


def activations(rows: int, inputs: int) -> torch.Tensor:
    """With outliers, as real ones have, and a row of zeros."""
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows))
    x[:, ::37] *= 30
    if rows > 2:
        x[1] = 0
    return x


class Product:
    """A layer recorded as a program, for up to `rows` rows."""

    def __init__(self, layer: Linear, rows: int, threads: int = 2) -> None:
        recorder = Recorder(Pool(threads), Capacity(rows, rows))
        self._program = recorder.program
        self._x = Value(recorder.arena, rows, layer.num_inputs, sampled=False)
        self._y = recorder.linear(layer, self._x)
        self._residual = Value(recorder.arena, rows, layer.num_outputs, sampled=False)
        recorder.take_stages()
        self._added = recorder.program
        recorder.add_linear(self._residual, layer, self._x)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self._x.buffer[: len(x), : x.shape[1]] = x
        self._program.run(Step(len(x)))
        return self._y.buffer[: len(x), : self._y.width].clone()

    def added(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        self._x.buffer[: len(x), : x.shape[1]] = x
        self._residual.buffer[: len(x), : residual.shape[1]] = residual
        self._added.run(Step(len(x)))
        return self._residual.buffer[: len(x), : residual.shape[1]].clone()

    def padding(self) -> torch.Tensor:
        return self._y.buffer[:, self._y.width :]


def expected(layer: Linear, x: torch.Tensor) -> torch.Tensor:
    assert layer.packed is not None
    if layer.packed.format.method == "bfloat16":
        x = x.bfloat16().float()
    y = reference(x.double() if layer.packed.format.method in ("float32", "bfloat16") else x, layer.packed)
    return y.float() if layer.bias is None else y.float() + layer.bias[: layer.num_outputs]


@pytest.mark.parametrize("outputs, inputs", SHAPES)
@pytest.mark.parametrize("name", FORMATS)
def test_product(name: str, outputs: int, inputs: int) -> None:
    storage, bound = FORMATS[name]
    layer = make(storage, outputs, inputs)
    product = Product(layer, max(ROWS))
    for rows in ROWS:
        x = activations(rows, inputs)
        want = expected(layer, x)
        torch.testing.assert_close(product(x), want, rtol=0, atol=bound * float(want.abs().max()) + 1e-6)
        residual = torch.randn(rows, outputs)
        added = residual + want
        torch.testing.assert_close(
            product.added(x, residual), added, rtol=0, atol=bound * float(added.abs().max()) + 2e-6
        )
        assert not product.padding().any(), "what the next product reads as padding must stay zero"


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_is_the_same_in_any_company(name: str) -> None:
    """Bit for bit, whatever the number of rows, its place among them, and the number of threads."""
    layer = make(FORMATS[name][0], 200, 700)
    x = activations(200, 700)
    alone = Product(layer, 1, threads=1)
    rows = torch.cat([alone(x[i : i + 1]) for i in range(len(x))])
    many = Product(layer, 200, threads=3)
    for count in ROWS:
        np.testing.assert_array_equal(many(x[-count:]).numpy(), rows[-count:].numpy())


@pytest.mark.parametrize("name", FORMATS)
def test_sampled_rows_are_counted_apart(name: str) -> None:
    """A product over the rows that draw a token computes as many rows as there are of these."""
    layer = make(FORMATS[name][0], 70, 130)
    recorder = Recorder(Pool(2), Capacity(8, 4))
    x = Value(recorder.arena, 4, 130, sampled=True)
    y = recorder.linear(layer, x)
    x.buffer[:, :130] = activations(4, 130)
    y.buffer.fill_(7)
    recorder.program.run(Step(8, sampled_rows=np.array([1, 5], dtype=np.int64)))
    want = expected(layer, activations(4, 130)[:2])
    torch.testing.assert_close(y.buffer[:2, :70], want, rtol=1e-5, atol=1e-4 * float(want.abs().max()))
    assert (y.buffer[2:] == 7).all()


def test_infinities_do_not_spread_to_other_rows() -> None:
    layer = make(FORMATS["int8"][0], 70, 130)
    product = Product(layer, 8)
    x = activations(8, 130)
    clean = product(x)
    x[3, 5] = float("inf")
    x[4, 6] = float("nan")
    dirty = product(x)
    keep = [0, 1, 2, 5, 6, 7]
    np.testing.assert_array_equal(dirty[keep].numpy(), clean[keep].numpy())
    assert not torch.isfinite(dirty[3]).any()
    assert not torch.isfinite(dirty[4]).any()
