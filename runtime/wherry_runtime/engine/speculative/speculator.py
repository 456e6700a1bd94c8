"""Guesses for the step loop: who guesses, how far, and what came of it."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from wherry_runtime.engine.live import Live
from wherry_runtime.engine.speculative.draft_model import NUM_CLASSES, DraftModel, Guesses, Wanted
from wherry_runtime.engine.speculative.estimates import Acceptance, Ratio
from wherry_runtime.engine.speculative.ngram import MAX_MATCH, NgramIndex
from wherry_runtime.engine.speculative.policy import Candidate, Choice, Costs, Governor, Mode, choose, trim
from wherry_runtime.scheduling.plan import StepPlan

log = logging.getLogger(__name__)

HOLD = 8  # steps that a choice of depth is kept for
TYPICAL_ANSWER = 64.0  # tokens, before any answer has ended
MAX_FAILURES = 3  # of the draft model in a row
SHORT_LAG = 32  # tokens; a sequence further behind is caught up for a trial only if few are


@dataclass(slots=True)
class Counts:
    """Tokens, since the start."""

    drafted: int = 0
    accepted: int = 0


@dataclass(slots=True)
class _Run:
    """Guesses that were handed out, and whose they are."""

    guesses: Guesses
    by_draft: bool


@dataclass(slots=True)
class _Proposal:
    """A sequence in the making of its guesses."""

    live: Live
    room: int
    found: Guesses = field(default_factory=Guesses)
    candidate: Candidate = field(default_factory=Candidate)


class Speculator:
    """Proposes guesses and learns from what became of them. Used by one thread at a time.

    Per step: `dozes`; unless it does, `next_mode`; unless that is plain, `propose`; then `observe` what the step drew.
    `pause` when there is no next step right after. While it dozes, a step costs it two comparisons.

    Args:
        lookup: whether prompt lookup guesses.
        draft: the draft model, if there is one.
        max_guesses: per sequence and step.
    """

    def __init__(
        self,
        costs: Costs,
        *,
        lookup: bool,
        draft: DraftModel | None,
        max_guesses: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.counts = Counts()
        self.governor = Governor(costs)
        self._costs = costs
        self._lookup = lookup
        self._draft = draft
        self._max_guesses = max_guesses
        self._clock = clock
        self._found = Acceptance(MAX_MATCH + 1)  # by length of match
        self._drafted = Acceptance(NUM_CLASSES)
        self._indexes: dict[str, NgramIndex] = {}
        self._excluded: set[str] = set()
        self._runs: dict[str, _Run] = {}
        self._mode = Mode.PLAIN
        self._choice = Choice(0, 0, 0.0)
        self._chosen_for = 0
        self._held = 0
        self._failures = 0  # of the draft model, in a row
        self._guessing_s = 0.0  # of the draft model, for the step now
        self._last_end: float | None = None
        self._last_mode = Mode.PLAIN  # that was observed
        self._answer_length = Ratio(TYPICAL_ANSWER * 4, 4.0, 0.95)

    def dozes(self, running: int) -> bool:
        """Whether the next step, with up to `running` sequences, is plain for sure. To be asked once a step."""
        return self.governor.dozes(running)

    def next_mode(self, running: int) -> Mode:
        """Whether the next step, of `running` sequences that decode and nothing else, is to have guesses."""
        self._mode = self.governor.next_mode(running)
        return self._mode

    def propose(self, lives: Sequence[Live]) -> dict[str, list[int]]:
        """Guesses at what follows the newest token of each sequence, by request id; none where they would not pay."""
        self._runs = {}
        self._guessing_s = 0.0
        running = len(lives)
        explore = self._mode is Mode.EXPLORE
        proposals = [self._proposal(live) for live in lives]
        self._choose(proposals, running, explore)
        drafting = self._limit([p for p in proposals if p.candidate.by_draft], explore) if self._choice.rounds else []
        runs = {p.live.id: _Run(p.found, False) for p in proposals if not p.candidate.by_draft and p.found.tokens}
        runs.update(self._guess(drafting))
        chances = [self._acceptance(run).run(i, run.guesses.classes) for i, run in runs.items()]
        counts = trim(chances, running, self._costs, int(explore))
        for (request_id, run), count in zip(runs.items(), counts, strict=True):
            if count:
                self._runs[request_id] = run
                del run.guesses.tokens[count:], run.guesses.classes[count:]
        return {i: run.guesses.tokens for i, run in self._runs.items()}

    def observe(self, mode: Mode, plan: StepPlan, tokens: Mapping[str, Sequence[int]]) -> None:
        """Learns from a step of a mode that was committed: the `tokens` that it drew, by request id."""
        if not self.governor.on and mode is Mode.PLAIN and self._last_mode is Mode.PLAIN:
            self._last_end = None
            return
        now = self._clock()
        seconds = None if self._last_end is None else now - self._last_end
        self._last_end = now
        before, self._last_mode = self._last_mode, mode
        drawn = 0
        for step in plan.sequences:
            answer = tokens.get(step.request_id, ())
            drawn += len(answer)
            if step.num_drafts:
                self._note_run(step.request_id, step.tokens[-step.num_drafts :], answer)
        running = len(plan.sequences)
        rows = plan.num_tokens
        drafts = sum(s.num_drafts for s in plan.sequences)
        if seconds is None or not drawn or rows - drafts != running:  # prompts among them: another kind of step
            return
        if mode is Mode.PLAIN and before is not Mode.PLAIN:
            self.governor.note_return(running, seconds)
            return
        took = seconds
        if mode is Mode.PLAIN:
            self._costs.plain.note(running, seconds)
        else:
            self._costs.checking.note(rows, seconds - self._guessing_s)
            # What such steps usually take: one that was held up says nothing of speculation.
            seconds = self._costs.checking.of(rows)
            if self._draft is not None and self._guessing_s:
                self.governor.invest(self._draft.catching_up_s)
                seconds += self._draft.usual_s
        first = mode is not Mode.PLAIN and not self._costs.checking.settled(rows)
        self.governor.note(mode, running, drawn, seconds, took=took, first=first, guessed=drafts > 0)
        if mode is Mode.PLAIN:
            self._last_end = self._clock()  # what was done here is not what plain steps cost while it dozes

    def pause(self) -> None:
        """No step follows at once: the time until the next one says nothing."""
        self._last_end = None

    def exclude(self, request_id: str) -> None:
        """Makes no more guesses for a request: one of them did harm."""
        self._excluded.add(request_id)

    def forget(self, request_id: str, num_new: int) -> None:
        """Lets go of a request that ended after `num_new` tokens."""
        if num_new:
            self._answer_length.add(num_new)
        self._excluded.discard(request_id)
        self._indexes.pop(request_id, None)
        self._runs.pop(request_id, None)
        self._found.forget(request_id)
        self._drafted.forget(request_id)
        if self._draft is not None:
            self._draft.forget(request_id)

    def _acceptance(self, run: _Run) -> Acceptance:
        return self._drafted if run.by_draft else self._found

    def _proposal(self, live: Live) -> _Proposal:
        """What prompt lookup finds, and what may be expected of the draft model."""
        request = live.request
        room = min(self._max_guesses, request.max_new_tokens - request.num_new - 1)
        if live.id in self._excluded:
            room = 0
        proposal = _Proposal(live, room)
        chances: list[float] = []
        if self._lookup and room > 0:
            index = self._indexes.get(live.id)
            if index is None:
                index = self._indexes[live.id] = NgramIndex()
            index.extend(request.tokens)
            found, match = index.propose(room)
            # A guess that held makes the match longer for the next one.
            proposal.found = Guesses(found, [min(match + i, MAX_MATCH) for i in range(len(found))])
            chances = self._found.run(live.id, proposal.found.classes)
        draft, lag = 0.0, 1
        if self._draft is not None and room > 0 and len(request.tokens) + room <= self._draft.max_length:
            draft = self._drafted.mean(live.id)
            lag = self._draft.lag(live.id, len(request.tokens))
        left = min(request.max_new_tokens - request.num_new, int(self._answer_length.value))
        proposal.candidate = Candidate(tuple(chances), draft, lag, max(room, 0), max(1, left))
        return proposal

    def _choose(self, proposals: list[_Proposal], running: int, explore: bool) -> None:
        """Renews the choice of depth, if it is due."""
        if self._held and running == self._chosen_for and not explore:
            self._held -= 1
            return
        rounds = self._max_guesses if self._draft is not None else 0
        candidates = [p.candidate for p in proposals]
        self._choice = choose(candidates, running, self._costs, rounds, int(explore))
        self._chosen_for, self._held = running, 0 if explore else HOLD

    @staticmethod
    def _limit(drafting: list[_Proposal], explore: bool) -> list[_Proposal]:
        """For a trial, only a few of the sequences that the draft model has to catch up with."""
        if not explore:
            return drafting
        drafting.sort(key=lambda p: p.candidate.lag)
        behind = [p for p in drafting if p.candidate.lag > SHORT_LAG]
        return drafting[: len(drafting) - len(behind)] + behind[: 1 + len(behind) // 8]

    def _guess(self, drafting: list[_Proposal]) -> dict[str, _Run]:
        """Lets the draft model guess. It is only a helper: if it fails, there are no guesses."""
        if self._draft is None or not drafting:
            return {}
        wanted = [Wanted(p.live, p.room) for p in drafting]
        chance = {p.live.id: 1.0 for p in drafting}

        def goes_on(item: Wanted) -> bool:
            chance[item.live.id] *= self._drafted.of(item.live.id, item.guesses.classes[-1])
            return chance[item.live.id] >= self._choice.floor and item.guesses.tokens[-1] not in item.live.stop_ids

        began = self._clock()
        try:
            self._draft.propose(wanted, self._choice.rounds, goes_on)
        except Exception as e:
            self._failures += 1
            last = self._failures == MAX_FAILURES
            log.warning(
                "the draft model failed (%s: %s)%s", type(e).__name__, e, "; it is not used any more" if last else ""
            )
            self._draft.clear()
            if last:
                self._draft = None
            return {}
        finally:
            self._guessing_s = self._clock() - began
        self._failures = 0
        return {item.live.id: _Run(item.guesses, True) for item in wanted if item.guesses.tokens}

    def _note_run(self, request_id: str, guesses: Sequence[int], answer: Sequence[int]) -> None:
        accepted = 0
        for guess, token in zip(guesses, answer, strict=False):
            if guess != token:
                break
            accepted += 1
        self.counts.drafted += len(guesses)
        self.counts.accepted += accepted
        run = self._runs.get(request_id)
        if run is not None:
            self._acceptance(run).note(request_id, run.guesses.classes[: len(guesses)], accepted)
