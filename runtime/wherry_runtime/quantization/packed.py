"""A matrix in the layout that the native kernels read: panels of 64 outputs, inputs along them, padded with zeros."""

import math
from collections.abc import Callable, Iterator

import torch
from torch.nn import functional

from wherry_runtime.quantization import native
from wherry_runtime.quantization.activations import quantize_activations
from wherry_runtime.quantization.formats import PANEL, Format, padded_inputs
from wherry_runtime.quantization.grouped import Grouped
from wherry_runtime.quantization.methods import PACKINGS, quantize
from wherry_runtime.quantization.tensors import split

Allocate = Callable[[int], torch.Tensor]
PANELS_AT_ONCE = 32  # that the PyTorch reference unpacks: bounds its memory


class PackedMatrix:
    """W [N, K] of a linear layer. Filled by rows in any order; what is not filled is undefined, the padding is zero.

        float32   [P][Kp][64] float32
        bfloat16  [P][Kp / 2][64][2] bfloat16
        int8      [P][Kp / 4][64][4] uint8: q + 128; q in [-127, 127] where it was rounded here
        int4      [P][Kp / 4][32][4] uint8: q + 8, q in [-8, 7]; column c in the low half of a byte, c + 32 in the high
        ternary   [P][Kp][13] uint8: q in [-1, 1], five of them in a byte; in PyTorch only

    P = ⌈N / 64⌉ panels; Kp is K rounded up to a multiple of 128. Quantized weights are q · scale.

    Attributes:
        data: flat uint8, aligned to 64 bytes on CPU.
        scales: [P, Kp / group, 64] float16, or None.
    """

    def __init__(self, format_: Format, num_outputs: int, num_inputs: int, allocate: Allocate) -> None:
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
        if format_.group:
            scales = allocate(2 * weights // format_.group).view(torch.float16)
            self.scales = scales.view(self.num_panels, self.padded_inputs // format_.group, PANEL)
        if num_outputs % PANEL:  # `fill` writes the padding of inputs, but no row beyond its own
            self.data.view(self.num_panels, -1)[-1].fill_(PACKINGS[format_.method].zero)
            if self.scales is not None:
                self.scales[-1].zero_()

    def fill(self, first_row: int, rows: torch.Tensor | Grouped) -> None:
        """Rounds and packs rows [n, K] of any float dtype to where rows `first_row` … first_row + n - 1 are.

        Rows that are whole numbers already are taken as they are, if this matrix's format has room for them.

        Raises:
            ValueError: rows that the matrix does not have, or a number that cannot be rounded.
        """
        if rows.shape[1] != self.num_inputs or not 0 <= first_row <= self.num_outputs - rows.shape[0]:
            raise ValueError(f"rows {list(rows.shape)} from {first_row} on, of [{self.num_outputs}, {self.num_inputs}]")
        if isinstance(rows, Grouped):
            if self._holds(rows):
                self._fill_codes(first_row, rows)
                return
            rows = rows.dequantized()
        if self.format.method == "ternary":
            raise ValueError("weights are rounded to ternary ones by --method ternary, not as they are loaded")
        # One sum sees any of them, at the speed of memory.
        if self.format.quantized and not math.isfinite(float(rows.sum(dtype=torch.float32))):
            raise ValueError(f"a weight is infinite or not a number, which {self.format} cannot hold")
        if not native.fill(self, first_row, rows):
            self.fill_reference(first_row, rows)

    def _holds(self, rows: Grouped) -> bool:
        """Whether this matrix's format has room for exactly these."""
        own = rows.packable()
        if own is None or not self.format.quantized or own.group != self.format.group:
            return False
        return rows.ternary if self.format.method == "ternary" else own.bits <= self.format.bits

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

    def _fill_codes(self, first_row: int, rows: Grouped) -> None:
        end = first_row + rows.shape[0]
        for start in range(first_row // PANEL, -(-end // PANEL), PANELS_AT_ONCE):
            stop = min(start + PANELS_AT_ONCE, -(-end // PANEL))
            top, bottom = max(first_row, start * PANEL), min(end, stop * PANEL)
            part = rows[top - first_row : bottom - first_row, :]
            codes, scales = (t.to(self.data.device) for t in part.signed(self.format))
            self._set(slice(start, stop), slice(top - start * PANEL, bottom - start * PANEL), codes, scales)

    def _set(self, panels: slice, inside: slice, codes: torch.Tensor, scales: torch.Tensor | None) -> None:
        self._set_codes(panels, inside, codes)
        if self.scales is not None and scales is not None:
            whole = self.scales[panels].transpose(1, 2).flatten(0, 1).clone()
            whole[inside] = scales
            self.scales[panels] = split(whole, 0, (-1, PANEL)).transpose(1, 2)

    def codes(self, panels: slice) -> torch.Tensor:
        """The elements of some panels, unpacked: [64 · panels, Kp], int8 of quantized formats, floats of the others."""
        return PACKINGS[self.format.method].unpack(self._elements()[panels])

    def dequantized(self) -> torch.Tensor:
        """[N, K] float32."""
        parts = []
        for panels in self._chunks():
            codes = self.codes(panels).float()
            if self.scales is not None:
                scales = self.scales[panels].float().transpose(1, 2).flatten(0, 1)
                codes = (split(codes, 1, (-1, self.format.group)) * scales.unsqueeze(-1)).flatten(1)
            parts.append(codes)
        return torch.cat(parts)[: self.num_outputs, : self.num_inputs]

    def _elements(self) -> torch.Tensor:
        packing = PACKINGS[self.format.method]
        return self.data.view(packing.dtype).view(packing.shape(self.num_panels, self.padded_inputs))

    def _set_codes(self, panels: slice, inside: slice, codes: torch.Tensor) -> None:
        packing = PACKINGS[self.format.method]
        whole = packing.unpack(self._elements()[panels]).clone()
        whole[inside] = codes
        self._elements()[panels] = packing.pack(whole)

    def _chunks(self) -> Iterator[slice]:
        return (slice(p, min(p + PANELS_AT_ONCE, self.num_panels)) for p in range(0, self.num_panels, PANELS_AT_ONCE))


def linear(x: torch.Tensor, matrix: PackedMatrix) -> torch.Tensor:
    """y = x Wᵀ in PyTorch: the reference of the native kernels, and what runs where there are none.

    Quantized formats take x as int8 too, in the same groups: y[n] = Σ_g scale[n, g] · scale_x[g] · Σ_k q[n, k] q_x[k],
    where the inner sum is exact (it is below 2²⁴, so float32 holds it) and the outer goes up in float32.

    Args:
        x: [T, K], any float dtype.

    Returns:
        [T, N] float32.
    """
    padded = functional.pad(x.float(), (0, matrix.padded_inputs - matrix.num_inputs))
    parts = []
    if matrix.scales is None:
        parts = [padded @ matrix.codes(panels).float().T for panels in matrix._chunks()]
    else:
        q, x_scales = quantize_activations(padded, matrix.format.group)
        parts = [_grouped(q, x_scales, matrix, panels) for panels in matrix._chunks()]
    return torch.cat(parts, dim=1)[:, : matrix.num_outputs]


def _grouped(q: torch.Tensor, x_scales: torch.Tensor, matrix: PackedMatrix, panels: slice) -> torch.Tensor:
    codes = split(matrix.codes(panels).float(), 1, (-1, matrix.format.group))
    if matrix.scales is None:
        raise TypeError(f"{matrix.format} has no scales")
    scales = matrix.scales[panels].float().transpose(1, 2).flatten(0, 1)
    total = q.new_zeros(q.shape[0], codes.shape[0])
    for g in range(codes.shape[1]):
        exact = q[:, g] @ codes[:, g].T
        total += exact * (x_scales[:, g : g + 1] * scales[:, g])
    return total
