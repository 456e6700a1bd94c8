"""A model of an engine: what it computes when, and how long that takes, without computing anything.

Batching, chunked prefill, preemption, the KV cache and its prefix hashes are the engine's own scheduler; only the
device is made up: a step takes as long as `Costs` says, and tokens are drawn from the seed alone. No clock and no I/O:
whoever drives it waits out the seconds that `plan` tells (or does not), and calls `finish`.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np

from wherry_protocol.worker import ChatMessage
from wherry_runtime.scheduling.blocks import BlockManager
from wherry_runtime.scheduling.plan import StepPlan, Work
from wherry_runtime.scheduling.request import Request
from wherry_runtime.scheduling.scheduler import Scheduler

TOKEN_BYTES = 4
VOCABULARY_SIZE = 1 << (8 * TOKEN_BYTES)
_WORDS = [f"{a}{b}{c} " for a in "bdfklmnprstvwzgh" for b in "aeio" for c in "lnrt"]  # of TOKEN_BYTES each
_ANSWER = [int.from_bytes(word.encode(), "little") for word in _WORDS]
END_OF_ANSWER = int.from_bytes(b"</s>", "little")
_MASK = (1 << 64) - 1


class Costs(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of a step: `step` + `decode` for each answer that gets a token + `context` for each token that these
    attend to + `prefill` for each prompt token.

    The defaults resemble a model of 8B parameters in 16 bits on one GPU with 2 TB/s: reading the weights takes 8 ms,
    reading the keys and values of a token 65 ns, and a prompt token is 16 GFLOP."""

    step: float = 0.010
    decode: float = 0.000_05
    context: float = 0.000_000_065
    prefill: float = 0.000_08

    def seconds(self, work: Work) -> float:
        """How long a step with `work` takes."""
        decodes = self.decode * work.decodes + self.context * work.decode_context
        return self.step + decodes + self.prefill * work.prefill_tokens

    def scaled(self, speed: float) -> "Costs":
        """The same device, `speed` times as fast."""
        return Costs(**{name: getattr(self, name) / speed for name in self.__struct_fields__})


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """An engine's limits, with the meanings of `EngineConfig`, and how long answers are."""

    max_running: int = 128
    max_queued: int = 256
    max_batched_tokens: int = 2048
    max_itl_ratio: float = 2.0
    max_model_len: int = 32_768
    kv_tokens: int = 400_000
    block_size: int = 16
    prefix_cache: bool = True
    answer_tokens: float = 256.0  # mean length where nothing ends an answer sooner

    def scheduler(self) -> Scheduler:
        """The engine's own, over as many blocks as `kv_tokens` fill."""
        return Scheduler(
            BlockManager(self.kv_tokens // self.block_size, self.block_size, self.prefix_cache),
            max_running=self.max_running,
            max_batched_tokens=self.max_batched_tokens,
            max_queued=self.max_queued,
            max_itl_ratio=self.max_itl_ratio,
        )


def _mix(seed: int, position: int) -> int:
    """64 bits that look random: splitmix64's finalizer, https://prng.di.unimi.it/splitmix64.c."""
    x = (seed * 0x9E3779B97F4A7C15 + position * 0xD1342543DE82EF95 + 0x632BE59BD9B4E019) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def token_at(seed: int, index: int) -> int:
    """The answer's token at `index`: the same on every replica, as an engine's are."""
    return _ANSWER[_mix(seed, index) % len(_ANSWER)]


def text_of(tokens: Iterable[int]) -> str:
    """The text of an answer's tokens; its end has none."""
    return b"".join(t.to_bytes(TOKEN_BYTES, "little") for t in tokens if t != END_OF_ANSWER).decode(errors="replace")


def natural_length(seed: int, mean: float) -> int:
    """After how many tokens an answer ends by itself: exponentially distributed over seeds."""
    share = (_mix(seed, -1) >> 11) / (1 << 53)
    return max(1, math.ceil(-mean * math.log1p(-share)))


def encode(text: str | bytes) -> list[int]:
    """Four bytes are a token, the last ones filled up with spaces: equal beginnings of texts are equal tokens, and an
    answer's text has the tokens that it was drawn as."""
    data = text.encode() if isinstance(text, str) else text
    data += b" " * (-len(data) % TOKEN_BYTES)
    tokens: list[int] = np.frombuffer(data, dtype="<u4").tolist()
    return tokens


def encode_chat(messages: Sequence[ChatMessage]) -> list[int]:
    """A conversation's tokens, up to where the answer begins. Each message begins with a token of its own, so that a
    conversation that goes on begins with all of the tokens that it had before."""
    parts = []
    for message in messages:
        content = message.content.encode()
        parts += [_head(message.role, message.name), content, b" " * (-len(content) % TOKEN_BYTES)]
    return encode(b"".join([*parts, _head("assistant")]))


def _head(role: str, name: str | None = None) -> bytes:
    head = f"<{role}{':' + name if name else ''}>".encode()
    return head + b" " * (-len(head) % TOKEN_BYTES)


@dataclass(slots=True)
class Job:
    """An answer to be made: `request` as the scheduler takes it, and where it ends."""

    request: Request
    seed: int
    length: int  # tokens, those of an answer that is gone on with included
    finish: Literal["stop", "length"]

    def token(self, index: int) -> int:
        """The answer's token at `index`."""
        return END_OF_ANSWER if self.finish == "stop" and index == self.length - 1 else token_at(self.seed, index)


class Step(msgspec.Struct, frozen=True):
    """What is computed next: how long it takes, and the keys of the jobs that leave the queue for it."""

    seconds: float
    admitted: list[str]


class Progress(msgspec.Struct, frozen=True):
    """What a step did for one job: the token that it got, and whether that was its last one."""

    key: str
    token: int
    ended: bool


class Simulation:
    """An engine's steps, one after the other: `plan`, then `finish`."""

    def __init__(self, shape: Shape, costs: Costs) -> None:
        self.scheduler = shape.scheduler()
        self._costs = costs
        self._jobs: dict[str, Job] = {}
        self._plan: StepPlan | None = None
        self._seconds = 0.0
        self.steps = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0

    def submit(self, job: Job) -> None:
        """Queues a job.

        Raises:
            QueueFullError, DoesNotFitError, ValueError: see `Scheduler.add`.
        """
        self.scheduler.add(job.request)
        self._jobs[job.request.id] = job

    def cancel(self, key: str) -> bool:
        """Takes a job out. False: it is not there."""
        return self._jobs.pop(key, None) is not None and self.scheduler.remove(key) is not None

    def plan(self) -> Step | None:
        """Decides the next step; None where there is nothing to do."""
        plan = self.scheduler.schedule()
        if not plan.sequences:
            return None
        self._plan, self._seconds = plan, self._costs.seconds(plan.work)
        admitted = [key for key in plan.admitted if not self._jobs[key].request.preemptions]
        self.prompt_tokens += sum(self._jobs[key].request.num_prompt for key in admitted)
        return Step(self._seconds, admitted)

    def finish(self) -> list[Progress]:
        """Ends the planned step. Jobs that were cancelled meanwhile get nothing."""
        plan, self._plan = self._plan, None
        if plan is None:
            return []
        drawn = {}
        for step in plan.sequences:
            if step.samples and (job := self._jobs.get(step.request_id)) is not None:
                drawn[step.request_id] = job.token(job.request.num_new)
        self.scheduler.commit(plan, {key: (token,) for key, token in drawn.items()})
        self.scheduler.pacer.observe(plan.work, self._seconds)
        self.steps += 1
        self.completion_tokens += len(drawn)
        return [self._progress(key, token) for key, token in drawn.items()]

    def _progress(self, key: str, token: int) -> Progress:
        job = self._jobs[key]
        ended = job.request.num_new >= job.length
        if ended:
            self.cancel(key)
        return Progress(key, token, ended)
