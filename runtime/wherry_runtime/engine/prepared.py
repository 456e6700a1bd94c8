"""A step between the scheduler and the device."""

from dataclasses import dataclass
from typing import Any

from wherry_runtime.scheduling.plan import SequenceStep


@dataclass(slots=True, frozen=True)
class Prepared:
    """A step as far as it is known before the tokens of the step before it.

    Lists, not arrays: most steps have few rows, and for those NumPy's calls cost more than the arithmetic.
    """

    sequences: list[SequenceStep]  # in row order; `tokens` is read by `run`, not earlier
    positions: list[int]  # [T]
    slots: list[int]  # [T]: block * block_size + offset
    sampled_rows: list[int]
    ids: list[str]  # of the sequences that sample
    work: Any = None  # what the model made of all this ahead
