"""Native embedding, norm and activation against PyTorch."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from wherry_runtime.kernels import reference
from wherry_runtime.kernels.cpu import library
from wherry_runtime.kernels.cpu.library import Pool, Program, Step
from wherry_runtime.kernels.cpu.recorder import FUNCTIONS
from wherry_runtime.layers.activation import Activation
from wherry_runtime.loading.config import ActivationKind

pytestmark = pytest.mark.skipif(not library.available(), reason="the native library is not built")

WIDTHS = [1, 15, 16, 17, 100, 513, 896, 2048, 5632]
ROWS = [1, 2, 7, 64]


def padded(x: torch.Tensor) -> torch.Tensor:
    """Rows with zeros up to a multiple of 64 columns."""
    out = torch.zeros(x.shape[0], -(-x.shape[1] // 64) * 64)
    out[:, : x.shape[1]] = x
    return out


def run(
    name: str, tensors: list[torch.Tensor], numbers: list[int], step: Step, *scalars: float, threads: int = 2
) -> None:
    program = Program(Pool(threads))
    program.add(name, tensors, numbers, scalars)
    program.run(step)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
class TestElementwise:
    """Bounds: a few units in the last place of float32, from exp and from sums in another order."""

    @pytest.mark.parametrize("gated", [True, False], ids=["gated", "alone"])
    @pytest.mark.parametrize("kind", FUNCTIONS)
    def test_activation(self, width: int, rows: int, kind: ActivationKind, gated: bool) -> None:
        x = torch.randn(rows, (1 + gated) * width) * 4
        source, out = padded(x), padded(torch.full((rows, width), 9.0))
        numbers = [width, source.shape[1], out.shape[1], FUNCTIONS.index(kind), gated]
        run("activation", [source, out], numbers, Step(rows))
        expected = Activation(kind, gated)(x.double()).float()
        torch.testing.assert_close(out[:, :width], expected, rtol=3e-6, atol=3e-6)
        assert (out[:, width:] == 0).all()

    def test_layer_norm(self, width: int, rows: int) -> None:
        x, weight, bias = torch.randn(rows, width) * 3 + 5, torch.randn(width), torch.randn(width)
        sampled = torch.randperm(rows)[: rows // 2 + 1]
        for gathered in (False, True):
            chosen = x[sampled] if gathered else x
            source, out = padded(x), padded(torch.zeros(len(chosen), width))
            step = Step(rows, sampled_rows=sampled.numpy())
            run("layer_norm", [source, weight, out, bias], [width, len(source[0]), len(out[0]), gathered], step, 1e-5)
            expected = functional.layer_norm(chosen.double(), (width,), weight.double(), bias.double(), 1e-5)
            torch.testing.assert_close(out[:, :width], expected.float(), rtol=1e-5, atol=1e-5)
            assert (out[:, width:] == 0).all()

    def test_rms_norm_of_a_part_of_rows(self, width: int, rows: int) -> None:
        """In place, and what is beside it stays as it was."""
        x, weight = torch.randn(rows, width + 40), torch.randn(width)
        expected = x.clone()
        expected[:, 7 : 7 + width] = reference.rms_norm(x[:, 7 : 7 + width].double(), weight.double(), 1e-5).float()
        part = x[:, 7:]
        run("rms_norm", [part, weight, part], [width, width + 40, width + 40, 0], Step(rows), 1e-5)
        torch.testing.assert_close(x, expected, rtol=2e-6, atol=1e-30)
        assert torch.equal(x[:, 7 + width :], expected[:, 7 + width :])

    def test_add_scaled_and_scale(self, width: int, rows: int) -> None:
        x, y = torch.randn(rows, width), torch.randn(rows, width)
        summed, added = padded(x), padded(y)
        run("add_scaled", [summed, added], [width, summed.shape[1], added.shape[1]], Step(rows), 0.22)
        torch.testing.assert_close(summed[:, :width], x + y * 0.22, rtol=1e-6, atol=1e-6)
        for rounds, scaled in ((0, x * 3.5), (7, 7 * torch.tanh(x * 3.5 / 7))):
            values = padded(x)
            run("scale", [values], [width, values.shape[1], 0], Step(rows), 3.5, rounds)
            torch.testing.assert_close(values[:, :width], scaled, rtol=1e-6, atol=2e-6)
            assert (values[:, width:] == 0).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_add_positions(self, width: int, rows: int, dtype: torch.dtype) -> None:
        table, x = torch.randn(19, width).to(dtype), torch.randn(rows, width)
        positions, out = torch.randint(0, 19, (rows,)), padded(x)
        numbers = [width, out.shape[1], 0 if dtype == torch.float32 else 1]
        run("add_positions", [table, out], numbers, Step(rows, positions=positions.numpy()))
        assert torch.equal(out[:, :width], x + table[positions].float())
        assert (out[:, width:] == 0).all()

    def test_rms_norm(self, width: int, rows: int) -> None:
        x, weight = torch.randn(rows, width) * 3, torch.randn(width)
        source, out = padded(x), padded(torch.zeros(rows, width))
        run("rms_norm", [source, weight, out], [width, source.shape[1], out.shape[1], 0], Step(rows), 1e-5)
        expected = reference.rms_norm(x.double(), weight.double(), 1e-5).float()
        torch.testing.assert_close(out[:, :width], expected, rtol=2e-6, atol=1e-30)
        assert (out[:, width:] == 0).all()

    def test_rms_norm_of_sampled_rows(self, width: int, rows: int) -> None:
        x, weight = torch.randn(rows, width), torch.randn(width)
        sampled = torch.randperm(rows)[: rows // 2 + 1]
        source, out = padded(x), padded(torch.zeros(len(sampled), width))
        step = Step(rows, sampled_rows=sampled.numpy())
        run("rms_norm", [source, weight, out], [width, source.shape[1], out.shape[1], 1], step, 1e-5)
        whole = padded(torch.zeros(rows, width))
        run("rms_norm", [source, weight, whole], [width, source.shape[1], out.shape[1], 0], Step(rows), 1e-5)
        assert torch.equal(out, whole[sampled])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_embed(self, width: int, rows: int, dtype: torch.dtype) -> None:
        table = torch.randn(11, width).to(dtype)
        ids = torch.randint(0, 11, (rows,))
        out = padded(torch.zeros(rows, width))
        code = 0 if dtype == torch.float32 else 1
        run("embed", [table, out], [width, out.shape[1], code, 11], Step(rows, token_ids=ids.numpy()))
        assert torch.equal(out[:, :width], reference.embed(table, ids))
        assert (out[:, width:] == 0).all()


def test_ids_that_the_table_does_not_have_give_zeros() -> None:
    """Those of other ranks, and bad ones, which must not read elsewhere."""
    table, out = torch.randn(3, 16), torch.full((5, 64), 9.0)
    run("embed", [table, out], [16, 64, 0, 3, 100], Step(5, token_ids=np.array([99, 100, 102, 103, -1])))
    zeros = torch.zeros(16)
    assert torch.equal(out[:, :16], torch.stack([zeros, table[0], table[2], zeros, zeros]))


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_activations_of_the_extremes(kind: ActivationKind) -> None:
    gate = torch.tensor([-1e18, -100.0, -88.0, -20.0, -1e-20, 0.0, 20.0, 100.0, 1e18, float("nan")])
    out = torch.zeros(1, 64)
    run("activation", [padded(gate[None]), out], [10, 64, 64, FUNCTIONS.index(kind), 0], Step(1))
    torch.testing.assert_close(out[0, :10], Activation(kind, gated=False)(gate), rtol=1e-6, atol=1e-6, equal_nan=True)


def test_a_cap_of_the_extremes() -> None:
    x = torch.tensor([-1e30, -1e3, -1e-20, 0.0, 1e-3, 1e3, float("inf"), float("nan")])
    out = padded(x[None])
    run("scale", [out], [8, 64, 1], Step(1, sampled_rows=[0]), 1.0, 30.0)
    torch.testing.assert_close(out[0, :8], 30 * torch.tanh(x / 30), rtol=1e-6, atol=2e-6, equal_nan=True)


def test_rows_are_the_same_in_any_company() -> None:
    x, weight = padded(torch.randn(64, 896)), torch.randn(896)
    whole, one = torch.zeros_like(x), torch.zeros_like(x)
    run("rms_norm", [x, weight, whole], [896, 896, 896, 0], Step(64), 1e-6, threads=3)
    for row in (0, 17, 63):
        run("rms_norm", [x[row], weight, one], [896, 896, 896, 0], Step(1), 1e-6, threads=1)
        assert torch.equal(one[0], whole[row])
