"""What attention needs to know about a step, computed once and used by every layer.

Sequences of a step are sorted into *decodes* (one new token) and *prefills* (a chunk of a prompt). Decodes of similar
length share one padded gather and one kernel call; a prefill's queries go in tiles, each over the keys it can see.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from wherry_runtime.scheduling.plan import SequenceStep

QUERY_TILE = 256  # rows of queries per call in prefill: bounds the mask, and skips most keys above the diagonal


@dataclass(slots=True, frozen=True)
class DecodeGroup:
    """Rows `first` … `first + size` of the step: one token of each of `size` sequences."""

    first: int
    size: int
    blocks: torch.Tensor  # [size * width] int64, block tables padded to the same width
    mask: torch.Tensor  # [size, 1, 1, width * block_size], 0 where a key is seen, -inf elsewhere
    distance: torch.Tensor | None = None  # like the mask, float32: how many tokens back a key is


@dataclass(slots=True, frozen=True)
class PrefillTile:
    """Rows `first` … `first + size` of the step over keys `low` … `high` of the sequence's gathered blocks."""

    first: int
    size: int
    low: int
    high: int
    mask: torch.Tensor  # [size, high - low]
    distance: torch.Tensor | None = None  # like the mask, float32: how many tokens back a key is


@dataclass(slots=True, frozen=True)
class Prefill:
    """One sequence's chunk: its blocks, and its queries in tiles."""

    blocks: torch.Tensor  # [width] int64
    tiles: list[PrefillTile]


@dataclass(slots=True, frozen=True)
class AttentionMetadata:
    """The step for layers that share one window."""

    decodes: list[DecodeGroup]
    prefills: list[Prefill]


def sort_sequences(sequences: Iterable[SequenceStep]) -> list[SequenceStep]:
    """Decodes by length, then prefills: the row order that the metadata assumes."""
    return sorted(sequences, key=lambda s: (len(s.tokens) > 1, s.end))


@dataclass(slots=True, frozen=True)
class MetadataBuilder:
    """Builds metadata for a cache with blocks of `block_size`; `padding_block` pads block tables.

    Attributes:
        distances: whether attention looks at how far keys are.
    """

    block_size: int
    padding_block: int
    dtype: torch.dtype
    device: torch.device
    distances: bool = False

    def build(self, sequences: list[SequenceStep], window: int | None) -> AttentionMetadata:
        """For `sequences` in the order of `sort_sequences`; `window` None sees everything before."""
        groups: dict[int, list[tuple[int, SequenceStep]]] = defaultdict(list)
        prefills = []
        row = 0
        for sequence in sequences:
            if len(sequence.tokens) == 1:
                seen = sequence.end if window is None else min(sequence.end, window)
                groups[seen.bit_length()].append((row, sequence))  # at most about twice as long as another
            else:
                prefills.append(self._prefill(row, sequence, window))
            row += len(sequence.tokens)
        return AttentionMetadata([self._decodes(g, window) for g in groups.values()], prefills)

    def _decodes(self, group: list[tuple[int, SequenceStep]], window: int | None) -> DecodeGroup:
        size = self.block_size
        # Blocks wholly before the window are not gathered at all.
        starts = [0 if window is None else max(0, s.end - window) for _, s in group]
        skipped = [start // size for start in starts]
        width = max(-(-s.end // size) - skip for (_, s), skip in zip(group, skipped, strict=True))
        tables = np.full((len(group), width), self.padding_block, dtype=np.int64)
        for index, ((_, sequence), skip) in enumerate(zip(group, skipped, strict=True)):
            used = sequence.blocks[skip : -(-sequence.end // size)]
            tables[index, : len(used)] = used
        base = np.array(skipped) * size
        places = np.arange(width * size)[None, :]
        low = (np.array(starts) - base)[:, None]
        high = (np.array([s.end for _, s in group]) - base)[:, None]
        mask = np.where((places >= low) & (places < high), np.float32(0), np.float32("-inf"))
        distance = None
        if self.distances:
            distance = torch.from_numpy((high - 1 - places).astype(np.float32)).to(self.device)[:, None, None, :]
        return DecodeGroup(
            group[0][0],
            len(group),
            torch.from_numpy(tables.reshape(-1)).to(self.device),
            torch.from_numpy(mask).to(self.device, self.dtype)[:, None, None, :],
            distance,
        )

    def _prefill(self, row: int, sequence: SequenceStep, window: int | None) -> Prefill:
        size = self.block_size
        skip = 0 if window is None else max(0, sequence.start - window + 1) // size
        blocks = torch.tensor(sequence.blocks[skip : -(-sequence.end // size)], dtype=torch.int64, device=self.device)
        tiles = []
        for begin in range(sequence.start, sequence.end, QUERY_TILE):
            end = min(begin + QUERY_TILE, sequence.end)
            low = skip * size if window is None else max(skip * size, begin - window + 1)
            distance = torch.arange(begin, end, device=self.device)[:, None] - torch.arange(
                low, end, device=self.device
            )
            hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
            mask = torch.zeros(end - begin, end - low, dtype=self.dtype, device=self.device)
            mask.masked_fill_(hidden, float("-inf"))
            first = row + begin - sequence.start
            far = distance.float() if self.distances else None
            tiles.append(PrefillTile(first, end - begin, low - skip * size, end - skip * size, mask, far))
        return Prefill(blocks, tiles)
