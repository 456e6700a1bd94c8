"""Breaker, ejection, retry budget and panic: pure, so each case is a short story with its own clock."""

import itertools
from typing import Any

import pytest

from wherry_router.resilience.breaker import Breaker, State
from wherry_router.resilience.budget import RetryBudget, backoff_s
from wherry_router.resilience.faults import Blame, blame
from wherry_router.resilience.outlier import Record, Rules, View, outliers
from wherry_router.resilience.panic import panics

# Each step: (seconds since the start, what happens, the state after it). `bad`: a failed request, `gone`: a fault of
# the whole worker, `token`: a first token, `end`: a whole answer, `ok` / `no`: a probe, `full`: a fault of nobody,
# `ask`: whether a request may go there, which is what `yes` and `wait` say.
STORIES: list[tuple[str, list[tuple[float, str, str]]]] = [
    ("two failures are none", [(0, "bad", "closed"), (1, "bad", "closed")]),
    ("three in a row open it", [(0, "bad", "closed"), (1, "bad", "closed"), (2, "bad", "open"), (2, "ask", "wait")]),
    ("a whole answer in between does not", [(0, "bad", "closed"), (1, "bad", "closed"), (2, "end", "closed"),
        (3, "bad", "closed"), (4, "bad", "closed")]),
    ("a first token is no whole answer", [(0, "bad", "closed"), (0, "bad", "closed"), (1, "token", "closed"),
        (2, "bad", "open")]),
    ("a worker that is gone opens it at once", [(0, "gone", "open"), (0, "ask", "wait")]),
    ("a full queue is nobody's fault", [(0, "full", "closed")] * 9),
    ("a probe makes it half-open at once, one request closes it",
        [(0, "gone", "open"), (0, "no", "open"), (1, "ok", "half_open"), (1, "ask", "yes"), (1, "begin", "half_open"),
         (1, "ask", "wait"), (2, "token", "closed"), (2, "ask", "yes")]),
    ("a probe that fails opens it again", [(0, "gone", "open"), (1, "ok", "half_open"), (2, "no", "open")]),
    ("the trial's fault opens it again, for longer each time",
        [(0, "gone", "open"), (1, "ok", "half_open"), (1, "begin", "half_open"), (2, "bad", "open"),
         (2.4, "ok", "open"), (2.6, "ok", "half_open"), (3, "begin", "half_open"), (4, "bad", "open"),
         (4.9, "ok", "open"), (5.1, "ok", "half_open")]),
    ("a trial that says nothing gives its place up",
        [(0, "gone", "open"), (1, "ok", "half_open"), (1, "begin", "half_open"), (30, "ask", "wait"),
         (31, "ask", "yes")]),
    ("a trial that ends without an answer gives it up at once",
        [(0, "gone", "open"), (1, "ok", "half_open"), (1, "begin", "half_open"), (2, "gave up", "half_open"),
         (2, "ask", "yes")]),
    ("probes that never succeed do not keep it open for good",
        [(0, "gone", "open"), (9, "no", "open"), (9.9, "ask", "wait"), (10, "ask", "yes"), (10.5, "no", "half_open"),
         (11, "ask", "yes"), (11, "begin", "half_open"), (12, "token", "closed")]),
    ("where no request comes, quiet probes close it",
        [(0, "gone", "open")] + [(1 + t / 2, "ok", "half_open") for t in range(10)] + [(6, "ok", "closed")]),
    ("a first token of an old request closes it too", [(0, "gone", "open"), (1, "token", "closed")]),
    ("faults long ago do not make the pause longer",
        [(0, "gone", "open"), (1, "ok", "half_open"), (1, "token", "closed"), (100, "gone", "open"),
         (100, "ok", "half_open")]),
    ("faults close together do",
        [(0, "gone", "open"), (1, "ok", "half_open"), (1, "token", "closed"), (9, "gone", "open"), (9.4, "ok", "open"),
         (9.6, "ok", "half_open")]),
]  # fmt: skip


@pytest.mark.parametrize("_, story", STORIES, ids=[story[0] for story in STORIES])
def test_breaker(_: str, story: list[tuple[float, str, str]]) -> None:
    breaker = Breaker(max_faults=3, max_open_s=10.0)
    blames = {"bad": Blame.REQUEST, "gone": Blame.WORKER, "full": Blame.NONE}
    trial = 0
    for now, event, expected in story:
        if event == "ask":
            assert ("yes" if breaker.allows(now) else "wait") == expected, (now, event)
            continue
        if event in blames:
            breaker.failed(breaker.epoch, blames[event], now)
        elif event == "begin":
            trial = breaker.begin(now)
        elif event == "gave up":
            breaker.ended(trial)
        elif event == "token":
            breaker.answered(now)
        elif event == "end":
            breaker.completed()
        else:
            breaker.probed(well=event == "ok", now=now)
        assert breaker.state.value == expected, (now, event)


def test_fifty_streams_cut_at_once_are_one_opening() -> None:
    breaker = Breaker(3, 10.0)
    epoch = breaker.epoch
    assert [breaker.failed(epoch, Blame.WORKER, 0.0) for _ in range(50)].count(True) == 1
    breaker.probed(well=True, now=0.1)
    assert not breaker.failed(epoch, Blame.WORKER, 0.2), "the last of them is noticed after the probe"
    assert (breaker.state, breaker.trips) == (State.HALF_OPEN, 1)


def test_an_old_request_that_ends_does_not_free_the_trial() -> None:
    breaker = Breaker(3, 10.0)
    old = breaker.begin(0)
    breaker.failed(breaker.epoch, Blame.WORKER, 0)
    breaker.probed(well=True, now=1)
    assert breaker.begin(1)
    breaker.ended(old)
    assert not breaker.allows(2)


def test_no_sequence_of_events_keeps_requests_away_for_good() -> None:
    """From every state that six events lead to, a request is allowed within the bound, whatever probes say."""
    events = ("bad", "gone", "begin", "ok", "no", "token")
    for sequence in itertools.product(events, repeat=6):
        breaker, now = Breaker(2, 10.0), 0.0
        for event in sequence:
            now += 0.3
            if event in ("bad", "gone"):
                breaker.failed(breaker.epoch, Blame.REQUEST if event == "bad" else Blame.WORKER, now)
            elif event == "begin":
                breaker.begin(now)
            elif event == "token":
                breaker.answered(now)
            else:
                breaker.probed(well=event == "ok", now=now)
        for _ in range(82):
            now += 0.5
            breaker.probed(well=False, now=now)
            if breaker.allows(now):
                break
        else:
            pytest.fail(f"kept away after {sequence}")


@pytest.mark.parametrize(
    "reason, expected",
    [
        ("queue_full", Blame.NONE),
        ("unauthorized", Blame.NONE),
        ("draining", Blame.NONE),
        ("shutting_down", Blame.NONE),
        ("worker_error", Blame.REQUEST),
        ("protocol", Blame.REQUEST),
        ("a word that is new", Blame.REQUEST),
        ("unreachable", Blame.WORKER),
        ("lost", Blame.WORKER),
        ("frozen", Blame.WORKER),
        ("not_ready", Blame.WORKER),
    ],
)
def test_blame(reason: str, expected: Blame) -> None:
    assert blame(reason) is expected


RULES = Rules(share=0.34, seconds=10.0, fault_rate=0.3, ttft_factor=5.0)
WELL = View(results=100, faults=1, ttft_s=0.2)
SICK = View(results=20, faults=8, ttft_s=0.2)
SLOW = View(results=100, faults=0, ttft_s=2.0)

OUTLIERS: list[tuple[str, list[View], list[tuple[int, str]]]] = [
    ("nobody there", [], []),
    ("all well", [WELL] * 3, []),
    ("one fails", [WELL, SICK, WELL], [(1, "faults")]),
    ("one is slow", [WELL, WELL, SLOW], [(2, "latency")]),
    ("all fail: the requests are bad, not the replicas", [SICK] * 4, []),
    ("all are slow", [SLOW] * 4, []),
    ("most fail: one goes, the cap keeps the other", [SICK, SICK, WELL], [(0, "faults")]),
    ("of two nobody is the odd one out", [WELL, SICK], []),
    ("too few results to tell", [WELL, View(9, 9), WELL], []),
    ("others too quiet to compare with", [View(4, 0), SICK, View(4, 0)], []),
    ("a few milliseconds more are no outlier, however many times", [View(50, 0, 0.01)] * 3 + [View(50, 0, 0.3)], []),
    ("a third at most, and the failing before the slow", [SLOW, WELL, WELL, WELL, SICK], [(4, "faults")]),
    ("of six two may be out", [SLOW, WELL, WELL, WELL, WELL, SICK], [(5, "faults"), (0, "latency")]),
    ("who is out counts against the share", [WELL, SICK, WELL, View(ejected=True)], []),
    ("who is out is not ejected again", [WELL, WELL, WELL, SICK._replace(ejected=True), WELL, WELL], []),
]


@pytest.mark.parametrize("_, views, expected", OUTLIERS, ids=[case[0] for case in OUTLIERS])
def test_outliers(_: str, views: list[View], expected: list[tuple[int, str]]) -> None:
    assert outliers(views, RULES) == expected


def test_nobody_is_ejected_where_the_share_is_none() -> None:
    assert outliers([WELL, SICK, WELL], RULES._replace(share=0.0)) == []


def test_an_ejection_ends_by_itself_and_lasts_longer_each_time() -> None:
    record = Record()
    ends = []
    now = 0.0
    for _ in range(3):
        record.eject(now, RULES)
        began = now
        while record.ejected(now):
            now += 1
        ends.append(now - began)
    assert ends == [10, 20, 40]
    record.eject(now + 1000, RULES)
    assert not record.ejected(now + 1010), "what was long ago is forgotten"


def test_a_record_forgets_what_is_older_than_its_window() -> None:
    record = Record()
    for _ in range(12):
        record.result(0.0, fault=True)
        record.ttft(0.0, 3.0)
    assert record.view(29.0) == View(12, 12, 3.0)
    assert record.view(31.0) == View(0, 0, None)


BUDGETS: list[tuple[str, dict[str, float], int, list[float], int]] = [
    # What it is, the budget, requests at second 0, times at which a retry is asked for, how many are allowed.
    ("a share of the requests", {"ratio": 0.2, "min_per_s": 0.0}, 100, [0.0] * 50, 20),
    ("and a few anyway", {"ratio": 0.2, "min_per_s": 1.0}, 0, [0.0] * 50, 10),
    ("both together", {"ratio": 0.2, "min_per_s": 1.0}, 100, [0.0] * 50, 30),
    ("the window slides", {"ratio": 0.0, "min_per_s": 0.5}, 0, [0.0] * 9 + [9.0] * 9 + [10.0] * 9, 10),
    ("old requests buy nothing", {"ratio": 0.5, "min_per_s": 0.0}, 100, [10.0] * 50, 0),
    ("a long pause clears it", {"ratio": 0.0, "min_per_s": 0.5}, 0, [0.0] * 9 + [1000.0] * 9, 10),
]


@pytest.mark.parametrize("_, settings, requests, asked, expected", BUDGETS, ids=[case[0] for case in BUDGETS])
def test_retry_budget(_: str, settings: dict[str, Any], requests: int, asked: list[float], expected: int) -> None:
    budget = RetryBudget(**settings)
    for _n in range(requests):
        budget.request(0.0)
    assert sum(budget.take(now) for now in asked) == expected


def test_backoff_grows_to_a_bound_and_is_spread_over_all_of_it() -> None:
    assert [backoff_s(n, 1.0) for n in (0, 1, 2, 9, 999)] == [0.025, 0.05, 0.1, 1.0, 1.0]
    assert backoff_s(3, 0.0) == 0.0
    assert backoff_s(3, 0.5) == backoff_s(3, 1.0) / 2


@pytest.mark.parametrize(
    "replicas, out, expected",
    [(0, 0, False), (1, 0, False), (1, 1, True), (2, 1, False), (2, 2, True), (3, 2, False), (3, 3, True),
     (10, 6, False), (10, 7, True)],
)  # fmt: skip
def test_panic(replicas: int, out: int, expected: bool) -> None:
    assert panics(replicas, out, 0.67) is expected
