"""What one step computes. Plain data, so that it can be sent to other ranks as it is."""

import msgspec
import numpy as np

BlockTable = np.ndarray[tuple[int], np.dtype[np.int32]]

UNKNOWN = -1  # stands for a token that the step before this one draws


class SequenceStep(msgspec.Struct, frozen=True, eq=False):
    """A range of one request's tokens to compute in this step.

    The last `num_drafts` of `tokens` are guesses. Tokens are drawn after each of the last `num_drafts + 1` of them, if
    the range `samples`; as many are accepted as were guessed right, and one more.
    """

    request_id: str
    tokens: list[int]  # ids to feed, at positions start … start + len(tokens) - 1; the last may be UNKNOWN
    start: int
    blocks: BlockTable  # [at least as many as the last token needs] int32
    samples: bool  # the range ends at the newest token, so a next token is drawn
    num_drafts: int = 0

    @property
    def end(self) -> int:
        """Length of the sequence once the range is computed."""
        return self.start + len(self.tokens)


class Work(msgspec.Struct, frozen=True):
    """How much a step computes, in the terms that its duration depends on."""

    decodes: int = 0  # sequences that advance by one token
    decode_context: int = 0  # tokens that these attend to
    prefill_tokens: int = 0  # all others, drafts included


class StepPlan(msgspec.Struct, frozen=True, eq=False):
    """The ranges of one step; `admitted` left the queue for the first time or again, `preempted` went back to it."""

    sequences: list[SequenceStep] = []
    admitted: list[str] = []
    preempted: list[str] = []
    work: Work = Work()

    @property
    def num_tokens(self) -> int:
        return sum(len(s.tokens) for s in self.sequences)

    @property
    def has_drafts(self) -> bool:
        """Whether it is not known before the step how many tokens it draws."""
        return any(s.num_drafts for s in self.sequences)
