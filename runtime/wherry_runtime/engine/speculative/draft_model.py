"""A small model that guesses for a large one with the same vocabulary.

It has a paged KV cache of its own and runs all speculating sequences together, one token a round. What it remembers of
a sequence is checked against the sequence's real tokens each time, so refused guesses, preemption and steps that it was
left out of need no bookkeeping: it reads what is new and goes on.

It draws with the noise that the large model will draw with at the same place, (seed, position): the Gumbel coupling of
Daliri et al., 2025 (https://arxiv.org/abs/2408.07978). Two distributions at total variation distance D then agree with
a probability of at least (1 - D) / (1 + D), far more often than two independent draws do.
"""

import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from wherry_runtime.engine.live import Live
from wherry_runtime.engine.sampling import Noise, argmax, scores_of
from wherry_runtime.engine.speculative.estimates import Cost
from wherry_runtime.scheduling.blocks import BlockManager
from wherry_runtime.scheduling.plan import BlockTable, SequenceStep

# Upper bounds of a guess's lead over the runner-up, in units of logits after temperature and noise; above, sure.
LEADS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
SINGLE = 3  # tokens that are read as a step of one token each
NUM_CLASSES = 2 * (len(LEADS) + 1)


class LogitsRunner(Protocol):
    """What the draft model needs of a model runner."""

    def logits(self, sequences: list[SequenceStep]) -> tuple[torch.Tensor, list[str]]:
        """[S, vocab_size] float32 after the last token of each sequence, and the sequences' ids in this order."""
        ...


@dataclass(slots=True)
class Guesses:
    """A run of guesses and their classes; see `lead_class`."""

    tokens: list[int] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Wanted:
    """A sequence to guess for: `room` guesses at most."""

    live: Live
    room: int
    guesses: Guesses = field(default_factory=Guesses)


@dataclass(slots=True)
class _Memory:
    """What the draft model has read of a sequence: `length` tokens, the last of which were its own guesses."""

    blocks: list[int] = field(default_factory=list)
    table: BlockTable = field(default_factory=lambda: np.empty(0, dtype=np.int32))  # the same
    length: int = 0
    guessed: list[int] = field(default_factory=list)

    def sync(self, tokens: list[int]) -> None:
        """Forgets guesses that did not come true, and the newest token: its logits are wanted again."""
        place = self.length - len(self.guessed)
        for token in self.guessed:
            if place >= len(tokens) or tokens[place] != token:
                break
            place += 1
        self.length = min(place, len(tokens) - 1)
        self.guessed = []


class DraftModel:
    """The draft model and its memory of each sequence.

    Args:
        max_length: longest sequence it can read.
        max_rows: tokens in one pass at most; longer lags are read over several steps.
        cost: told how long passes take, by rows.
    """

    def __init__(
        self,
        runner: LogitsRunner,
        num_blocks: int,
        block_size: int,
        *,
        max_length: int,
        max_rows: int,
        cost: Cost,
        noise: Noise,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.max_length = max_length
        self._runner = runner
        self._blocks = BlockManager(num_blocks, block_size, prefix_cache=False)
        self._max_rows = max_rows
        self._cost = cost
        self._noise = noise
        self._clock = clock
        # Of the last `propose`, as steps like these usually take: in all, and for reading more than the newest tokens.
        self.usual_s = 0.0
        self.catching_up_s = 0.0
        self._memories: dict[str, _Memory] = {}  # least recently used first

    def lag(self, request_id: str, length: int) -> int:
        """Tokens to read before the first guess for a sequence of `length` tokens; a little too low after refusals."""
        memory = self._memories.get(request_id)
        return length if memory is None else max(1, length - memory.length)

    def forget(self, request_id: str) -> None:
        """Frees what is remembered of a sequence, if anything is."""
        memory = self._memories.pop(request_id, None)
        if memory is not None:
            self._blocks.release(memory.blocks)

    def clear(self) -> None:
        for request_id in list(self._memories):
            self.forget(request_id)

    def propose(self, wanted: list[Wanted], rounds: int, goes_on: Callable[[Wanted], bool]) -> None:
        """Fills in the guesses: up to `rounds`, and `room`, for each sequence.

        A sequence gets none while its lag is being read over several steps, or if no memory is left for it.

        Args:
            goes_on: asked after each guess whether to make another.
        """
        self.usual_s = self.catching_up_s = 0.0
        budget = self._max_rows
        active: list[Wanted] = []
        steps: list[SequenceStep] = []
        protected = {w.live.id for w in wanted}
        for item in wanted:
            memory = self._recall(item, min(rounds, item.room), protected)
            if memory is None or not budget:
                continue
            tokens = item.live.request.tokens
            count = min(len(tokens) - memory.length, budget)
            budget -= count
            complete = memory.length + count == len(tokens)
            steps += _steps(item.live.id, tokens[memory.length : memory.length + count], memory, complete)
            memory.length += count
            if complete:
                active.append(item)
        by_id = {item.live.id: item for item in active}
        for number in range(1, rounds + 1):
            if not steps:
                return
            continuing = self._round(steps, by_id, goes_on)
            if number == rounds:
                return
            steps = []
            for item in continuing:
                if len(item.guesses.tokens) < item.room:
                    steps += self._feed(item)

    def _round(
        self, steps: list[SequenceStep], by_id: dict[str, Wanted], goes_on: Callable[[Wanted], bool]
    ) -> list[Wanted]:
        """One pass and the guesses that it gives; the sequences that want another."""
        began = self._clock()
        continuing = []
        with torch.inference_mode():
            logits, ids = self._runner.logits(steps)
            if ids:
                self._guess(logits, [by_id[i] for i in ids])
        if ids:
            continuing = [by_id[i] for i in ids if goes_on(by_id[i])]
        seconds = self._clock() - began
        rows = sum(len(s.tokens) for s in steps)
        sequences = len({s.request_id for s in steps})
        self._cost.note(rows, seconds)
        usual = self._cost.of(rows)
        self.usual_s += usual
        if rows > 2 * sequences:  # after a run that held altogether there are two tokens to read
            without = self._cost.of(sequences) if self._cost.covers(sequences) else usual * sequences / rows
            # However unlucky this pass was, reading takes no longer than token by token.
            self.catching_up_s = max(0.0, min(usual - without, without * rows / sequences))
            self.usual_s = without + self.catching_up_s
        return continuing

    def _guess(self, logits: torch.Tensor, items: list[Wanted]) -> None:
        for index, item in enumerate(items):
            row = logits[index]
            scores = scores_of(row, item.live, item.guesses.tokens, self._noise)
            if scores is not row:
                row.copy_(scores)
        tokens = argmax(logits)
        for item, token, lead in zip(items, tokens, _leads(logits, tokens), strict=True):
            item.guesses.tokens.append(token)
            item.guesses.classes.append(lead_class(lead, greedy=item.live.greedy))

    def _feed(self, item: Wanted) -> list[SequenceStep]:
        """The last guess as the next token to read."""
        memory = self._memories[item.live.id]
        guess = item.guesses.tokens[-1]
        steps = _steps(item.live.id, [guess], memory, complete=True)
        memory.guessed.append(guess)
        memory.length += 1
        return steps

    def _recall(self, item: Wanted, guesses: int, protected: set[str]) -> _Memory | None:
        """The memory of a sequence with blocks for its tokens and guesses; None if there are not enough."""
        tokens = item.live.request.tokens
        length = len(tokens) + guesses - 1
        if guesses < 1 or length > self.max_length:
            return None
        memory = self._memories.pop(item.live.id, None) or _Memory()
        self._memories[item.live.id] = memory  # the most recently used is the last
        memory.sync(tokens)
        needed = self._blocks.blocks_for(length) - len(memory.blocks)
        while needed > self._blocks.num_free:
            victim = next((i for i in self._memories if i not in protected), None)
            if victim is None:
                return None
            self.forget(victim)
        if needed > 0:
            memory.blocks += self._blocks.allocate(needed)
            memory.table = np.array(memory.blocks, dtype=np.int32)
        return memory


def lead_class(lead: float, *, greedy: bool) -> int:
    """How sure a guess is: by how much its score leads over the runner-up's. NaN counts as unsure."""
    index = bisect_right(LEADS, lead) if lead >= 0 else 0
    return index if greedy else index + len(LEADS) + 1


def _leads(scores: torch.Tensor, tokens: list[int]) -> list[float]:
    """By how much the score of each row's token is above all others. On CPU by NumPy, as in `argmax`.

    Args:
        scores: [S, vocab_size] float32; overwritten.
    """
    if scores.device.type == "cpu":
        values, rows = scores.numpy(), np.arange(len(tokens))
        best = values[rows, tokens]
        values[rows, tokens] = -np.inf
        with np.errstate(invalid="ignore"):
            found: list[float] = (best - values.max(axis=-1)).tolist()
        return found
    places = torch.tensor(tokens, device=scores.device)[:, None]
    leads = scores.gather(-1, places)
    leads -= scores.scatter_(-1, places, float("-inf")).amax(dim=-1, keepdim=True)
    return leads[:, 0].tolist()


def _steps(request_id: str, tokens: list[int], memory: _Memory, complete: bool) -> list[SequenceStep]:
    """The range to read, at the end of the memory. A few tokens go one by one: attention is made for that."""
    if len(tokens) > SINGLE:
        return [SequenceStep(request_id, tokens, memory.length, memory.table, complete)]
    last = len(tokens) - 1
    return [
        SequenceStep(request_id, [token], memory.length + i, memory.table, complete and i == last)
        for i, token in enumerate(tokens)
    ]
