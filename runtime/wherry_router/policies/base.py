"""What a policy is asked, what it may look at, and what it answers."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar

import msgspec


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a request when a replica is chosen for it.

    Attributes:
        prompt_bytes: of the prompt as it is written out for keys.
        prompt_tokens: of the prompt, estimated from its length.
        output_tokens: expected.
        keys: of the prompt's beginnings, as `wherry_protocol.prefix` makes them; empty where the policy reads none.
        tokens_per_key: how many tokens one more key stands for.
        session: what the client calls its session; empty where it does not.
    """

    prompt_bytes: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    keys: Sequence[int] = ()
    tokens_per_key: float = 0.0
    session: str = ""


ANYTHING = Ask()


class Candidate(Protocol):
    """A replica that may be chosen."""

    @property
    def identity(self) -> int:
        """64 bits by which every router knows it."""

    @property
    def load_requests(self) -> int:
        """Requests there, other routers' included as far as its last report tells."""

    @property
    def load_tokens(self) -> int:
        """Tokens of prompts and answers that it still owes, other routers' included."""

    @property
    def last_chosen(self) -> int:
        """Number of the last choice that fell on it."""

    def cached_tokens(self, ask: Ask) -> int:
        """Tokens of the prompt that are in its prefix cache, or will be since this router sent them there."""


C = TypeVar("C", bound=Candidate)


class Choice(NamedTuple):
    """The chosen one of the candidates, by its index, and the reason in one word, for metrics."""

    which: int
    reason: str


class Policy(Protocol):
    """Decides by what candidates look like now; any state of its own is its random numbers."""

    reads_prefixes: bool

    def choose(self, candidates: Sequence[Candidate], ask: Ask) -> Choice:
        """One of `candidates`, of which there is at least one."""
