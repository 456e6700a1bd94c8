"""A step's input as the kernels read it: one array of int32, so that one copy brings it to the device.

    token ids, positions, slots [rows] · sampled rows [sampled] · lengths, tables [decodes] · for each window: work [2],
    first items [decodes + 1], first parts [decodes] · tiles [tiles, 4] · block tables · for each window: rows of items

What a captured graph reads has its place by the bucket alone; what has no fixed one (block tables, items) is found
through what has. Rows that fill a bucket up have length 0 and slot -1: they attend to nothing, and nothing is kept.
"""

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from wherry_runtime.engine.prepared import Prepared
from wherry_runtime.kernels.cuda.attention_decode import PART, DecodeWork

Int32s = npt.NDArray[np.int32]
Window = int | None


@dataclass(slots=True, frozen=True)
class Shape:
    """Everything that the places of a step's arrays follow from."""

    rows: int
    sampled: int
    decodes: int
    tiles: int
    windows: tuple[Window, ...]

    def places(self) -> list[slice]:
        """Of the arrays that have a place of their own, in order. Each begins on 16 bytes: kernels are compiled for
        pointers that do, and once more for others."""
        per_window = [2, self.decodes + 1, self.decodes] * len(self.windows)
        sizes = [self.rows] * 3 + [self.sampled] + [self.decodes] * 2 + per_window + [4 * self.tiles]
        ends = list(accumulate(-(-size // 4) * 4 for size in sizes))
        return [slice(start, start + size) for start, size in zip([0, *ends], sizes, strict=False)]


@dataclass(slots=True, frozen=True)
class Step:
    """Views of a step's memory on the device."""

    memory: torch.Tensor
    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    sampled_rows: torch.Tensor
    lengths: torch.Tensor
    tables: torch.Tensor
    work: dict[Window, DecodeWork]
    tiles: torch.Tensor  # [tiles, 4]

    @classmethod
    def of(cls, memory: torch.Tensor, shape: Shape) -> "Step":
        parts = [memory[place] for place in shape.places()]
        windows = {w: DecodeWork(*parts[6 + 3 * i : 9 + 3 * i]) for i, w in enumerate(shape.windows)}
        token_ids, positions, slots, sampled_rows, lengths, tables = parts[:6]
        tiles = parts[-1].view(-1, 4)
        return cls(memory, token_ids, positions, slots, sampled_rows, lengths, tables, windows, tiles)


@dataclass(slots=True, frozen=True)
class Packed:
    """A step on the host."""

    shape: Shape
    numbers: Int32s
    items: int  # the most of any window

    @property
    def graphable(self) -> bool:
        """Whether every sequence has one token."""
        return self.shape.tiles == 0


def pack(
    prepared: Prepared,
    windows: tuple[Window, ...],
    block_size: int,
    tile_tokens: int,
    bucket: int | None = None,
) -> Packed:
    """Lays a step out.

    Args:
        prepared: sequences with one token come first, as the model runner sorts them.
        windows: the windows that layers have.
        tile_tokens: tokens in a tile of a prompt's queries.
        bucket: fill up to so many rows, all of which are decodes that draw a token.
    """
    sequences = prepared.sequences
    num_decodes = sum(len(s.tokens) == 1 for s in sequences)
    num_rows = len(prepared.positions)
    used = [-(-s.end // block_size) for s in sequences]
    tiles = _tiles(prepared, num_decodes, tile_tokens)
    if bucket is None:
        shape = Shape(num_rows, len(prepared.sampled_rows), num_decodes, len(tiles), windows)
    else:
        shape = Shape(bucket, bucket, bucket, 0, windows)
    places = shape.places()
    fixed = places[-1].stop
    starts = fixed + np.concatenate(([0], np.cumsum(used, dtype=np.int64)))
    lengths = np.array([s.end for s in sequences[:num_decodes]], dtype=np.int64)
    work = [_work(lengths, window) for window in windows]
    end = int(starts[-1])
    numbers = np.zeros(end + sum(len(w[2]) for w in work), dtype=np.int32)
    arrays = [numbers[place] for place in places]
    arrays[0][:num_rows] = [token for s in sequences for token in s.tokens]
    arrays[1][:num_rows] = prepared.positions
    arrays[2][:] = -1
    arrays[2][:num_rows] = prepared.slots
    arrays[3][: len(prepared.sampled_rows)] = prepared.sampled_rows
    arrays[4][:num_decodes] = lengths
    arrays[5][:num_decodes] = starts[:num_decodes]
    for index, (first_items, first_parts, rows) in enumerate(work):
        arrays[6 + 3 * index][:] = (len(rows), end)
        arrays[7 + 3 * index][:] = first_items[-1]
        arrays[7 + 3 * index][: num_decodes + 1] = first_items
        arrays[8 + 3 * index][:num_decodes] = first_parts
        numbers[end : end + len(rows)] = rows
        end += len(rows)
    if len(tiles):
        tiles[:, 3] = starts[tiles[:, 3]]
        arrays[-1][:] = tiles.reshape(-1)
    if sequences:
        tables = [s.blocks[:count] for s, count in zip(sequences, used, strict=True)]
        numbers[fixed : int(starts[-1])] = np.concatenate(tables)
    return Packed(shape, numbers, max((len(w[2]) for w in work), default=0))


def _work(lengths: npt.NDArray[np.int64], window: Window) -> tuple[npt.NDArray[np.int64], ...]:
    """First items [rows + 1], first parts [rows], and the row of each item."""
    low = np.zeros_like(lengths) if window is None else np.maximum(lengths - window, 0)
    first_parts = low // PART
    counts = -(-lengths // PART) - first_parts
    first_items = np.concatenate(([0], np.cumsum(counts)))
    return first_items, first_parts, np.repeat(np.arange(len(lengths)), counts)


def _tiles(prepared: Prepared, num_decodes: int, tile_tokens: int) -> npt.NDArray[np.int64]:
    """[tiles, 4]: first row, tokens, first position, and the sequence's number. Those with the most keys first: they
    take the longest, and the GPU takes tiles in order."""
    tiles = []
    row = num_decodes
    for index, sequence in enumerate(prepared.sequences[num_decodes:], num_decodes):
        for start in range(0, len(sequence.tokens), tile_tokens):
            count = min(tile_tokens, len(sequence.tokens) - start)
            tiles.append((row + start, count, sequence.start + start, index))
        row += len(sequence.tokens)
    tiles.sort(key=lambda tile: -tile[2])
    return np.array(tiles, dtype=np.int64).reshape(-1, 4)
