"""The native matrix products against their reference in PyTorch, on odd shapes and every batch size that matters.

Bounds, relative to the largest output: float32 2e-6 and bfloat16 2e-6 (the same products in another order of addition),
integers 1e-6 (exact within a group of weights, then float32). On processors without bfloat16 instructions, and on those
that have them, the products of bfloat16 numbers are exact in float32.
"""

import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from wherry_runtime.kernels.cpu import library
from wherry_runtime.kernels.cpu.library import Pool, Step
from wherry_runtime.kernels.cpu.recorder import Capacity, Recorder, Value
from wherry_runtime.layers.linear import Linear
from wherry_runtime.models.decoder import Embedding
from wherry_runtime.parallel.shard import Span
from wherry_runtime.quantization.formats import Format
from wherry_runtime.quantization.mapped import Mapped
from wherry_runtime.quantization.packed import linear as reference
from wherry_runtime.quantization.storage import Storage

pytestmark = pytest.mark.skipif(not library.available(), reason="there are no native kernels on this machine")

CPU = torch.device("cpu")
FORMATS = {
    "float32": (Storage(torch.float32, CPU, native=True), 2e-6),
    "bfloat16": (Storage(torch.bfloat16, CPU, native=True), 2e-6),
    "int8": (Storage(torch.bfloat16, CPU, "int8", native=True), 1e-6),
    "int8-g32": (Storage(torch.bfloat16, CPU, "int8", 32, native=True), 1e-6),
    "int8-outliers": (
        Storage(torch.bfloat16, CPU, native=True, held={"w": Format("int8", 128, outliers=6.0)}),
        2e-6,
    ),
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


@pytest.mark.parametrize("name", ["int8", "int8-outliers"])
def test_infinities_do_not_spread_to_other_rows(name: str) -> None:
    layer = make(FORMATS[name][0], 70, 130)
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


class InAFile:
    """Two matrices in a mapped file, one after the other in a layer of as many outputs as both have."""

    def __init__(self, directory: Path, dtype: torch.dtype, outputs: int, inputs: int) -> None:
        generator = torch.Generator().manual_seed(outputs)
        cut = outputs // 3
        weight = (torch.randn(outputs, inputs, generator=generator) * 0.1).to(dtype)
        path = directory / "model.safetensors"
        # Five bytes before them: nothing in the file is aligned to anything.
        save_file({"a": weight[:cut].clone(), "b": weight[cut:].clone(), "c": torch.zeros(5, dtype=torch.uint8)}, path)
        shift = 1 + outputs % 7
        path.write_bytes(_with_longer_header(path.read_bytes(), shift))
        self._parts, self._path = [("a", Span.all(cut)), ("b", Span.all(outputs - cut))], path
        self._dtype, self._inputs = dtype, inputs

    def layer(self, mapped: Mapped | None) -> Linear:
        storage = Storage(self._dtype, CPU, native=True, mapped=mapped)
        layer = Linear(self._parts, Span.all(self._inputs), bias=False, storage=storage, role="qkv")
        slots = layer.slots()
        with safe_open(self._path, framework="pt") as file:
            for name in ("b", "a"):
                tensor = file.get_tensor(name)
                if mapped is not None:
                    mapped.show(tensor)
                slots[f"{name}.weight"].fill(tensor)
                if mapped is not None:
                    mapped.done(tensor)
        return layer


def _with_longer_header(data: bytes, by: int) -> bytes:
    size = int.from_bytes(data[:8], "little")
    return (size + by).to_bytes(8, "little") + data[8 : 8 + size] + b" " * by + data[8 + size :]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("outputs, inputs", [(64, 128), (192, 384), (576, 1024)])
def test_weights_that_are_still_in_their_file(tmp_path: Path, dtype: torch.dtype, outputs: int, inputs: int) -> None:
    """To the bit what packed weights give, before they are packed and after it."""
    file, mapped = InAFile(tmp_path, dtype, outputs, inputs), Mapped()
    packed, left = file.layer(None), file.layer(mapped)
    assert packed.packed is not None
    assert left.packed is not None
    assert mapped.kept_bytes == outputs * inputs * dtype.itemsize
    assert packed.packed.rows is None
    assert left.packed.rows is not None
    want, got = Product(packed, 200), Product(left, 200, threads=3)
    for settled in (False, True):
        assert bool(left.packed.rows[0]) is not settled
        for rows in ROWS:
            x = activations(rows, inputs)
            np.testing.assert_array_equal(got(x).numpy(), want(x).numpy())
        if not settled:
            assert not left.packed.data.any(), "no memory is taken yet"
            left.packed.settle()
    np.testing.assert_array_equal(left.packed.data.numpy(), packed.packed.data.numpy())


def test_a_kernel_that_looked_before_rows_were_packed_finds_them_still(tmp_path: Path) -> None:
    """It may be in the midst of its work: what it reads stays mapped as long as the matrix is there."""
    matrix = InAFile(tmp_path, torch.bfloat16, 192, 128).layer(Mapped()).packed
    assert matrix is not None
    matrix.settle()
    maps = Path("/proc/self/maps")
    assert str(tmp_path) in maps.read_text()
    del matrix
    gc.collect()
    assert str(tmp_path) not in maps.read_text()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_a_tied_head(tmp_path: Path, dtype: torch.dtype) -> None:
    """The embedding of tokens out of the head's matrix, in its file and packed."""
    head = InAFile(tmp_path, dtype, 576, 384).layer(Mapped()).packed
    assert head is not None
    tokens = [0, 63, 64, 575, 300, 7]
    recorder = Recorder(Pool(2), Capacity(8, 8), None)  # type: ignore[arg-type]
    embedding = Embedding("e", Span.all(576), 384, Storage(dtype, CPU, native=True), head)
    out = recorder.embed(embedding.table, embedding.tokens)
    step = Step(len(tokens), token_ids=tokens)
    recorder.program.run(step)
    in_file = out.buffer[: len(tokens), :384].clone()
    want = head.dequantized()[tokens]  # which settles it
    np.testing.assert_array_equal(in_file.numpy(), want.numpy())
    recorder.program.run(step)
    np.testing.assert_array_equal(out.buffer[: len(tokens), :384].numpy(), want.numpy())
    np.testing.assert_array_equal(head.lookup(torch.tensor(tokens)).float().numpy(), want.numpy())


def test_what_is_not_of_the_matrix_type_is_packed_at_once(tmp_path: Path) -> None:
    """And with it what stayed in the file before: kernels take a matrix from there as a whole or not at all."""
    mapped = Mapped()
    layer = InAFile(tmp_path, torch.bfloat16, 192, 128).layer(mapped)
    matrix = layer.packed
    assert matrix is not None
    assert matrix.rows is not None
    again = torch.ones(64, 128)
    mapped.show(again)
    layer.slots()["a.weight"].fill(again)
    assert not matrix.rows[0]
    assert (matrix.dequantized()[:64] == 1).all()
