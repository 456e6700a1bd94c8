"""A matrix in the layout that the native kernels read: panels of 64 outputs, inputs along them, padded with zeros."""

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional

from wherry_runtime.quantization import native
from wherry_runtime.quantization.activations import quantize_activations
from wherry_runtime.quantization.formats import PANEL, Format, padded_inputs
from wherry_runtime.quantization.mapped import Mapped, let_go
from wherry_runtime.quantization.methods import PACKINGS, quantize
from wherry_runtime.quantization.super_blocks import Scales, SuperBlocks, put_rows, rows_of
from wherry_runtime.quantization.tensors import split

Allocate = Callable[[int], torch.Tensor]
PACKED_AT_ONCE = 32 << 20  # bytes of a file that are in memory beside what they become
PANELS_AT_ONCE = 32  # that the PyTorch reference unpacks: bounds its memory


class Codes(Protocol):
    """Rows of a matrix that are whole numbers with scales already, however their bits lie."""

    @property
    def shape(self) -> tuple[int, int]:
        """N, K."""

    def __getitem__(self, index: tuple[slice | torch.Tensor, slice]) -> "Codes":
        """Some rows, from one to another or by their numbers (int64), and some columns."""

    def dequantized(self) -> torch.Tensor:
        """[N, K] float32."""

    def fits(self, format_: Format) -> bool:
        """Whether a matrix in `format_` holds exactly this."""

    def packed(self, format_: Format) -> tuple[torch.Tensor, torch.Tensor | SuperBlocks]:
        """Codes [N, Kp] int8 and scales: float16 [N, Kp / group], or those of super-blocks."""


Rows = torch.Tensor | Codes


@dataclass(frozen=True, slots=True)
class Turned:
    """Codes [N, K] in the place of a matrix that its checkpoint would have as [K, N], if it were not quantized."""

    rows: Codes

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.shape[1], self.rows.shape[0]

    def t(self) -> Codes:
        """As they are."""
        return self.rows


class PackedMatrix:
    """W [N, K] of a linear layer. Filled by rows in any order; what is not filled is undefined, the padding is zero.

        float32   [P][Kp][64] float32
        bfloat16  [P][Kp / 2][64][2] bfloat16
        int8      [P][Kp / 4][64][4] uint8: q + 128; q in [-127, 127] where it was rounded here
        int4      [P][Kp / 4][32][4] uint8: q + 8, q in [-8, 7]; column c in the low half of a byte, c + 32 in the high
        ternary   [P][Kp][13] uint8: q in [-1, 1], five of them in a byte; in PyTorch only

        k4, k5, k6  see super_blocks: q + zero

    P = ⌈N / 64⌉ panels; Kp is K rounded up to a multiple of 128. Quantized weights are q · scale; those of k4 … k6 have
    minima, too.

    Args:
        mapped: rows of this matrix's own type that lie in a mapped file stay there until `settle`, if their shape needs
            no padding. The native kernels compute with them as they are, to the same bits.

    Attributes:
        data: flat uint8, aligned to 64 bytes on CPU.
        scales: [P, Kp / group, 64] float16, [P, ⌈Kp / block⌉, bytes] uint8 of k4 … k6 (see `Scales`), or None.
        dtype: of the packed elements.
        rows: [1 + N] int64: 1 until the rows are packed, then the address of each; None: they never stayed elsewhere.
    """

    def __init__(
        self, format_: Format, num_outputs: int, num_inputs: int, allocate: Allocate, mapped: Mapped | None = None
    ) -> None:
        self.format = format_
        self.num_outputs = num_outputs
        self.num_inputs = num_inputs
        self.num_panels = -(-num_outputs // PANEL)
        self.padded_outputs = self.num_panels * PANEL
        self.padded_inputs = padded_inputs(num_inputs)
        weights = self.padded_outputs * self.padded_inputs
        packing = PACKINGS[format_.method]
        shape = packing.shape(self.num_panels, self.padded_inputs)
        self.data = allocate(math.prod(shape) * packing.dtype.itemsize)
        self.scales: torch.Tensor | None = None
        if format_.two_level:
            shape = (self.num_panels, -(-self.padded_inputs // format_.block), Scales.nbytes(format_))
            self.scales = allocate(math.prod(shape)).view(shape)
            self.scales.zero_()  # a rank's part may end inside a super-block
        elif format_.group:
            scales = allocate(2 * weights // format_.group).view(torch.float16)
            self.scales = scales.view(self.num_panels, self.padded_inputs // format_.group, PANEL)
        self.rows: torch.Tensor | None = None
        exact = not format_.quantized and num_inputs == self.padded_inputs and num_outputs == self.padded_outputs
        self._mapped = mapped if exact else None
        self._left: list[
            tuple[int, torch.Tensor]
        ] = []  # rows that stay where they are, each with its first row's number
        self._mapping: list[torch.Tensor] = []
        self._settling = threading.Lock()
        self.dtype = PACKINGS[format_.method].dtype
        if num_outputs % PANEL:  # `fill` writes the padding of inputs, but no row beyond its own
            self.data.view(self.num_panels, -1)[-1].fill_(PACKINGS[format_.method].zero)
            if self.scales is not None:
                self.scales[-1].zero_()

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K]"""
        return self.num_outputs, self.num_inputs

    def fill(self, first_row: int, rows: Rows) -> None:
        """Rounds and packs rows [n, K] of any float dtype to where rows `first_row` … first_row + n - 1 are.

        Rows that are whole numbers already are taken as they are, if this matrix's format has room for them.

        Raises:
            ValueError: rows that the matrix does not have, or a number that cannot be rounded.
        """
        if rows.shape[1] != self.num_inputs or not 0 <= first_row <= self.num_outputs - rows.shape[0]:
            raise ValueError(f"rows {list(rows.shape)} from {first_row} on, of [{self.num_outputs}, {self.num_inputs}]")
        if not isinstance(rows, torch.Tensor):
            if rows.fits(self.format):
                self._fill_codes(first_row, rows)
                return
            rows = rows.dequantized()
        if self.format.two_level or self.format.method == "ternary":
            raise ValueError(f"{self.format} takes what was quantized that way, and no other weights")
        if self._mapped is not None:
            if self._leave(first_row, rows, self._mapped):
                return
            # The kernels take all of a matrix from rows, or nothing.
            self._mapped = None
            self.settle()
        # One sum sees any of them, at the speed of memory.
        if self.format.quantized and not math.isfinite(float(rows.sum(dtype=torch.float32))):
            raise ValueError(f"a weight is infinite or not a number, which {self.format} cannot hold")
        self._pack(first_row, rows)

    def _pack(self, first_row: int, rows: torch.Tensor, threads: int | None = None) -> None:
        if not native.fill(self, first_row, rows, threads):
            self.fill_reference(first_row, rows)

    def _leave(self, first_row: int, rows: torch.Tensor, mapped: Mapped) -> bool:
        """Notes where `rows` are instead of packing them, if they can stay there."""
        if rows.dtype is not self.dtype or rows.stride(1) != 1 or not mapped.keep(rows):
            return False
        if self.rows is None:
            self.rows = torch.zeros(1 + self.num_outputs, dtype=torch.int64)
        addresses = rows.data_ptr() + torch.arange(len(rows)) * (rows.stride(0) * rows.itemsize)
        self.rows[1 + first_row : 1 + first_row + len(rows)] = addresses
        self.rows[0] = 1
        self._left.append((first_row, rows))
        return True

    def settle(self, threads: int | None = None) -> None:
        """Packs rows that stayed where they were read from, and lets their pages go. The kernels may run meanwhile.

        Args:
            threads: None: as many as PyTorch has.
        """
        with self._settling, torch.inference_mode():  # as what was loaded is
            for first_row, rows in self._left:
                at_once = max(1, PACKED_AT_ONCE // (rows.shape[1] * rows.itemsize * PANEL)) * PANEL
                for start in range(0, len(rows), at_once):
                    piece = rows[start : start + at_once]
                    self._pack(first_row + start, piece, threads)
                    _let_go(piece)
            if self.rows is not None:
                self.rows[0] = 0
            for _, rows in self._left:  # which somebody may have read meanwhile
                _let_go(rows)
            # A kernel that looked before may still read them: the file stays mapped, which takes no memory.
            self._mapping += [rows for _, rows in self._left]
            self._left.clear()

    def fill_reference(self, first_row: int, rows: torch.Tensor) -> None:
        """`fill` in PyTorch; the native one gives equal bits."""
        end = first_row + rows.shape[0]
        for start in range(first_row // PANEL, -(-end // PANEL), PANELS_AT_ONCE):
            stop = min(start + PANELS_AT_ONCE, -(-end // PANEL))
            top, bottom = max(first_row, start * PANEL), min(end, stop * PANEL)
            source = rows[top - first_row : bottom - first_row].to(self.data.device)
            padded = functional.pad(source, (0, self.padded_inputs - self.num_inputs))
            self._set(
                slice(start, stop), slice(top - start * PANEL, bottom - start * PANEL), *quantize(padded, self.format)
            )

    def _fill_codes(self, first_row: int, rows: Codes) -> None:
        end = first_row + rows.shape[0]
        for start in range(first_row // PANEL, -(-end // PANEL), PANELS_AT_ONCE):
            stop = min(start + PANELS_AT_ONCE, -(-end // PANEL))
            top, bottom = max(first_row, start * PANEL), min(end, stop * PANEL)
            codes, scales = rows[top - first_row : bottom - first_row, :].packed(self.format)
            if isinstance(scales, torch.Tensor):
                codes, scales = codes.to(self.data.device), scales.to(self.data.device)
            self._set(slice(start, stop), slice(top - start * PANEL, bottom - start * PANEL), codes, scales)

    def _set(
        self, panels: slice, inside: slice, codes: torch.Tensor, scales: torch.Tensor | SuperBlocks | None
    ) -> None:
        self._set_codes(panels, inside, codes)
        if self.scales is None or scales is None:
            return
        if isinstance(scales, SuperBlocks):
            Scales(self.scales, self.format).set(panels, inside, scales)
        else:
            put_rows(self.scales, panels, inside, scales)

    def codes(self, panels: slice) -> torch.Tensor:
        """The elements of some panels, unpacked: [64 · panels, Kp], int8 of quantized formats, floats of the others."""
        codes = PACKINGS[self.format.method].unpack(self._elements()[panels])
        return codes - self.format.zero if self.format.zero else codes

    def group_scales(self, panels: slice) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Scales and minima of some panels: [64 · panels, groups] float32 each; None where weights have none."""
        if self.scales is None:
            return None
        if self.format.two_level:
            groups = self.padded_inputs // self.format.group
            scales, minima = Scales(self.scales, self.format).get(panels)
            return scales[:, :groups], None if minima is None else minima[:, :groups]
        return rows_of(self.scales[panels]).float(), None

    def lookup(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of a float matrix: index [T] int64 → [T, K] in the matrix's own type."""
        self.settle()
        found = self._elements()[index // PANEL, :, index % PANEL]
        return found.flatten(1)[:, : self.num_inputs]

    def dequantized(self) -> torch.Tensor:
        """[N, K] float32."""
        self.settle()
        parts = []
        for panels in self._chunks():
            codes = self.codes(panels).float()
            if (found := self.group_scales(panels)) is not None:
                scales, minima = found
                codes = split(codes, 1, (-1, self.format.group)) * scales.unsqueeze(-1)
                codes = (codes if minima is None else codes - minima.unsqueeze(-1)).flatten(1)
            parts.append(codes)
        return torch.cat(parts)[: self.num_outputs, : self.num_inputs]

    def _elements(self) -> torch.Tensor:
        packing = PACKINGS[self.format.method]
        return self.data.view(packing.dtype).view(packing.shape(self.num_panels, self.padded_inputs))

    def _set_codes(self, panels: slice, inside: slice, codes: torch.Tensor) -> None:
        packing = PACKINGS[self.format.method]
        if self.format.zero:
            codes = codes + self.format.zero
        if len(codes) < (panels.stop - panels.start) * PANEL:  # others' rows are in these panels
            whole = packing.unpack(self._elements()[panels]).clone()
            whole[inside] = codes
            codes = whole
        self._elements()[panels] = packing.pack(codes)

    def _chunks(self) -> Iterator[slice]:
        return (slice(p, min(p + PANELS_AT_ONCE, self.num_panels)) for p in range(0, self.num_panels, PANELS_AT_ONCE))


def _let_go(rows: torch.Tensor) -> None:
    if rows.is_contiguous():  # between the rows of others there may be what somebody else needs
        let_go(rows)


Table = torch.Tensor | PackedMatrix


def lookup(table: Table, index: torch.Tensor) -> torch.Tensor:
    """Rows `index` [T] of a table [V, K]: [T, K]."""
    return table.lookup(index) if isinstance(table, PackedMatrix) else functional.embedding(index, table)


def linear(x: torch.Tensor, matrix: PackedMatrix) -> torch.Tensor:
    """y = x Wᵀ in PyTorch: the reference of the native kernels, and what runs where there are none.

    Quantized formats take x as int8 too, in the same groups: y[n] = Σ_g scale[n, g] · scale_x[g] · Σ_k q[n, k] q_x[k],
    where the inner sum is exact (it is below 2²⁴, so float32 holds it) and the outer goes up in float32. Where there
    are minima, minimum[n, g] · scale_x[g] · Σ_k q_x[k] is taken away. What the format takes for outliers of x is left
    out of all that, and multiplied as it is.

    Args:
        x: [T, K], any float dtype.

    Returns:
        [T, N] float32.
    """
    matrix.settle()
    padded = functional.pad(x.float(), (0, matrix.padded_inputs - matrix.num_inputs))
    parts = []
    if matrix.scales is None:
        parts = [padded @ matrix.codes(panels).float().T for panels in matrix._chunks()]
    else:
        large = padded.abs() >= (matrix.format.outliers or math.inf)
        q, x_scales = quantize_activations(padded.masked_fill(large, 0), matrix.format.group)
        parts = [_grouped(q, x_scales, matrix, panels) for panels in matrix._chunks()]
        if matrix.format.outliers and large.any():
            return torch.cat(parts, dim=1)[:, : matrix.num_outputs] + _apart(padded.masked_fill(~large, 0), matrix)
    return torch.cat(parts, dim=1)[:, : matrix.num_outputs]


def _apart(x: torch.Tensor, matrix: PackedMatrix) -> torch.Tensor:
    """x Wᵀ for an x [T, Kp] most columns of which are zero."""
    columns = x.any(dim=0).nonzero().flatten()
    parts = []
    for panels in matrix._chunks():
        found = matrix.group_scales(panels)
        if found is None:
            raise TypeError(f"{matrix.format} has no scales")
        weights = matrix.codes(panels)[:, columns].float() * found[0][:, columns // matrix.format.group]
        parts.append(x[:, columns] @ weights.T)
    return torch.cat(parts, dim=1)[:, : matrix.num_outputs]


def _grouped(q: torch.Tensor, x_scales: torch.Tensor, matrix: PackedMatrix, panels: slice) -> torch.Tensor:
    codes = split(matrix.codes(panels).float(), 1, (-1, matrix.format.group))
    found = matrix.group_scales(panels)
    if found is None:
        raise TypeError(f"{matrix.format} has no scales")
    scales, minima = found
    total = q.new_zeros(q.shape[0], codes.shape[0])
    for g in range(codes.shape[1]):
        exact = q[:, g] @ codes[:, g].T
        total += exact * (x_scales[:, g : g + 1] * scales[:, g])
        if minima is not None:
            total -= (x_scales[:, g : g + 1] * q[:, g].sum(-1, keepdim=True)) * minima[:, g]
    return total
