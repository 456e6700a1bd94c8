"""Native embedding, norm and activation against PyTorch."""

import numpy as np
import pytest
import torch

from wherry_runtime.kernels import reference
from wherry_runtime.kernels.cpu import library
from wherry_runtime.kernels.cpu.library import Pool, Program, Step

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

    def test_silu_mul(self, width: int, rows: int) -> None:
        x = torch.randn(rows, 2 * width) * 8
        source, out = padded(x), padded(torch.full((rows, width), 9.0))
        run("silu_mul", [source, out], [width, source.shape[1], out.shape[1]], Step(rows))
        torch.testing.assert_close(out[:, :width], reference.silu_mul(x), rtol=1e-6, atol=1e-30)
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


def test_silu_of_the_extremes() -> None:
    gate = torch.tensor([-1e30, -100.0, -88.0, -20.0, 0.0, 20.0, 100.0, 1e30, float("nan")])
    x = padded(torch.cat((gate, torch.ones(9)))[None])
    out = torch.zeros(1, 64)
    run("silu_mul", [x, out], [9, 64, 64], Step(1))
    torch.testing.assert_close(
        out[0, :9], torch.nn.functional.silu(gate), rtol=1e-6, atol=1e-7 * 1e-30 + 1e-6, equal_nan=True
    )


def test_rows_are_the_same_in_any_company() -> None:
    x, weight = padded(torch.randn(64, 896)), torch.randn(896)
    whole, one = torch.zeros_like(x), torch.zeros_like(x)
    run("rms_norm", [x, weight, whole], [896, 896, 896, 0], Step(64), 1e-6, threads=3)
    for row in (0, 17, 63):
        run("rms_norm", [x[row], weight, one], [896, 896, 896, 0], Step(1), 1e-6, threads=1)
        assert torch.equal(one[0], whole[row])
