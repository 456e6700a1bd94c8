"""A matrix of whole numbers with a scale and a zero point for each group of inputs, apart from how its bits lie."""

from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from wherry_runtime.quantization.formats import GROUPS, Format, padded_inputs

_RANGES = {"int4": (-8, 7), "int8": (-128, 127)}


@dataclass(frozen=True, slots=True)
class Grouped:
    """w[n, k] = (codes[n, k] - zeros[n, g]) · scales[n, g], where g = k // group or what `groups` says.

    Attributes:
        codes: [N, K] uint8, below 2^bits.
        scales: [N, G] of a float dtype, G = ⌈K / group⌉.
        zeros: [N, G] int16.
        groups: [K] int64: each input's group, where they do not lie side by side; or None.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    bits: int
    group: int
    groups: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def ternary(self) -> bool:
        """Whether all weights are -1, 0 or 1 times a scale."""
        return bool((self.zeros == 1).all()) and int(self.codes.max()) <= 2

    def dequantized(self) -> torch.Tensor:
        """[N, K] float32."""
        at = self._columns()
        return (self.codes.to(torch.int16) - self.zeros[:, at]).float() * self.scales.float()[:, at]

    def __getitem__(self, index: tuple[slice | torch.Tensor, slice]) -> "Grouped":
        """Some rows, from one to another or by their numbers (int64), and some columns."""
        rows, columns = index
        start, stop, _ = columns.indices(self.shape[1])
        codes = self.codes[rows, columns]
        if self.groups is not None or start % self.group:
            return replace(self._params(rows, slice(None)), codes=codes, groups=self._columns()[columns])
        return replace(self._params(rows, slice(start // self.group, -(-stop // self.group))), codes=codes)

    def packable(self) -> Format | None:
        """The engine's own format that holds exactly this, with fewest bits; None if none does."""
        return packed_format(self.scales, self.zeros, self.bits, self.group, self.groups)

    def fits(self, format_: Format) -> bool:
        """Whether a matrix in `format_` holds exactly this."""
        own = self.packable()
        if own is None or format_.two_level or not format_.quantized:
            return False
        room = self.ternary if format_.method == "ternary" else own.bits <= format_.bits
        return room and own.group == format_.group

    def packed(self, format_: Format) -> tuple[torch.Tensor, torch.Tensor]:
        """As the engine packs it: [N, Kp] int8 and [N, Kp / format's group] float16, of a format that it `fits`."""
        width = padded_inputs(self.shape[1])
        codes = (self.codes.to(torch.int16) - self.zeros[:, self._columns()]).to(torch.int8)
        first = torch.arange(0, width, format_.group).clamp(max=self.shape[1] - 1) // self.group
        return functional.pad(codes, (0, width - self.shape[1])), self.scales.half()[:, first]

    def _columns(self) -> torch.Tensor:
        return torch.arange(self.shape[1]) // self.group if self.groups is None else self.groups

    def _params(self, rows: slice | torch.Tensor, groups: slice) -> "Grouped":
        return replace(self, scales=self.scales[rows, groups], zeros=self.zeros[rows, groups])


def packed_format(
    scales: torch.Tensor, zeros: torch.Tensor, bits: int, group: int, groups: torch.Tensor | None
) -> Format | None:
    """The engine's own format for a `Grouped` with these parameters, whatever its codes are; None if there is none."""
    if groups is not None and not torch.equal(groups, torch.arange(len(groups)) // group):
        return None
    if not torch.equal(scales.half().float(), scales.float()):
        return None
    own = [g for g in GROUPS if group % g == 0 or scales.shape[1] == 1]
    low, high = -int(zeros.max()), (1 << bits) - 1 - int(zeros.min())
    for method, (least, most) in _RANGES.items():
        if own and least <= low and high <= most:
            return Format("int4" if method == "int4" else "int8", own[-1])
    return None
