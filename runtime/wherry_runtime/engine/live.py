"""A request's life in the engine, beside what the scheduler knows of it.

Two threads write here, to different fields. The device's thread draws tokens, and draws the next ones before the step
loop has seen these: so sampling keeps its own record of the tokens. The rest is the step loop's.
"""

import time
from collections import Counter
from dataclasses import dataclass, field

import msgspec

from wherry_protocol.worker import ErrorEvent, FinishReason, SamplingParams
from wherry_runtime.scheduling.request import Request

# Below, logits divided by it may overflow; noise no longer matters long before.
LEAST_TEMPERATURE = 1e-20


@dataclass(slots=True, frozen=True)
class RawLogprobs:
    """Natural-log probabilities at one position: the sampled token's, and the most likely ones in descending order."""

    sampled: float
    top_ids: list[int]
    top: list[float]


@dataclass(slots=True, eq=False)
class Live:
    """A request, its sampling parameters, and what sampling has to remember of its tokens."""

    request: Request
    params: SamplingParams
    seed: int
    stop_ids: frozenset[int]  # end-of-sequence ids unless ignored, and the request's own
    created: float = field(default_factory=time.monotonic)
    admitted: float | None = None  # times in seconds of a monotonic clock, written by the step loop
    first_token: float | None = None
    # What sampling remembers; penalties' records are kept only where there is a penalty.
    num_tokens: int = field(init=False)  # of prompt and answer: the position of the token to be drawn next
    answer_counts: Counter[int] = field(default_factory=Counter)
    seen: set[int] = field(default_factory=set)  # tokens of prompt and answer
    penalized: bool = field(init=False)
    greedy: bool = field(init=False)  # takes the likeliest token

    def __post_init__(self) -> None:
        params = self.params
        self.num_tokens = len(self.request.tokens)
        self.penalized = bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)
        self.greedy = params.temperature < LEAST_TEMPERATURE
        if params.repetition_penalty != 1.0:
            self.seen.update(self.request.tokens)
        if self.penalized:  # an answer that another worker began has tokens already
            self.answer_counts.update(self.request.tokens[self.request.num_prompt :])

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def filtered(self) -> bool:
        """Whether unlikely tokens are cut off before drawing."""
        params = self.params
        return not self.greedy and (params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0)

    def note_token(self, token: int) -> None:
        """Remembers a drawn token for sampling. Called by the thread that samples."""
        self.num_tokens += 1
        if self.penalized:
            self.answer_counts[token] += 1
            self.seen.add(token)

    def finish_after(self, token: int, num_new: int) -> FinishReason | None:
        """Why the answer ends with `token`, its `num_new`-th, if it does."""
        if token in self.stop_ids and num_new > self.params.min_tokens:
            return "stop"
        return "length" if num_new >= self.request.max_new_tokens else None


class Progress(msgspec.Struct, frozen=True):
    """What a step did for one request. The last one has `finish` or `error`."""

    request_id: str
    admitted: bool = False
    cached_tokens: int = 0
    token: int | None = None
    logprobs: RawLogprobs | None = None
    finish: FinishReason | None = None
    stop_id: int | None = None
    error: ErrorEvent | None = None
