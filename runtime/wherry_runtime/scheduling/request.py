"""A request as the scheduler sees it: token ids, blocks and progress."""

from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Request:
    """One generation.

    `tokens` holds the prompt and then the answer; `num_computed` of them have their keys and values in `blocks`.
    The invariant between steps is `num_computed < len(tokens)`: the newest token is always still to be computed.
    """

    id: str
    tokens: list[int]
    max_new_tokens: int
    priority: int = 0
    salt: bytes = b""  # requests with different salts never share cached blocks
    num_prompt: int = field(init=False)
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)  # of full blocks, as far as anyone needed them
    num_registered: int = 0  # leading blocks that the prefix cache knows
    cached_tokens: int = 0  # of the prompt, found in the prefix cache when it was first admitted
    preemptions: int = 0
    arrival: int = -1  # set by the scheduler

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens)

    @property
    def num_new(self) -> int:
        """Tokens answered so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def remaining(self) -> int:
        """Known tokens that are still to be computed; 1 while decoding."""
        return len(self.tokens) - self.num_computed

    @property
    def rank(self) -> tuple[int, int]:
        """Sort key: higher priority first, then by arrival."""
        return (-self.priority, self.arrival)
