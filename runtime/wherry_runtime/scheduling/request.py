"""A request as the scheduler sees it: token ids, blocks and progress."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from wherry_runtime.scheduling.digest import Mark
from wherry_runtime.scheduling.plan import BlockTable


def _no_blocks() -> BlockTable:
    return np.empty(0, dtype=np.int32)


@dataclass(slots=True, eq=False)
class Request:
    """One generation.

    `tokens` holds the prompt and then the answer; `num_computed` of them have their keys and values in `blocks`.
    The invariant between steps is `num_computed < len(tokens)`: the newest token is always still to be computed.

    Steps are planned ahead of the one that is computing, so there is a second count: `num_planned` tokens are computed
    once all plans in flight are, and these draw `num_unknown` tokens that nobody knows yet.
    """

    id: str
    tokens: list[int]
    max_new_tokens: int
    priority: int = 0
    salt: bytes = b""  # requests with different salts never share cached blocks
    marks: Sequence[Mark] = ()  # what routers know the prompt's blocks by
    num_resumed: int = 0  # of `tokens` at first: the beginning of the answer, which another engine has drawn
    num_prompt: int = field(init=False)
    most_computed: int = field(init=False)  # the answer's last token never is: nothing follows it
    num_computed: int = 0
    num_planned: int = 0
    num_unknown: int = 0
    in_flight: int = 0  # plans with this request that are not committed
    speculating: bool = False  # a plan in flight has drafts, so the length after it is not known
    num_blocks: int = 0
    blocks: BlockTable = field(default_factory=_no_blocks)
    hashes: list[bytes] = field(default_factory=list)  # of full blocks, as far as anyone needed them
    num_registered: int = 0  # leading blocks that the prefix cache knows
    num_marked: int = 0  # leading `marks` that the prefix cache knows
    cached_tokens: int = 0  # of the prompt, found in the prefix cache when it was first admitted
    preemptions: int = 0
    arrival: int = -1  # set by the scheduler
    rank: tuple[int, int] = (0, 0)  # sort key: higher priority first, then by arrival; set by the scheduler
    _table: BlockTable = field(
        default_factory=_no_blocks
    )  # `blocks` is its beginning; twice as large whenever it is full

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens) - self.num_resumed
        self.most_computed = self.num_prompt + self.max_new_tokens - 1

    @property
    def num_new(self) -> int:
        """Tokens answered so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def remaining(self) -> int:
        """Tokens that are to be planned; 1 while decoding, 0 if the plans in flight draw its last token."""
        if self.speculating:
            return 0
        known = len(self.tokens) + self.num_unknown
        return (known if known < self.most_computed else self.most_computed) - self.num_planned

    def add_blocks(self, blocks: Sequence[int]) -> None:
        """Lengthens the block table. Tables handed out before stay as they are."""
        used = self.num_blocks
        needed = used + len(blocks)
        if needed > len(self._table):
            table = np.empty(max(needed, 2 * len(self._table), 8), dtype=np.int32)
            table[:used] = self.blocks
            self._table = table
        self._table[used:needed] = blocks
        self.blocks = self._table[:needed]
        self.num_blocks = needed

    def take_blocks(self) -> list[int]:
        """Empties the block table; what was in it."""
        blocks: list[int] = self.blocks.tolist()
        self.blocks = self._table = _no_blocks()
        self.num_blocks = 0
        return blocks
