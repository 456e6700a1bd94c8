"""A request's life in the engine, beside what the scheduler knows of it."""

import time
from collections import Counter
from dataclasses import dataclass, field

from wherry_protocol.worker import ErrorEvent, FinishReason, SamplingParams
from wherry_runtime.scheduling.request import Request


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
    answer_counts: Counter[int] = field(default_factory=Counter)  # kept only where a penalty reads it

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def penalized(self) -> bool:
        params = self.params
        return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)

    @property
    def adjusted(self) -> bool:
        """Whether logits change before temperature: penalties, biases or tokens not allowed yet."""
        return self.penalized or bool(self.params.logit_bias) or self.request.num_new < self.params.min_tokens

    @property
    def filtered(self) -> bool:
        """Whether unlikely tokens are cut off before drawing."""
        params = self.params
        return params.temperature > 0 and (params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0)

    def note_token(self, token: int) -> None:
        if self.penalized:
            self.answer_counts[token] += 1

    def finish_after(self, token: int) -> FinishReason | None:
        """Why the answer ends with `token`, already appended to the request's tokens, if it does."""
        if token in self.stop_ids and self.request.num_new > self.params.min_tokens:
            return "stop"
        return "length" if self.request.num_new >= self.request.max_new_tokens else None


@dataclass(slots=True, frozen=True)
class Progress:
    """What a step did for one request. The last one has `finish` or `error`."""

    request_id: str
    admitted: bool = False
    cached_tokens: int = 0
    token: int | None = None
    logprobs: RawLogprobs | None = None
    finish: FinishReason | None = None
    stop_id: int | None = None
    error: ErrorEvent | None = None
