"""How far to guess: what is expected to give the most tokens per second, and nothing where that is nothing.

Two levels, both without a clock of their own: durations are passed in.

`choose` and `trim` compare whole steps by expected tokens over expected time. A guess is accepted with the chance that
it and all before it hold, so a step with guesses of chances p₁, p₂ … yields one token per sequence and Σ p more
(Leviathan et al., 2023, https://arxiv.org/abs/2211.17192); what it costs is read from measurements.

`Governor` decides between plain steps and speculating ones by what speculation really brought. It keeps an account in
seconds: a step is credited with the time that plain steps would have taken for its tokens and charged with the time
that it took. Plain steps earn a hundredth of their time, which is all that trials may lose. While it is off it sleeps:
steps are neither asked about nor timed until the account is even again, and longer the more trials in a row failed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from wherry_runtime.engine.speculative.estimates import Cost

EARNED = 0.01  # share of plain time that may be lost on trials
SAVED_STEPS = 8  # of plain time: the account holds no more, so no more is lost when fortunes change
FIRST_TIME = 3.0  # plain steps that a step counts as at most when steps like it were never timed before
HELD_UP = 1.0  # plain steps charged since it was turned on, at most, for taking longer than usual: chance does that too
TRIAL_STEPS = 16
TRIAL_WORTH = 0.5  # plain steps of savings that allow a trial; debts of the last one are paid back first
TRIAL_LOSS = 4.0  # plain steps that a trial may lose before it is called off
WINDOW = 32  # steps over which a gain is averaged
WORTHWHILE = 1.01  # less gain than this is not worth to stay
REFRESH_EVERY, REFRESH_STEPS = 256, 4  # plain steps in between, to know what they cost now
EXPLORE_EVERY = 128
SLEEP, LONGEST_SLEEP = 64, 512  # plain steps after a failed trial, doubled by each that fails after it
FEWER_FOR = 16  # steps with at most half as many sequences that end the sleep: not the first ones of many that come


@dataclass(slots=True)
class Costs:
    """Seconds by rows: of plain steps, of steps that check guesses, and of the draft model's."""

    plain: Cost = field(default_factory=Cost)
    checking: Cost = field(default_factory=lambda: Cost(hopeful=True))
    drafting: Cost = field(default_factory=lambda: Cost(hopeful=True))

    def step(self, rows: int, running: int) -> float:
        """A step of `running` sequences with `rows` rows, which is more if there are guesses."""
        return self.checking.of(rows, (running, self.plain.of(running)) if self.plain.known else None)


@dataclass(slots=True, frozen=True)
class Candidate:
    """A sequence that may speculate.

    Args:
        lookup: chances of the guesses that prompt lookup has, each including those before it.
        draft: chance of a guess of the draft model, given those before it; 0 if there is no draft model.
        lag: tokens that the draft model has to read before its first guess, 1 when it has kept up.
        room: guesses at most.
        horizon: steps that a lag is written off over.
    """

    lookup: tuple[float, ...] = ()
    draft: float = 0.0
    lag: int = 1
    room: int = 8
    horizon: int = 64

    @property
    def by_draft(self) -> bool:
        """Whether the draft model is the better source; what was looked up costs nothing."""
        return self.draft > 0 and (not self.lookup or self.lookup[0] < self.draft)


@dataclass(slots=True, frozen=True)
class Choice:
    """Rounds of the draft model, guesses to check in total, and tokens per second expected of that.

    The draft model should give up on a run whose chance falls below `floor`.
    """

    rounds: int
    guesses: int
    rate: float
    floor: float = 0.0


def choose(candidates: Sequence[Candidate], running: int, costs: Costs, max_rounds: int, at_least: int = 0) -> Choice:
    """The best number of rounds for a step of `running` sequences, among them `candidates`.

    Args:
        at_least: 1 looks for the best way to speculate, even if not speculating is better.
    """
    best = Choice(0, 0, 0.0)
    drafting = [c for c in candidates if c.by_draft]
    found = [chance for c in candidates if not c.by_draft for chance in c.lookup[: c.room]]
    spent = 0.0
    for rounds in range(max_rounds + 1 if drafting else 1):
        if rounds:
            spent += _round_cost(rounds, drafting, costs)
        elif at_least and drafting and not found:
            continue
        chances = found + [c.draft**i for c in drafting for i in range(1, min(rounds, c.room) + 1)]
        guesses, rate = best_guesses(chances, running, spent, costs, at_least)
        if rate > best.rate:
            best = Choice(rounds, guesses, rate)
    if not best.rounds:
        return best
    mean = sum(c.draft for c in drafting) / len(drafting)
    checked = (costs.step(running + best.guesses, running) - costs.step(running, running)) / max(best.guesses, 1)
    price = costs.drafting.of(len(drafting)) / len(drafting) + max(0.0, checked)
    return Choice(best.rounds, best.guesses, best.rate, min(1.0, best.rate * price / mean))


def best_guesses(
    chances: list[float], running: int, spent: float, costs: Costs, at_least: int = 0
) -> tuple[int, float]:
    """How many guesses to check, the likeliest first, and the tokens per second expected then.

    Args:
        chances: of each guess that could be checked; sorted in place.
        spent: seconds that went into guessing.
    """
    chances.sort(reverse=True)
    best, best_rate = 0, 0.0
    tokens = float(running)
    seen = 0
    for count in _counts(len(chances)):
        tokens += sum(chances[seen:count])
        seen = count
        if count < min(at_least, len(chances)):
            continue
        seconds = spent + costs.step(running + count, running)
        rate = tokens / seconds if seconds > 0 else tokens
        if rate > best_rate:
            best, best_rate = count, rate
    return best, best_rate


def trim(chances: Sequence[Sequence[float]], running: int, costs: Costs, at_least: int = 0) -> list[int]:
    """How many guesses of each run to check; time spent on guessing is spent.

    Args:
        chances: of each run's guesses, each including those before it, so they only fall.
    """
    flat = [chance for run in chances for chance in run]
    count, _ = best_guesses(flat, running, 0.0, costs, at_least)
    if not count:
        return [0] * len(chances)
    floor = flat[count - 1]
    kept = [sum(chance >= floor for chance in run) for run in chances]
    for index in reversed(range(len(kept))):  # of equally likely ones, no more than were asked for
        while sum(kept) > count and kept[index] and chances[index][kept[index] - 1] == floor:
            kept[index] -= 1
    return kept


def _round_cost(number: int, drafting: Sequence[Candidate], costs: Costs) -> float:
    rows = sum(c.room >= number for c in drafting)
    if not rows:
        return 0.0
    seconds = costs.drafting.of(rows)
    lag = sum(c.lag - 1 for c in drafting)
    if number > 1 or not lag:
        return seconds
    horizon = min(c.horizon for c in drafting)
    return seconds + (costs.drafting.of(rows + lag) - seconds) / horizon


def _counts(limit: int) -> list[int]:
    """0 … 16, then in steps of about an eighth: costs are not known any finer."""
    counts = list(range(min(limit, 16) + 1))
    while counts[-1] < limit:
        counts.append(min(limit, counts[-1] + counts[-1] // 8))
    return counts


class Mode(Enum):
    """What the next step is to be."""

    PLAIN = "plain"
    SPECULATE = "speculate"
    EXPLORE = "explore"  # speculate even if it is not expected to pay: to know


class Governor:
    """Turns speculation on and off by what it brings. Ask `next_mode` before a step and tell `note` after it."""

    def __init__(self, costs: Costs) -> None:
        self.balance = 0.0  # seconds
        self.on = True
        self.slept = 0  # steps, since the start
        self._costs = costs
        self._steps = 0  # since it was turned on or off
        self._trial = True
        self._plain_left = 0
        self._fair = self._spent = 0.0  # seconds in the window
        self._off_at = 0  # sequences that ran when it was turned off
        self._invested = 0.0  # seconds not charged yet
        self._charged = 0.0  # seconds beyond what is usual, since it was turned on
        self._failed = 0  # trials, in a row
        self._idle = 0  # steps without a guess, in a row
        self._asleep = 0  # plain steps since it was turned off
        self._fewer = 0  # of these, the last ones with at most half as many sequences
        self._rest = 0  # steps to sleep: until the account is even, and in all
        self._sleep = 0

    @property
    def gain(self) -> float:
        """Tokens per second against plain steps, lately."""
        return self._fair / self._spent if self._spent else 1.0

    def dozes(self, running: int) -> bool:
        """Whether the next step, with up to `running` sequences, is plain for sure; then there is nothing to `note`.

        To be asked once a step. When sleep is over, a few plain steps are measured before the next trial.
        """
        if self.on:
            return False
        self._asleep += 1
        self._fewer = self._fewer + 1 if 0 < running * 2 <= self._off_at else 0
        if self._asleep <= (self._rest if self._fewer >= FEWER_FOR else self._sleep):
            self.slept += 1
            return True
        self.balance = max(self.balance, 0.0)
        self._turn_on()
        return False

    def next_mode(self, running: int) -> Mode:
        """For a step of `running` sequences that does not doze."""
        if not self.on or not self._costs.plain.covers(running):
            return Mode.PLAIN
        if self._plain_left:
            self._plain_left -= 1
            return Mode.PLAIN
        self._steps += 1
        if self._steps % REFRESH_EVERY == 0:
            self._plain_left = REFRESH_STEPS
        if (self._trial and self._steps <= 2) or (self._steps % EXPLORE_EVERY == 0 and self.balance > 0):
            return Mode.EXPLORE
        return Mode.SPECULATE

    def invest(self, seconds: float) -> None:
        """Time of the next step to note that pays off over many: it is charged over the window."""
        self._invested += seconds
        self.balance += seconds
        self._spent -= seconds

    def note_return(self, running: int, seconds: float) -> None:
        """Books the first plain step after one that was not: nothing was planned ahead of it."""
        plain = self._costs.plain.of(running)
        self.balance -= self._late(seconds - plain, plain)

    def note(
        self,
        mode: Mode,
        running: int,
        tokens: int,
        seconds: float,
        *,
        took: float = 0.0,
        first: bool = False,
        guessed: bool = True,
    ) -> None:
        """Books a step: `tokens` came out of `running` sequences in `seconds`, guessing included.

        Args:
            seconds: what such a step usually takes.
            took: what this one did, if that is known to be something else: charged to the account.
            first: no step like it was timed before, so the duration may be a matter of chance.
            guessed: it had guesses. If not, speculation has not earned what it may have been faster than usual.
        """
        plain = self._costs.plain.of(running)
        if first:
            seconds = min(seconds, FIRST_TIME * plain)
        excess = self._late(took - seconds, plain)
        charge = self._invested / WINDOW
        self._invested -= charge
        self.balance -= charge
        if mode is Mode.PLAIN:
            self.balance = min(self.balance + EARNED * seconds, SAVED_STEPS * plain)
            return
        fair = plain * tokens / running
        self._idle = 0 if guessed else self._idle + 1
        if not guessed:
            fair = min(fair, seconds)
        self.balance = min(self.balance + fair - seconds - excess, SAVED_STEPS * plain)
        keep = 1 - 1 / WINDOW
        self._fair = self._fair * keep + fair
        self._spent = self._spent * keep + seconds + charge
        if self._trial and self._steps < TRIAL_STEPS and self._spent - self._fair < TRIAL_LOSS * plain:
            return
        if self.gain >= WORTHWHILE:
            self._trial = False
            self._failed = 0
        elif self._trial or self._idle >= WINDOW or (self.balance < 0 and self.gain < 1):
            self._turn_off(running)

    def _late(self, seconds: float, plain: float) -> float:
        """What to charge of time beyond what is usual."""
        charge = min(max(seconds, 0.0), HELD_UP * plain - self._charged)
        self._charged += max(charge, 0.0)
        return max(charge, 0.0)

    def _turn_on(self) -> None:
        self.on = self._trial = True
        self._steps = self._idle = 0
        self._fair = self._spent = self._charged = 0.0
        self._plain_left = REFRESH_STEPS

    def _turn_off(self, running: int) -> None:
        self.on = False
        self._steps = 0
        self._off_at = running
        self.balance -= self._invested
        self._invested = 0.0
        plain = self._costs.plain.of(running)
        lost = TRIAL_WORTH - self.balance / plain if plain else 0.0  # plain steps
        self._asleep = self._fewer = 0
        self._rest = int(max(lost, 0.0) / EARNED)
        self._sleep = max(self._rest, min(SLEEP << self._failed, LONGEST_SLEEP))
        self._failed = min(self._failed + 1, 16)
