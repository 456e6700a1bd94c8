"""What one step computes. Plain data, so that it can be sent to other ranks as it is."""

from dataclasses import dataclass, field


@dataclass(slots=True, frozen=True)
class SequenceStep:
    """A range of one request's tokens to compute in this step."""

    request_id: str
    tokens: list[int]  # ids to feed, at positions start … start + len(tokens) - 1
    start: int
    blocks: list[int]  # block table, long enough for the last token
    samples: bool  # the range ends at the newest token, so a next token is drawn

    @property
    def end(self) -> int:
        """Length of the sequence once the range is computed."""
        return self.start + len(self.tokens)


@dataclass(slots=True, frozen=True)
class StepPlan:
    """The ranges of one step; `admitted` left the queue for the first time or again, `preempted` went back to it."""

    sequences: list[SequenceStep] = field(default_factory=list)
    admitted: list[str] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(len(s.tokens) for s in self.sequences)
