"""How far to guess: estimates, the choice of depth case by case, and the account that keeps losses small."""

import random
from collections.abc import Callable
from itertools import product

import pytest

from wherry_runtime.engine.speculative.estimates import CERTAIN, Acceptance, Cost
from wherry_runtime.engine.speculative.policy import (
    HELD_UP,
    LONGEST_SLEEP,
    TRIAL_STEPS,
    Candidate,
    Costs,
    Governor,
    Mode,
    best_guesses,
    choose,
    trim,
)


def line(base: float, row: float, upto: int = 64) -> Cost:
    """base + row · rows, measured."""
    cost = Cost()
    for rows in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128):
        if rows <= upto:
            cost.note(rows, base + row * rows)
    return cost


def costs(*, base: float = 10.0, row: float = 0.1, draft_base: float = 1.0, draft_row: float = 0.02) -> Costs:
    return Costs(line(base, row), line(base, row, 128), line(draft_base, draft_row))


class TestCost:
    def test_unknown_is_free_and_one_point_is_flat(self) -> None:
        cost = Cost()
        assert cost.of(3) == 0.0
        cost.note(2, 5.0)
        assert [cost.of(n) for n in (1, 2, 50)] == [5.0, 5.0, 5.0]

    def test_lines_between_and_beyond(self) -> None:
        cost = Cost()
        cost.note(2, 4.0)
        cost.note(6, 8.0)
        assert cost.of(4) == pytest.approx(6.0)
        assert cost.of(10) == pytest.approx(12.0)
        assert cost.of(1) == 4.0

    def test_an_anchor_starts_the_line(self) -> None:
        cost = Cost()
        assert cost.of(4, anchor=(1, 3.0)) == 3.0
        cost.note(9, 11.0)
        assert cost.of(5, anchor=(1, 3.0)) == pytest.approx(7.0)
        assert cost.of(17, anchor=(1, 3.0)) == pytest.approx(19.0)

    def test_costs_never_fall_to_the_right_of_what_is_known(self) -> None:
        cost = Cost()
        cost.note(1, 5.0)
        cost.note(2, 4.0)
        assert cost.of(100) == 4.0

    def test_one_outlier_does_not_count(self) -> None:
        cost = Cost()
        for seconds in (90.0, 1.0, 1.1, 80.0, 0.9):
            cost.note(4, seconds)
        assert cost.of(4) == 1.1
        assert Cost().of(4) == 0.0

    def test_old_measurements_are_hopeful_and_replaced(self) -> None:
        cost = Cost(hopeful=True)
        for _ in range(9):
            cost.note(8, 50.0)
        assert cost.of(8) == 50.0
        for _ in range(300):
            cost.note(1, 1.0)
        assert 35.0 <= cost.of(8) < 40.0
        cost.note(8, 10.0)
        assert cost.of(8) == 10.0

    def test_what_is_never_measured_again_is_forgotten(self) -> None:
        cost = Cost()
        cost.note(8, 50.0)
        for _ in range(5000):
            cost.note(4, 1.0)
        assert cost.of(8) == 1.0

    def test_covers_between_what_was_measured_twice(self) -> None:
        cost = Cost()
        assert not cost.covers(1)
        cost.note(4, 1.0)
        assert not cost.covers(4)
        cost.note(4, 1.0)
        assert cost.covers(4)
        assert not cost.covers(8)


class TestAcceptance:
    def test_it_follows_what_happens(self) -> None:
        acceptance = Acceptance(3)
        for i in range(400):
            acceptance.note("a", [0, 1], 2 if i % 2 else 0)  # class 1 is tried only where class 0 held
        assert acceptance.of("a", 0) == pytest.approx(0.5, abs=0.05)
        assert acceptance.of("a", 1) > 0.9
        assert acceptance.of("b", 2) == pytest.approx(0.7)

    def test_it_forgets(self) -> None:
        acceptance = Acceptance(1)
        for held in [1] * 200 + [0] * 150:
            acceptance.note("a", [0], held)
        assert acceptance.of("b", 0) < 0.1

    def test_a_request_differs_from_the_others(self) -> None:
        acceptance = Acceptance(1)
        generator = random.Random(0)
        for _ in range(600):
            acceptance.note("easy", [0], generator.random() < 0.9)
            acceptance.note("hard", [0], generator.random() < 0.3)
        assert acceptance.of("easy", 0) > acceptance.of("new", 0) + 0.1
        assert acceptance.of("hard", 0) < acceptance.of("new", 0) - 0.1
        acceptance.forget("hard")
        assert acceptance.of("hard", 0) == acceptance.of("new", 0)

    def test_chances_of_a_run_multiply_and_are_never_certain(self) -> None:
        acceptance = Acceptance(2)
        for _ in range(500):
            acceptance.note("a", [0], 1)
        first, second = acceptance.run("a", [0, 0])
        assert first <= CERTAIN
        assert second == pytest.approx(first * first)


SURE = Candidate(draft=0.95)
FAIR = Candidate(draft=0.7)
HOPELESS = Candidate(draft=0.05)

# What a step looks like, and how many rounds the draft model should make.
CHOICES: list[tuple[str, list[Candidate], int, Costs, Callable[[int], bool]]] = [
    ("surely right and cheap: as far as allowed", [SURE], 1, costs(draft_base=0.1), lambda n: n == 8),
    ("fairly right: some", [FAIR], 1, costs(), lambda n: 2 <= n <= 6),
    ("never right: none", [HOPELESS], 1, costs(), lambda n: n == 0),
    ("a draft model as slow as the target: none", [FAIR], 1, costs(draft_base=9.0), lambda n: n == 0),
    ("rows cost as much as steps: none", [FAIR] * 16, 16, costs(base=0.1, row=1.0), lambda n: n == 0),
    ("many rows, each almost free: some", [FAIR] * 16, 16, costs(row=0.01), lambda n: n >= 2),
    ("no draft model", [Candidate()], 1, costs(), lambda n: n == 0),
    ("no room for more than one", [Candidate(draft=0.95, room=1)], 1, costs(), lambda n: n == 1),
    (
        "a long lag for a short answer",
        [Candidate(draft=0.8, lag=1000, horizon=2)],
        1,
        costs(draft_row=0.1),
        lambda n: n == 0,
    ),
    (
        "the same lag for a long answer",
        [Candidate(draft=0.8, lag=1000, horizon=200)],
        1,
        costs(draft_row=0.1),
        lambda n: n > 0,
    ),
    ("found is free and better", [Candidate(lookup=(0.9, 0.8), draft=0.7)], 1, costs(), lambda n: n == 0),
    ("found is worse", [Candidate(lookup=(0.2, 0.1), draft=0.8)], 1, costs(), lambda n: n > 0),
]


@pytest.mark.parametrize(
    ("candidates", "running", "price", "right"), [c[1:] for c in CHOICES], ids=[c[0] for c in CHOICES]
)
def test_rounds(candidates: list[Candidate], running: int, price: Costs, right: Callable[[int], bool]) -> None:
    choice = choose(candidates, running, price, max_rounds=8)
    assert right(choice.rounds), choice
    assert 0 <= choice.floor <= 1


def test_the_choice_is_the_best_there_is() -> None:
    """Against all depths one by one, for a single sequence."""
    for chance, base, row, draft_base in product((0.3, 0.6, 0.9), (5.0, 20.0), (0.05, 2.0), (0.2, 3.0)):
        price = costs(base=base, row=row, draft_base=draft_base)

        def rate(depth: int, chance: float = chance, price: Costs = price) -> float:
            tokens = 1 + sum(chance**i for i in range(1, depth + 1))
            return tokens / (price.step(1 + depth, 1) + depth * price.drafting.of(1))

        best = max(rate(d) for d in range(9))
        choice = choose([Candidate(draft=chance)], 1, price, max_rounds=8)
        assert choice.rate == pytest.approx(best)
        assert rate(choice.rounds) == pytest.approx(best)


def test_exploring_guesses_even_where_it_does_not_pay() -> None:
    assert choose([HOPELESS], 1, costs(), 8, at_least=1).rounds == 1
    found = Candidate(lookup=(0.01,))
    assert choose([found], 1, costs(row=5.0), 8).guesses == 0
    assert choose([found], 1, costs(row=5.0), 8, at_least=1).guesses == 1
    assert choose([Candidate()], 1, costs(), 8, at_least=1).guesses == 0


def test_a_jump_at_the_first_guess_does_not_hide_what_lies_behind_it() -> None:
    """Two rows cost much more than one, but eight hardly more than two, as with tiles of rows."""
    price = costs()
    price.checking = Cost()
    for rows, seconds in ((1, 10.0), (2, 18.0), (4, 18.1), (9, 18.3)):
        price.checking.note(rows, seconds)
    assert best_guesses([0.9**i for i in range(1, 9)], 1, 0.0, price)[0] == 8
    assert best_guesses([0.7], 1, 0.0, price)[0] == 0


class TestTrim:
    def test_likely_guesses_are_checked_first(self) -> None:
        kept = trim([[0.9, 0.8, 0.1], [0.3, 0.02], []], 3, costs(base=10, row=1.5))
        assert kept[0] == 2
        assert kept[1] <= 1
        assert kept[2] == 0

    def test_nothing_if_rows_are_dear(self) -> None:
        assert trim([[0.9], [0.9]], 2, costs(base=0.1, row=10)) == [0, 0]

    def test_equals_do_not_add_up_to_more_than_pays(self) -> None:
        price = costs()
        price.checking = Cost()
        for rows, seconds in ((4, 10.0), (6, 10.0), (7, 100.0), (8, 200.0)):
            price.checking.note(rows, seconds)
        assert sum(trim([[0.5]] * 4, 4, price)) == 2

    def test_no_guesses(self) -> None:
        assert trim([], 2, costs()) == []


class World:
    """Steps with durations and acceptance of our choosing, driven by the governor as the step loop does it."""

    def __init__(self, *, accepted: float, row: float, sync: float = 0.0, depth: int = 4, noise: float = 0.0) -> None:
        self.accepted, self.row, self.sync, self.depth, self.noise = accepted, row, sync, depth, noise
        self.costs = Costs()
        self.governor = Governor(self.costs)
        self.random = random.Random(1)
        self.tokens = 0
        self.seconds = 0.0
        self.speculated = 0

    def run(self, steps: int, running: int) -> float:
        """Tokens per second against plain steps of the same kind."""
        plain_s = 10.0 + 0.2 * running
        tokens_before, seconds_before = self.tokens, self.seconds
        for _ in range(steps):
            dozes = self.governor.dozes(running)
            mode = Mode.PLAIN if dozes else self.governor.next_mode(running)
            jitter = 1 + self.noise * self.random.random()
            if mode is Mode.PLAIN:
                tokens, seconds = running, plain_s * jitter
                if not dozes:
                    self.costs.plain.note(running, seconds)
            else:
                self.speculated += 1
                tokens = running
                for _ in range(running):
                    for _ in range(self.depth):
                        if self.random.random() >= self.accepted:
                            break
                        tokens += 1
                seconds = (plain_s + self.sync + self.row * running * self.depth) * jitter
            if not dozes:
                self.governor.note(mode, running, tokens, seconds)
            self.tokens += tokens
            self.seconds += seconds
        fair = (self.tokens - tokens_before) / running * plain_s * (1 + self.noise / 2)
        return fair / (self.seconds - seconds_before)


class TestGovernor:
    @pytest.mark.parametrize("running", [1, 4, 16, 64])
    @pytest.mark.parametrize(
        "world",
        [
            {"accepted": 0.0, "row": 1.0},
            {"accepted": 0.1, "row": 5.0},
            {"accepted": 0.0, "row": 0.0, "sync": 1.0},
            {"accepted": 0.5, "row": 3.0, "noise": 0.5},
            {"accepted": 0.7, "row": 0.1},
            {"accepted": 0.9, "row": 0.1, "noise": 0.3},
        ],
        ids=lambda w: " ".join(f"{k}={v}" for k, v in w.items()),
    )
    def test_it_never_loses_two_in_a_hundred(self, running: int, world: dict[str, float]) -> None:
        made = World(**world)  # type: ignore[arg-type]
        made.run(400, running)  # what a first trial loses is earned back over time
        assert made.run(3000, running) >= 0.98

    def test_it_stays_on_where_it_pays(self) -> None:
        world = World(accepted=0.8, row=0.1)
        assert world.run(2000, 1) > 2.0
        assert world.speculated > 1900
        assert world.governor.on

    def test_it_goes_off_and_tries_again_now_and_then(self) -> None:
        world = World(accepted=0.05, row=1.0)
        world.run(3000, 4)
        assert not world.governor.on
        assert 8 < world.speculated < 300
        world.accepted, world.row = 0.9, 0.1
        world.run(LONGEST_SLEEP + 500, 4)
        assert world.governor.on
        assert world.run(500, 4) > 2.0

    def test_it_goes_off_soon_when_fortunes_change(self) -> None:
        world = World(accepted=0.9, row=0.1)
        world.run(1000, 2)
        world.accepted, world.row = 0.0, 8.0
        before = world.speculated
        world.run(400, 2)
        assert not world.governor.on
        assert world.speculated - before < 60

    def test_trials_become_rare_where_it_never_pays(self) -> None:
        world = World(accepted=0.0, row=1.0)
        world.run(20_000, 4)
        before = world.speculated
        world.run(20_000, 4)
        assert 0 < world.speculated - before <= 20_000 // LONGEST_SLEEP * TRIAL_STEPS

    def test_fewer_sequences_are_a_reason_to_try_as_soon_as_the_last_trial_is_paid_for(self) -> None:
        world = World(accepted=0.0, row=2.0)
        world.run(20_000, 32)
        while world.governor.on:
            world.run(1, 32)
        world.row, world.accepted = 0.0, 0.5
        world.run(1000, 2)
        assert world.governor.on

    def test_steps_without_guesses_earn_nothing(self) -> None:
        """Plain steps were timed while the machine was busy: anything looks better than they do."""
        world = World(accepted=0.8, row=0.1)
        world.run(400, 1)
        governor = world.governor
        for _ in range(200):
            if not governor.on:
                break
            governor.note(Mode.SPECULATE, 1, 1, 5.0, guessed=False)
        assert not governor.on

    def test_what_is_not_usual_is_charged_but_does_not_decide(self) -> None:
        world = World(accepted=0.8, row=0.1)
        world.run(400, 1)
        governor = world.governor
        balance, gain = governor.balance, governor.gain
        governor.note(Mode.SPECULATE, 1, 1, 10.2, took=15.2)
        assert governor.balance == pytest.approx(balance - 5.0)
        governor.note_return(1, 12.2)
        assert governor.balance == pytest.approx(balance - 7.0)
        governor.note(Mode.SPECULATE, 1, 1, 10.2, took=1e6)  # the machine stood still
        assert governor.balance == pytest.approx(balance - HELD_UP * 10.2)
        assert governor.gain == pytest.approx(gain, rel=0.1)

    def test_an_investment_is_charged_over_time(self) -> None:
        """Reading a long prompt costs the draft model many steps; the answer brings them back."""
        world = World(accepted=0.8, row=0.1)
        world.run(1, 1)
        world.run(1, 1)
        governor = world.governor
        assert governor.next_mode(1) is Mode.EXPLORE
        governor.invest(200.0)
        governor.note(Mode.EXPLORE, 1, 1, 211.0)
        world.run(200, 1)
        assert governor.on
        other = World(accepted=0.8, row=0.1)
        other.run(2, 1)
        other.governor.next_mode(1)
        other.governor.note(Mode.EXPLORE, 1, 1, 211.0)
        assert not other.governor.on

    def test_plain_steps_come_first_where_nothing_is_known(self) -> None:
        governor = Governor(Costs())
        assert governor.next_mode(1) is Mode.PLAIN

    def test_plain_steps_are_measured_again_while_it_is_on(self) -> None:
        world = World(accepted=0.9, row=0.0)
        world.run(1100, 1)
        assert 12 <= 1100 - world.speculated <= 40
