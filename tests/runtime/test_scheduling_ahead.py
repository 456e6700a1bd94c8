"""Plans made while the one before is computing: tables, and random runs in which things go wrong."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.runtime.test_scheduler import request, scheduler

from wherry_runtime.scheduling.limit import FIRST_WAIT, StepLimit
from wherry_runtime.scheduling.plan import UNKNOWN, StepPlan
from wherry_runtime.scheduling.request import Request
from wherry_runtime.scheduling.scheduler import Scheduler


def land(s: Scheduler, plan: StepPlan, token: int = 7) -> list[str]:
    """Pretends that the plan was computed; returns the requests that finished."""
    s.commit(plan, {step.request_id: [token] for step in plan.sequences if step.samples})
    done = [r for step in plan.sequences if (r := s._requests.get(step.request_id)) and r.num_new >= r.max_new_tokens]
    for r in done:
        s.remove(r.id)
    s.check_integrity()
    return [r.id for r in done]


def shown(plan: StepPlan) -> str:
    """`a:0+16 b:3+?*`: ranges, ? for one UNKNOWN token, and a star where a token is drawn."""

    def one(step: Any) -> str:
        count = "?" if step.tokens == [UNKNOWN] else len(step.tokens)
        drafts = f"({step.num_drafts})" if step.num_drafts else ""
        return f"{step.request_id}:{step.start}+{count}{drafts}{'*' if step.samples else ''}"

    return " ".join(map(one, plan.sequences))


@dataclass
class Table:
    """Plans as they are made one ahead: each is shown when it is made, one landing between any two."""

    about: str
    expected: list[str]
    arrivals: dict[int, list[tuple[str, int, int]]]  # plan number → name, prompt, new tokens
    settings: dict[str, int] = field(default_factory=dict)


TABLES = [
    Table(
        "a token that is not known yet is fed to the next step",
        ["a:0+5*", "a:5+?*", "a:6+?*", "a:7+?*", ""],
        {0: [("a", 5, 4)]},
    ),
    Table(
        "the last token of an answer that ends by length is never fed",
        ["a:0+5*", "", ""],
        {0: [("a", 5, 1)]},
    ),
    Table(
        "the next chunk of a prompt does not wait for the one before",
        ["a:0+16", "a:16+16", "a:32+8*", "a:40+?*", ""],
        {0: [("a", 40, 2)]},
    ),
    Table(
        "who comes meanwhile is in the next plan",
        ["a:0+3*", "a:3+?* b:0+3*", "a:4+?* b:3+?*"],
        {0: [("a", 3, 9)], 1: [("b", 3, 9)]},
    ),
]


@pytest.mark.parametrize("table", TABLES, ids=lambda t: t.about)
def test_plans_one_ahead(table: Table) -> None:
    s = scheduler(**table.settings)
    flights: deque[StepPlan] = deque()
    for number, expected in enumerate(table.expected):
        for name, prompt, new in table.arrivals.get(number, []):
            s.add(request(name, prompt, new))
        plan = s.schedule()
        assert shown(plan) == expected, number
        if plan.sequences:
            flights.append(plan)
        if number and flights:
            land(s, flights.popleft())


def test_nobody_is_preempted_while_a_plan_is_in_flight() -> None:
    s = scheduler(blocks=5, budget=20)
    s.add(request("a", 8, 8))
    s.add(request("b", 7, 8))
    first = s.schedule()
    assert shown(first) == "a:0+8* b:0+7*"
    second = s.schedule()
    assert shown(second) == "a:8+?* b:7+?*"
    land(s, first)
    # b's ninth token needs a sixth block.
    assert s.schedule().sequences == []
    assert s.preemptions == 0
    land(s, second)
    third = s.schedule()
    assert (shown(third), third.preempted) == ("a:9+1*", ["b"])


def test_a_higher_priority_waits_for_the_plan_in_flight_before_anybody_gives_way() -> None:
    s = scheduler(running=1)
    s.add(request("a", 4, 8))
    first = s.schedule()
    s.add(request("b", 4, 2, priority=1))
    assert s.schedule().sequences == []
    assert s.preemptions == 0
    land(s, first)
    second = s.schedule()
    assert (shown(second), second.preempted, second.admitted) == ("b:0+4*", ["a"], ["b"])
    third = s.schedule()
    assert shown(third) == "b:4+?*"
    land(s, second)
    land(s, third)
    s.remove("b")
    # Its first four tokens are still cached, and the one that it had drawn is not drawn again.
    assert shown(s.schedule()) == "a:4+1*"


def test_blocks_of_a_request_that_ends_are_free_when_its_last_plan_is_done() -> None:
    s = scheduler(blocks=10)
    s.add(request("a", 8, 8))
    first, second = s.schedule(), s.schedule()
    land(s, first)
    s.remove("a")  # a stop token
    assert s.blocks.num_free == 7
    assert "a" not in s
    assert s.schedule().sequences == []
    s.check_integrity()
    land(s, second)
    assert s.blocks.num_free == 10
    s.check_integrity()


def test_a_plan_that_was_not_computed_is_taken_back() -> None:
    s = scheduler()
    s.add(request("a", 20, 8))
    s.add(request("b", 3, 8))
    plans = [s.schedule(), s.schedule()]
    assert [shown(p) for p in plans] == ["a:0+16", "a:16+4* b:0+3*"]
    for plan in reversed(plans):
        s.abandon(plan)
    s.check_integrity()
    again = s.schedule()
    assert shown(again) == "a:0+16"
    land(s, again)
    assert shown(s.schedule()) == "a:16+4* b:0+3*"


def test_suspect_blocks_come_out_for_scrubbing_once_nobody_writes_to_them() -> None:
    s = scheduler()
    s.add(request("a", 8, 8))
    first, second = s.schedule(), s.schedule()
    blocks = s.get("a").blocks.tolist()
    land(s, first)
    s.remove("a", suspect=True)
    assert s.take_tainted() == []
    land(s, second)
    assert sorted(s.take_tainted()) == sorted(blocks)
    assert s.take_tainted() == []
    s.add(request("again", 8, 8))
    assert shown(s.schedule()) == "again:0+8*"  # what a computed is not found


class TestDrafts:
    @pytest.mark.parametrize(("accepted", "computed"), [([7], 4), ([11, 7], 5), ([11, 12, 7], 6), ([11, 12, 13, 7], 7)])
    def test_as_many_as_were_guessed_right(self, accepted: list[int], computed: int) -> None:
        s = scheduler()
        s.add(request("a", 3, 9))
        land(s, s.schedule())
        plan = s.schedule({"a": [11, 12, 13]})
        assert shown(plan) == "a:3+4(3)*"
        assert plan.has_drafts
        assert plan.sequences[0].tokens == [7, 11, 12, 13]
        assert s.schedule().sequences == []  # how long it is then is not known yet
        s.commit(plan, {"a": accepted})
        r = s.get("a")
        assert (r.num_computed, r.tokens[4:]) == (computed, accepted)
        s.check_integrity()
        assert shown(s.schedule()) == f"a:{computed}+1*"

    def test_no_more_than_fit(self) -> None:
        """Into what the answer may have left, into the budget that decodes leave, and into free blocks."""
        s = scheduler(blocks=6, budget=5)
        s.add(request("a", 3, 3))
        s.add(request("b", 2, 9))
        land(s, s.schedule())
        plan = s.schedule({"a": [1] * 9, "b": [1] * 9, "nobody": [1]})
        assert shown(plan) == "a:3+2(1)* b:2+3(2)*"
        s = scheduler(blocks=2)
        s.add(request("a", 3, 5))
        s.add(request("b", 2, 2))
        land(s, s.schedule())
        assert shown(s.schedule({"a": [1] * 4})) == "a:3+1* b:2+1*"

    def test_a_full_block_of_rejected_guesses_is_not_known(self) -> None:
        s = scheduler()
        s.add(request("a", 7, 9))
        land(s, s.schedule())
        s.commit(s.schedule({"a": [1, 2, 3, 4, 5]}), {"a": [1, 9]})
        r = s.get("a")
        assert (r.num_computed, r.num_registered) == (9, 2)
        s.check_integrity()


class TestMemory:
    def test_steps_get_smaller_and_larger_again(self) -> None:
        limit = StepLimit(64)
        assert limit.failed(64)
        assert limit.tokens == 32
        assert limit.failed(9)
        assert limit.tokens == 4
        assert limit.failed(2)
        assert not limit.failed(1)
        assert limit.tokens == 1
        sizes = []
        for _ in range(3000):
            limit.succeeded()
            sizes.append(limit.tokens)
        assert sizes[FIRST_WAIT * 2] == 1
        assert sizes[-1] == 64
        assert sorted(sizes) == sizes

    def test_requests_beyond_the_limit_go_back_to_the_queue(self) -> None:
        s = scheduler(budget=16)
        for name in "abcd":
            s.add(request(name, 4, 8))
        plan = s.schedule()
        s.abandon(plan)
        assert s.shrink(plan)
        assert s.limit.tokens == 8
        plan = s.schedule()
        assert shown(plan) == "a:0+4* b:0+4*"
        s.abandon(plan)
        s.shrink(plan)
        plan = s.schedule()
        assert shown(plan) == "a:0+4*"
        s.abandon(plan)
        s.shrink(plan)
        assert [r.id for r in s.running] == ["a", "b"]
        assert [r.id for r in s.waiting] == ["c", "d"]
        plan = s.schedule()
        assert shown(plan) == "a:0+2"
        land(s, plan)
        s.check_integrity()

    def test_most_of_the_cache_is_used_under_load(self) -> None:
        """More requests than fit, of mixed lengths: the blocks in use, over time."""
        s = scheduler(blocks=200, size=16, running=64, budget=512, queued=200)
        for i in range(150):
            s.add(request(f"r{i}", 20 + 37 * i % 300, 20 + 53 * i % 200, first_token=i))
        used = []
        flights: deque[StepPlan] = deque()
        while not s.idle:
            while len(flights) < 2 and (plan := s.schedule()).sequences:
                flights.append(plan)
            land(s, flights.popleft())
            if s.waiting:
                used.append(1 - s.blocks.num_free / s.blocks.num_blocks)
        assert sum(used) / len(used) > 0.85
        assert s.preemptions < 150


@st.composite
def runs(draw: st.DrawFn) -> tuple[dict[str, int], list[tuple[int, int, int, int | None, int | None, int]], list[int]]:
    size, blocks = draw(st.sampled_from([1, 2, 4])), draw(st.integers(2, 24))
    requests = []
    for _ in range(draw(st.integers(1, 10))):
        prompt = draw(st.integers(1, size * blocks - 1))
        new = draw(st.integers(1, min(12, size * blocks - prompt)))
        # arrival, prompt, new, stops after so many tokens, cancelled after so many steps, priority
        stop, cancel = draw(st.none() | st.integers(1, 8)), draw(st.none() | st.integers(0, 20))
        requests.append((draw(st.integers(0, 12)), prompt, new, stop, cancel, draw(st.integers(0, 2))))
    settings = {"blocks": blocks, "size": size, "running": draw(st.integers(1, 6)), "budget": draw(st.integers(1, 20))}
    return settings, requests, draw(st.lists(st.integers(0, 3), max_size=60))


@settings(max_examples=300, deadline=None)
@given(runs())
def test_the_same_tokens_whatever_goes_wrong(run: tuple[dict[str, int], list[Any], list[int]]) -> None:
    """Steps that fail (and take the one planned after them along) or run out of memory, stop tokens, cancellations,
    preemption: every token is drawn once, after exactly the tokens before it, and no block is lost."""
    options, specs, luck = run
    s = scheduler(**options)
    flights: deque[StepPlan] = deque()
    stops = {f"r{i}": stop for i, (_, _, _, stop, _, _) in enumerate(specs)}
    fates = iter(luck)
    for step in range(5000):
        for i, (arrival, prompt, new, _, cancel, priority) in enumerate(specs):
            if arrival == step:
                s.add(request(f"r{i}", prompt, new, priority, first_token=i % 2))
            if cancel is not None and cancel + arrival == step:
                s.remove(f"r{i}")
        while len(flights) < 2 and (plan := s.schedule()).sequences:
            assert plan.num_tokens <= s.limit.tokens
            flights.append(plan)
        if not flights:
            assert s.idle, "live requests and nothing to do"
            if step > 40:
                break
            continue
        plan = flights.popleft()
        fate = next(fates, 0)
        if fate in (1, 2):  # not computed, and so is not what follows
            while flights:
                s.abandon(flights.pop())
            s.abandon(plan)
            if fate == 2:
                s.shrink(plan)
        else:
            _finish(s, plan, stops)
        s.check_integrity()
    assert s.blocks.num_free == options["blocks"]
    assert s.in_flight == 0
    assert not s._leaving


def _finish(s: Scheduler, plan: StepPlan, stops: dict[str, int | None]) -> None:
    """Draws as token the length before it, which shows that nothing is drawn twice or in the wrong place."""
    drawn = {step.request_id: [step.end] for step in plan.sequences if step.samples}
    s.commit(plan, drawn)
    for name in drawn:
        r: Request | None = s._requests.get(name)
        if r is not None:
            assert r.tokens[r.num_prompt :] == list(range(r.num_prompt, len(r.tokens)))
            if r.num_new == r.max_new_tokens or r.num_new == stops[name]:
                s.remove(name)
