"""Weight formats: the bits where the kernels expect them, the rounding, and the reference product."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from wherry_runtime.kernels.cpu import library
from wherry_runtime.quantization import native
from wherry_runtime.quantization.activations import quantize_activations
from wherry_runtime.quantization.formats import PANEL, Format
from wherry_runtime.quantization.huge_pages import HUGE_PAGE, Arena
from wherry_runtime.quantization.methods import quantize
from wherry_runtime.quantization.packed import PackedMatrix, linear

FORMATS = [
    Format("float32"),
    Format("bfloat16"),
    *(Format(method, group) for method in ("int8", "int4") for group in (32, 64, 128)),
]
QUANTIZED = [f for f in FORMATS if f.quantized]
SHAPES = [(1, 5), (64, 128), (100, 704), (333, 257)]  # outputs, inputs
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Largest error of a weight relative to its group's largest magnitude: half a step, or what is clipped (9.25 to 7).
TOLERANCE = {"float32": 0.0, "bfloat16": 2**-8, "int8": 0.51 / 127, "int4": 2.26 / 9.25}


def random_rows(num_outputs: int, num_inputs: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of very different sizes, one of zeros, one so small that float16 hardly has its scale."""
    generator = torch.Generator().manual_seed(num_outputs)
    rows = torch.randn(num_outputs, num_inputs, generator=generator)
    rows *= torch.exp(2 * torch.randn(num_outputs, 1, generator=generator))
    if num_outputs > 10:
        rows[7] = 0
        rows[9] *= 1e-7
    return rows.to(dtype)


def new_matrix(format_: Format, num_outputs: int, num_inputs: int) -> PackedMatrix:
    """A matrix in memory that is full of noise, which nobody may read."""

    def allocate(num_bytes: int) -> torch.Tensor:
        memory = Arena().allocate(num_bytes)
        return memory.random_(0, 256, generator=torch.Generator().manual_seed(3))

    return PackedMatrix(format_, num_outputs, num_inputs, allocate)


def fill_in_parts(fill: Callable[[int, torch.Tensor], object], rows: torch.Tensor) -> None:
    """As a fused matrix is filled: parts that begin anywhere, last one first."""
    cuts = sorted({0, rows.shape[0] // 3, rows.shape[0] // 3 * 2 + 1, rows.shape[0]})
    for first, end in reversed(list(itertools.pairwise(cuts))):
        fill(first, rows[first:end])


@pytest.mark.parametrize("format_", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_come_back_within_half_a_step(format_: Format, shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows = random_rows(*shape, dtype)
    matrix = new_matrix(format_, *shape)
    fill_in_parts(matrix.fill_reference, rows)
    restored = matrix.dequantized()
    assert restored.shape == rows.shape
    group = format_.group or 1
    padded = functional.pad(rows.float(), (0, -shape[1] % group)).reshape(shape[0], -1, group)
    top = padded.abs().amax(-1).repeat_interleave(group, 1)[:, : shape[1]]
    # A scale below float16's smallest normal number is coarse: half a step of 2⁻²⁴ times the range.
    allowed = top * TOLERANCE[format_.method] + (127 * 2.0**-25 if format_.quantized else 0)
    assert ((restored - rows.float()).abs() <= allowed).all()


def test_int4_keeps_weights_that_lie_on_its_steps() -> None:
    rows = torch.tensor([[8.0, -7, 3, 0] * 8, [-8.0, 7, -3, 0] * 8, [7.0, -7, 5, 1] * 8, [0.0] * 32]) / 16
    codes, scales = quantize(rows, Format("int4", 32))
    assert scales is not None
    assert (codes[:2].amin(-1) == -8).all()
    assert scales[0] < 0 < scales[1]
    assert torch.equal(codes * scales.float(), rows)
    assert scales[3].view(torch.int16) == 0


@pytest.mark.parametrize("group", (32, 64, 128))
def test_the_search_for_a_scale_beats_the_largest_magnitude(group: int) -> None:
    rows = torch.randn(256, 512, generator=torch.Generator().manual_seed(1))
    matrix = new_matrix(Format("int4", group), 256, 512)
    matrix.fill_reference(0, rows)
    grouped = rows.view(256, -1, group)
    extreme = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))
    plain = (grouped * (-8 / extreme)).round().clamp(-8, 7) * (extreme / -8)
    assert (matrix.dequantized() - rows).square().sum() < 0.95 * (plain - grouped).square().sum()


def expected_bytes(matrix: PackedMatrix, codes: torch.Tensor) -> dict[int, int]:
    """Byte offset → value, from the definition of the layout, one weight at a time."""
    depth, result = matrix.padded_inputs, {}
    for n in range(codes.shape[0]):
        panel, column = divmod(n, PANEL)
        for k in range(depth):
            q = int(codes[n, k])
            if matrix.format.method == "int8":
                result[((panel * depth // 4 + k // 4) * 64 + column) * 4 + k % 4] = q + 128
            else:
                at = ((panel * depth // 4 + k // 4) * 32 + column % 32) * 4 + k % 4
                result[at] = result.get(at, 0) | (q + 8) << (4 if column >= 32 else 0)
    return result


@pytest.mark.parametrize("format_", QUANTIZED[::2], ids=str)
def test_the_layout_is_the_one_that_is_documented(format_: Format) -> None:
    rows = random_rows(70, 130)
    matrix = new_matrix(format_, 70, 130)
    matrix.fill_reference(0, rows)
    padded = functional.pad(rows, (0, matrix.padded_inputs - 130, 0, 58))
    codes, scales = quantize(padded, format_)
    assert matrix.data.tolist() == [v for _, v in sorted(expected_bytes(matrix, codes).items())]
    assert matrix.scales is not None
    assert scales is not None
    for n in range(128):
        assert torch.equal(matrix.scales[n // PANEL, :, n % PANEL], scales[n])


def test_the_layout_of_floats() -> None:
    rows = random_rows(70, 130)
    padded = functional.pad(rows, (0, 126, 0, 58))
    single, half = new_matrix(Format("float32"), 70, 130), new_matrix(Format("bfloat16"), 70, 130)
    single.fill_reference(0, rows)
    half.fill_reference(0, rows)
    assert torch.equal(single.data.view(torch.float32).view(2, 256, 64), padded.view(2, 64, 256).transpose(1, 2))
    pairs = half.data.view(torch.bfloat16).view(2, 128, 64, 2)
    assert torch.equal(pairs, padded.bfloat16().view(2, 64, 128, 2).transpose(1, 2))


@pytest.mark.skipif(not library.available(), reason="no native library")
@pytest.mark.parametrize("format_", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_packing_gives_equal_bits(format_: Format, shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows = random_rows(shape[0], shape[1] + 3, dtype)[:, 1:-2]  # rows that lie apart, and at odd addresses
    expected, packed = new_matrix(format_, *shape), new_matrix(format_, *shape)
    fill_in_parts(expected.fill_reference, rows)

    def fill(first: int, part: torch.Tensor) -> None:
        assert native.fill(packed, first, part)

    fill_in_parts(fill, rows)
    assert torch.equal(packed.data, expected.data)
    if expected.scales is not None and packed.scales is not None:
        assert torch.equal(packed.scales.view(torch.int16), expected.scales.view(torch.int16))


@pytest.mark.skipif(not library.available(), reason="no native library")
@pytest.mark.parametrize("format_", FORMATS, ids=str)
def test_native_packing_by_several_threads(format_: Format) -> None:
    rows = random_rows(1000, 1024)
    expected, packed = new_matrix(format_, 1000, 1024), new_matrix(format_, 1000, 1024)
    expected.fill_reference(0, rows)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert native.fill(packed, 0, rows)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(packed.data, expected.data)


def test_without_a_library_the_reference_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "available", lambda: False)
    rows = random_rows(100, 200)
    matrix, expected = new_matrix(Format("int8", 128), 100, 200), new_matrix(Format("int8", 128), 100, 200)
    matrix.fill(0, rows)
    expected.fill_reference(0, rows)
    assert torch.equal(matrix.data, expected.data)


@pytest.mark.parametrize("first, shape", [(0, (101, 8)), (90, (11, 8)), (-1, (2, 8)), (0, (10, 9))])
def test_rows_that_do_not_fit_are_refused(first: int, shape: tuple[int, int]) -> None:
    matrix = new_matrix(Format("int8", 128), 100, 8)
    with pytest.raises(ValueError, match=r"of \[100, 8\]"):
        matrix.fill(first, torch.zeros(shape))


@pytest.mark.parametrize("method, group", [("int8", 0), ("int4", 16), ("float32", 32), ("bfloat16", 128)])
def test_groups_that_a_format_has_not(method: str, group: int) -> None:
    with pytest.raises(ValueError, match="no groups of"):
        Format(method, group)  # type: ignore[arg-type]


@pytest.mark.parametrize("format_", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_product_is_that_of_the_rounded_operands(format_: Format, shape: tuple[int, int]) -> None:
    rows = random_rows(*shape)
    matrix = new_matrix(format_, *shape)
    matrix.fill_reference(0, rows)
    x = torch.randn(9, shape[1], generator=torch.Generator().manual_seed(5))
    x[3] = 0
    operand = x.double()
    if format_.quantized:
        padded = functional.pad(x, (0, matrix.padded_inputs - shape[1]))
        q, scales = quantize_activations(padded, format_.group)
        assert q.abs().max() == 127
        assert torch.equal(q, q.round())
        operand = (q.double() * scales.double().unsqueeze(-1)).flatten(1)[:, : shape[1]]
        assert (operand - x).abs().max() <= scales.max() * 0.501
    exact = operand @ matrix.dequantized().double().T
    size = operand.abs() @ matrix.dequantized().double().abs().T
    assert ((linear(x, matrix) - exact).abs() <= size * 1e-6).all()


@pytest.mark.parametrize("format_", QUANTIZED, ids=str)
def test_a_row_does_not_depend_on_its_batch(format_: Format) -> None:
    matrix = new_matrix(format_, 100, 704)
    matrix.fill_reference(0, random_rows(100, 704))
    x = torch.randn(33, 704, generator=torch.Generator().manual_seed(6))
    together = linear(x, matrix)
    for row in (0, 17, 32):
        assert torch.equal(linear(x[row : row + 1], matrix)[0], together[row])


def huge_bytes(address: int) -> int:
    """Bytes in huge pages of the mapping that holds `address`."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "AnonHugePages:":
            return int(line.split()[1]) * 1024
    return 0


def thp_allowed() -> bool:
    try:
        return "[never]" not in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return False


@pytest.mark.skipif(not thp_allowed(), reason="transparent huge pages are off")
def test_weights_lie_in_huge_pages() -> None:
    memory = Arena().allocate(16 * HUGE_PAGE)
    assert memory.data_ptr() % HUGE_PAGE == 0
    memory.fill_(1)
    # Memory may be too fragmented for all of it.
    assert huge_bytes(memory.data_ptr()) >= HUGE_PAGE


def test_small_matrices_share_a_region() -> None:
    arena = Arena(chunk=HUGE_PAGE)
    first, second, large, third = (arena.allocate(n) for n in (100, 300, 3 * HUGE_PAGE, 50))
    assert second.data_ptr() - first.data_ptr() == 128
    assert all(t.data_ptr() % 64 == 0 for t in (first, second, large, third))
    assert all(not t.any() for t in (first, second, large, third))
    large.fill_(9)
    assert not any(t.any() for t in (first, second, third))
