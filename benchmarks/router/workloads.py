"""Requests as they come in: conversations that go on, and prompts that begin alike. Drawn from a seed, no clock."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

TOKEN_BYTES = 4  # as simulated workers count


def text(name: str, tokens: int) -> str:
    """Text of so many tokens that nobody else has, and that is the same for the same name."""
    draw = random.Random(name)
    return "".join(f"{draw.randrange(4096):03x} " for _ in range(tokens))


@dataclass
class Turn:
    """One request of a session: what is added to the conversation, and after which pause (s) since the last answer."""

    added: str
    output: int
    pause_s: float = 0.0


@dataclass
class Session:
    """A conversation: when it begins (s), and its turns."""

    at: float
    name: str
    turns: list[Turn]
    history: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class MultiTurn:
    """Conversations about a document of their own, under one system prompt for all."""

    system: int = 256
    document: int = 2500
    question: int = 60
    output: int = 100
    turns: int = 6
    pause_s: float = 8.0

    def sessions(self, rate: float, seed: int = 1) -> Iterator[Session]:
        """Sessions that come at random, so that `rate` requests a second come in the long run."""
        draw = random.Random(seed)
        now = 0.0
        number = 0
        while True:
            now += draw.expovariate(rate / self.turns)
            number += 1
            name = f"{seed}-{number}"
            first = text(f"document {name}", int(self.document * draw.uniform(0.5, 1.5)))
            turns = [
                Turn(
                    (first if turn == 0 else "") + text(f"{name} turn {turn}", self.question),
                    max(1, int(draw.uniform(0.5, 1.5) * self.output)),
                    0.0 if turn == 0 else draw.expovariate(1 / self.pause_s),
                )
                for turn in range(self.turns)
            ]
            yield Session(now, name, turns, [{"role": "system", "content": text("system", self.system)}])


@dataclass(frozen=True)
class SharedPrefix:
    """Single requests, each under one of many long system prompts; some prompts are asked for far more often (Zipf)."""

    groups: int = 120
    prefix: int = 4000
    question: int = 100
    output: int = 60
    skew: float = 0.8

    def sessions(self, rate: float, seed: int = 1) -> Iterator[Session]:
        """See `MultiTurn.sessions`."""
        draw = random.Random(seed)
        weights = [1 / (rank + 1) ** self.skew for rank in range(self.groups)]
        prefixes = [text(f"group {group}", self.prefix) for group in range(self.groups)]
        now, number = 0.0, 0
        while True:
            now += draw.expovariate(rate)
            number += 1
            (group,) = draw.choices(range(self.groups), weights)
            turn = Turn(text(f"{seed} {number}", self.question), max(1, int(draw.uniform(0.5, 1.5) * self.output)))
            yield Session(now, f"{seed}-{number}", [turn], [{"role": "system", "content": prefixes[group]}])


@dataclass(frozen=True)
class NothingShared:
    """Single requests of very different lengths that share nothing."""

    prompt: int = 1200
    output: int = 100

    def sessions(self, rate: float, seed: int = 1) -> Iterator[Session]:
        """See `MultiTurn.sessions`."""
        draw = random.Random(seed)
        now, number = 0.0, 0
        while True:
            now += draw.expovariate(rate)
            number += 1
            tokens = max(16, int(draw.lognormvariate(0, 1) * self.prompt * 0.6))
            output = max(1, int(draw.expovariate(1 / self.output)))
            yield Session(now, f"{seed}-{number}", [Turn(text(f"{seed} {number}", tokens), output)])


WORKLOADS = {
    "multi-turn": MultiTurn(),
    "shared-prefix": SharedPrefix(),
    "nothing-shared": NothingShared(),
    # For real replicas on this machine's cores: prompts of some 1,950 of their tokens, all but 70 of them shared.
    "real": SharedPrefix(groups=24, prefix=540, question=20, output=4),
}
