"""What speculation does while it does not pay: next to nothing. By counts, with durations of our choosing."""

from collections.abc import Callable
from typing import cast

from tests.runtime.test_speculative_draft import new_live

from wherry_runtime.engine.speculative.draft_model import DraftModel, Wanted
from wherry_runtime.engine.speculative.policy import LONGEST_SLEEP, REFRESH_STEPS, TRIAL_STEPS, Costs, Mode
from wherry_runtime.engine.speculative.speculator import Speculator
from wherry_runtime.scheduling.plan import SequenceStep, StepPlan

PLAIN_S, CHECK_S, GUESS_S = 1.0, 0.2, 0.3
WRONG, RIGHT = 7, 8


class Guesser:
    """Stands for a draft model that always guesses the same token."""

    max_length = 1_000_000
    catching_up_s = 0.0
    usual_s = GUESS_S

    def __init__(self, token: int, world: "World") -> None:
        self.token, self.world = token, world
        self.passes = 0

    def lag(self, request_id: str, length: int) -> int:
        return 1

    def propose(self, wanted: list[Wanted], rounds: int, goes_on: Callable[[Wanted], bool]) -> None:
        self.passes += 1
        self.world.now += GUESS_S
        for item in wanted:
            item.guesses.tokens, item.guesses.classes = [self.token] * rounds, [0] * rounds


class World:
    """One request that goes on and on, each of its tokens RIGHT, driven as the step loop does it."""

    def __init__(self, guess: int) -> None:
        self.now = 0.0
        self.timed = 0
        self.guesser = Guesser(guess, self)
        costs = Costs()
        costs.drafting.note(1, GUESS_S)
        self.speculator = Speculator(
            costs, lookup=False, draft=cast("DraftModel", self.guesser), max_guesses=4, clock=self.clock
        )
        self.live = new_live("r", [1, 2, 3])
        self.live.request.max_new_tokens = 10**9

    def clock(self) -> float:
        self.timed += 1
        return self.now

    def run(self, steps: int) -> int:
        """Steps that were not plain."""
        return sum(self._step() is not Mode.PLAIN for _ in range(steps))

    def _step(self) -> Mode:
        speculator, live = self.speculator, self.live
        mode = Mode.PLAIN if speculator.dozes(1) else speculator.next_mode(1)
        guesses = speculator.propose([live]).get(live.id, []) if mode is not Mode.PLAIN else []
        self.now += PLAIN_S + CHECK_S * len(guesses)
        held = next((i for i, g in enumerate(guesses) if g != RIGHT), len(guesses))
        answer = [RIGHT] * (held + 1)
        tokens = [live.request.tokens[-1], *guesses]
        plan = StepPlan([SequenceStep(live.id, tokens, 0, live.request.blocks, True, len(guesses))])
        speculator.observe(mode, plan, {live.id: answer})
        live.request.tokens += answer
        return mode


def test_a_draft_model_that_is_never_right_is_soon_left_alone() -> None:
    world = World(WRONG)
    world.run(2 * LONGEST_SLEEP)
    for _ in range(5):
        passes, timed, began = world.guesser.passes, world.timed, world.now
        speculated = world.run(LONGEST_SLEEP)
        assert world.guesser.passes - passes <= speculated <= 2 * TRIAL_STEPS
        # Nor is a clock read, or anything else done, but around the trial.
        assert world.timed - timed <= 4 * (speculated + 2 * REFRESH_STEPS + 2)
        assert world.now - began <= 1.01 * LONGEST_SLEEP * PLAIN_S
    assert world.speculator.governor.slept > 0.98 * LONGEST_SLEEP * 5


def test_it_comes_back_once_its_guesses_hold() -> None:
    world = World(WRONG)
    world.run(3 * LONGEST_SLEEP)
    assert not world.speculator.governor.on
    world.guesser.token = RIGHT
    world.run(LONGEST_SLEEP + 400)
    assert world.speculator.governor.on
    assert world.run(400) > 390 - 2 * REFRESH_STEPS
