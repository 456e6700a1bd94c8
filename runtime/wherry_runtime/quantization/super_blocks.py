"""Weights with scales in two levels, as GGUF's K-quants have them (https://github.com/ggml-org/llama.cpp/pull/1684).

Codes lie in words of four inputs for the 64 outputs of a panel, as int4's do: a byte has the low four bits of output c
in its lower half and of c + 32 in its upper one, 128 bytes a word. What k5 and k6 have more comes after that, in 64
bytes for outputs c, c + 16, c + 32 and c + 48 at once: two bits each for k6, after every word; one each for k5, after
every second word, the first one's in the lower half of a byte.
"""

from dataclasses import dataclass

import torch

from wherry_runtime.quantization.formats import PANEL, Format
from wherry_runtime.quantization.tensors import split

QUARTERS = 4  # of a panel's outputs


@dataclass(frozen=True, slots=True)
class SuperBlocks:
    """w[n, k] = (d · s) q - (d_min · m), each product rounded to float32.

    Attributes:
        codes: q [N, K] int8, none below -zero of the format that holds it.
        d: [N, K / block] float16.
        scales: s [N, K / group] int8.
        d_min, minima: d_min and m of the same shapes and types, or None.
    """

    codes: torch.Tensor
    d: torch.Tensor
    scales: torch.Tensor
    d_min: torch.Tensor | None
    minima: torch.Tensor | None

    def held_in(self, format_: Format) -> "SuperBlocks":
        """The same values, with groups and super-blocks as `format_` has them, which are no larger, and its minima."""
        columns = self.codes.shape[1]
        blocks, groups = columns // format_.block, columns // format_.group

        def widened(values: torch.Tensor, count: int) -> torch.Tensor:
            return values.repeat_interleave(count // values.shape[1], 1)

        d_min, minima = self.d_min, self.minima
        if format_.minima and (d_min is None or minima is None):
            d_min, minima = torch.zeros_like(self.d), torch.zeros_like(self.scales)
        return SuperBlocks(
            *(self.codes, widened(self.d, blocks), widened(self.scales, groups)),
            None if d_min is None else widened(d_min, blocks),
            None if minima is None else widened(minima, groups),
        )

    def dequantized(self) -> torch.Tensor:
        """[N, K] float32."""
        scales = product(self.d, self.scales)
        values = split(self.codes.float(), 1, (scales.shape[1], -1)) * scales.unsqueeze(-1)
        if self.d_min is not None and self.minima is not None:
            values -= product(self.d_min, self.minima).unsqueeze(-1)
        return values.flatten(1)


def product(d: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """What a super-block's float16 d [N, S] and its groups' whole numbers [N, G] make together: [N, G] float32."""
    return (split(s.float(), 1, (d.shape[1], -1)) * d.float().unsqueeze(-1)).flatten(1)


class Scales:
    """The scales of a matrix in panels: [P][super-blocks] of d [64] float16, d_min [64] float16, and for each group
    s [64] int8 and m [64] int8; without minima, neither d_min nor m.

    Args:
        data: [P, super-blocks, bytes] uint8.
    """

    def __init__(self, data: torch.Tensor, format_: Format) -> None:
        half, levels = 2 * PANEL, 1 + format_.minima
        floats = split(data[..., : half * levels].view(torch.float16), -1, (levels, PANEL))
        bytes_ = split(data[..., half * levels :].view(torch.int8), -1, (-1, levels, PANEL))
        self.d = [floats[..., i, :] for i in range(levels)]  # d and d_min: [P, S, 64]
        self.s = [bytes_[..., i, :] for i in range(levels)]  # s and m: [P, S, groups of a super-block, 64]

    @staticmethod
    def nbytes(format_: Format) -> int:
        """Of a super-block of one panel."""
        return (1 + format_.minima) * PANEL * (2 + format_.block // format_.group)

    def set(self, panels: slice, inside: slice, rows: SuperBlocks) -> None:
        """Puts those of some rows of `panels`, which are rows `inside` of them."""
        put_rows(self.d[0], panels, inside, rows.d)
        put_rows(self.s[0], panels, inside, rows.scales)
        if rows.d_min is not None and rows.minima is not None:
            put_rows(self.d[1], panels, inside, rows.d_min)
            put_rows(self.s[1], panels, inside, rows.minima)

    def get(self, panels: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        """d · s and d_min · m, or None: [64 · panels, groups] float32."""
        found = [product(rows_of(d[panels]), rows_of(s[panels])) for d, s in zip(self.d, self.s, strict=True)]
        return found[0], found[1] if len(found) > 1 else None


def rows_of(view: torch.Tensor) -> torch.Tensor:
    """[panels, …, 64] → [64 · panels, all of …]"""
    return view.movedim(-1, 1).flatten(0, 1).flatten(1)


def put_rows(view: torch.Tensor, panels: slice, inside: slice, rows: torch.Tensor) -> None:
    """Rows [n, m] to rows `inside` of `view[panels]` [panels, …, 64], in which m is all between.

    What `rows` are too short for keeps its value.
    """
    whole = rows_of(view[panels]).clone()
    whole[inside, : rows.shape[1]] = rows
    view[panels] = split(whole, 0, (-1, PANEL)).transpose(1, 2).reshape(view[panels].shape)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[N, Kp] int8, none negative → [P, words, bytes] uint8: see above. N is a multiple of 64."""
    words = split(split(codes.view(torch.uint8), 0, (-1, PANEL)), 2, (-1, 4)).transpose(1, 2)  # [P, words, 64, 4]
    low = torch.bitwise_or(words[:, :, : PANEL // 2] & 15, words[:, :, PANEL // 2 :] << 4).flatten(2)
    if bits == 4:
        return low
    high, more = split(words >> 4, 2, (QUARTERS, -1)), bits - 4
    byte = sum_of_bits([high[:, :, i] << (more * i) for i in range(QUARTERS)]).flatten(2)
    if bits == 6:
        return torch.cat((low, byte), dim=2)
    first, second = byte[:, ::2], byte[:, 1::2]
    return torch.cat((split(low, 1, (-1, 2)).flatten(2), torch.bitwise_or(first, second << 4)), dim=2)


def unpack(data: torch.Tensor, bits: int) -> torch.Tensor:
    """Undoes `pack`."""
    low_bytes = PANEL * 2
    if bits == 5:
        pairs, byte = split(data[..., : 2 * low_bytes], 2, (2, -1)), data[..., 2 * low_bytes :]
        low = pairs.flatten(1, 2)
        extra = torch.stack((byte & 15, byte >> 4), dim=2).flatten(1, 2)
    else:
        low, extra = data[..., :low_bytes], data[..., low_bytes:]
    words = split(torch.cat((low & 15, low >> 4), dim=2), 2, (PANEL, 4))
    if bits > 4:
        more = bits - 4
        high = torch.cat([(extra >> (more * i)) & ((1 << more) - 1) for i in range(QUARTERS)], dim=2)
        words = torch.bitwise_or(words, split(high, 2, (PANEL, 4)) << 4)
    return words.transpose(1, 2).flatten(2).flatten(0, 1).view(torch.int8)


def sum_of_bits(parts: list[torch.Tensor]) -> torch.Tensor:
    """Bytes that share no bit, as one."""
    total = parts[0].clone()
    for part in parts[1:]:
        total |= part
    return total
