"""The draft model's memory: whatever happens to guesses, it reads each sequence as it really is."""

import random
from typing import Any

import pytest
import torch

from wherry_protocol.worker import SamplingParams
from wherry_runtime.engine.live import Live
from wherry_runtime.engine.rng import NoiseCache
from wherry_runtime.engine.sampling import scores_of
from wherry_runtime.engine.speculative.draft_model import LEADS, NUM_CLASSES, DraftModel, Wanted, lead_class
from wherry_runtime.engine.speculative.estimates import Cost
from wherry_runtime.scheduling.plan import SequenceStep
from wherry_runtime.scheduling.request import Request

VOCAB = 30
SIZE = 4


def toy_logits(tokens: list[int]) -> torch.Tensor:
    """Depends on every token before."""
    seed = 0
    for token in tokens:
        seed = (seed * 31 + token + 1) % 1_000_003
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


class PagedToy:
    """Keeps tokens where a model keeps keys and values, and reads its context from there and nowhere else."""

    def __init__(self, num_blocks: int) -> None:
        self.memory = [-1] * (num_blocks * SIZE)
        self.rows = 0
        self.fails = False

    def logits(self, sequences: list[SequenceStep]) -> tuple[torch.Tensor, list[str]]:
        if self.fails:
            raise RuntimeError("broken")
        self.rows += sum(len(s.tokens) for s in sequences)
        for step in sequences:
            for i, token in enumerate(step.tokens):
                self.memory[self.slot(step, step.start + i)] = token
        rows = [
            toy_logits([self.memory[self.slot(step, p)] for p in range(step.end)]) for step in sequences if step.samples
        ]
        return torch.stack(rows) if rows else torch.empty(0, VOCAB), [s.request_id for s in sequences if s.samples]

    @staticmethod
    def slot(step: SequenceStep, position: int) -> int:
        return int(step.blocks[position // SIZE]) * SIZE + position % SIZE


def new_live(name: str, tokens: list[int], **params: Any) -> Live:
    return Live(Request(name, list(tokens), 1000), SamplingParams(**params), seed=3, stop_ids=frozenset())


def new_draft(runner: PagedToy, num_blocks: int = 64, max_length: int = 200, max_rows: int = 512) -> DraftModel:
    return DraftModel(
        runner, num_blocks, SIZE, max_length=max_length, max_rows=max_rows, cost=Cost(), noise=NoiseCache()
    )


def grow(live: Live, tokens: list[int]) -> None:
    for token in tokens:
        live.note_token(token)
        live.request.tokens.append(token)


def expected(live: Live, count: int) -> list[int]:
    run: list[int] = []
    for _ in range(count):
        run.append(int(scores_of(toy_logits(live.request.tokens + run), live, run).argmax()))
    return run


def guess(draft: DraftModel, lives: list[Live], rounds: int) -> list[list[int]]:
    wanted = [Wanted(live, rounds) for live in lives]
    draft.propose(wanted, rounds, lambda _: True)
    return [w.guesses.tokens for w in wanted]


@pytest.mark.parametrize(
    "params", [{"temperature": 0}, {"temperature": 0.9}, {"temperature": 0, "repetition_penalty": 1.3}]
)
def test_guesses_are_the_models_own_whatever_was_accepted(params: dict[str, Any]) -> None:
    dice = random.Random(4)
    draft = new_draft(PagedToy(64))
    lives = [new_live(f"r{i}", [i, 2, 3, 4, 5][: i + 2], **params) for i in range(3)]
    for _ in range(25):
        some = [live for live in lives if dice.random() < 0.8]  # others are left out of this step
        rounds = dice.randint(1, 5)
        runs = guess(draft, some, rounds)
        for live, run in zip(some, runs, strict=True):
            assert run == expected(live, rounds)
        for live in lives:
            run = runs[some.index(live)] if live in some else []
            grow(live, [*run[: dice.randint(0, len(run))], dice.randrange(VOCAB)])


def test_only_what_is_new_is_read() -> None:
    runner = PagedToy(64)
    draft = new_draft(runner)
    live = new_live("r", list(range(20)), temperature=0)
    (run,) = guess(draft, [live], 4)
    assert runner.rows == 20 + 3  # the prompt, and all guesses but the last
    grow(live, [*run, 7])  # all held
    guess(draft, [live], 1)
    assert runner.rows == 23 + 2  # the last guess and the token after it
    assert draft.lag("r", len(live.request.tokens) + 1) == 1 + 1 - 1
    assert draft.lag("unknown", 9) == 9


def test_a_long_lag_is_read_over_several_steps() -> None:
    runner = PagedToy(64)
    draft = new_draft(runner, max_rows=8)
    live = new_live("r", list(range(20)), temperature=0)
    assert guess(draft, [live], 2) == [[]]
    assert draft.catching_up_s > 0
    assert guess(draft, [live], 2) == [[]]
    assert guess(draft, [live], 2) == [expected(live, 2)]
    assert runner.rows == 20 + 1
    guess(draft, [live], 2)
    assert draft.catching_up_s == 0


def test_room_and_doubt_end_a_run() -> None:
    draft = new_draft(PagedToy(64))
    a, b, c = (new_live(n, [1, 2, ord(n) % 7], temperature=0) for n in "abc")
    wanted = [Wanted(a, 5), Wanted(b, 2), Wanted(c, 5)]
    draft.propose(wanted, 4, lambda w: w.live is not c)
    assert [len(w.guesses.tokens) for w in wanted] == [4, 2, 1]
    assert [w.guesses.tokens for w in wanted] == [expected(a, 4), expected(b, 2), expected(c, 1)]
    assert all(len(w.guesses.classes) == len(w.guesses.tokens) for w in wanted)


def test_sequences_beyond_its_context_are_left_alone() -> None:
    draft = new_draft(PagedToy(64), max_length=10)
    assert guess(draft, [new_live("r", list(range(10)), temperature=0)], 2) == [[]]
    assert len(guess(draft, [new_live("s", list(range(9)), temperature=0)], 2)[0]) == 2


def test_the_least_recently_used_memory_makes_room() -> None:
    runner = PagedToy(6)
    draft = new_draft(runner, num_blocks=6)
    old, new = new_live("old", list(range(10)), temperature=0), new_live("new", list(range(1, 14)), temperature=0)
    guess(draft, [old], 1)
    assert guess(draft, [new], 1) == [expected(new, 1)]
    assert draft.lag("old", 10) == 10  # forgotten
    runs = guess(draft, [old, new], 1)  # both at once do not fit: one goes without
    assert sorted(map(len, runs)) == [0, 1]
    draft.clear()
    assert guess(draft, [old], 1) == [expected(old, 1)]


def test_forgetting_frees_everything() -> None:
    draft = new_draft(PagedToy(8), num_blocks=8)
    for i in range(20):
        live = new_live(f"r{i}", list(range(20)), temperature=0)
        assert guess(draft, [live], 2) == [expected(live, 2)]
        draft.forget(live.id)
    draft.forget("unknown")
    assert draft._blocks.num_free == 8


def test_classes_tell_leads_apart() -> None:
    assert lead_class(0.0, greedy=True) == 0
    assert lead_class(1e9, greedy=True) == len(LEADS)
    assert lead_class(0.0, greedy=False) == len(LEADS) + 1
    assert lead_class(float("inf"), greedy=False) == NUM_CLASSES - 1
    assert lead_class(float("nan"), greedy=True) == 0
