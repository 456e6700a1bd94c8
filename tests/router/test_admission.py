"""The decisions of admission, as tables and stories. Time and capacity are the test's."""

import math
import random
from collections import Counter
from typing import Any

import pytest

from wherry_protocol.openai.errors import ApiError
from wherry_protocol.worker import LoadReport
from wherry_router.admission.capacity import Capacity, Meter
from wherry_router.admission.classes import Classes, PriorityClass, parse_class
from wherry_router.admission.drain import Drain
from wherry_router.admission.fair import MAX_IDLE, FairQueue
from wherry_router.admission.queues import Queues, Turned
from wherry_router.admission.settings import Bounds
from wherry_router.admission.ticket import State, Ticket
from wherry_router.caller import ANYBODY, Caller
from wherry_router.pool import Endpoint, Replica

HIGH = PriorityClass(name="high", priority=100)
MID = PriorityClass(name="mid", default=True)
LOW = PriorityClass(name="low", priority=-10)
NOBODY = Capacity(replicas=0, limit=math.inf)


def capacity(limit: int, **more: Any) -> Capacity:
    return Capacity(replicas=1, limit=limit, **more)


class Story:
    """Queues of high, mid and low. Requests are named; each takes a slot and 100 tokens unless it says otherwise."""

    def __init__(self, limit: int = 0, classes: tuple[PriorityClass, ...] = (HIGH, MID, LOW), **bounds: Any) -> None:
        self.now = 1000.0
        self.classes = Classes(classes)
        self.queues = Queues(self.classes, Bounds(**bounds), self.now)
        self.capacity = capacity(limit)
        self.tickets: dict[str, Ticket] = {}
        self.turned: list[str] = []

    def _note(self, turned: list[Turned]) -> None:
        self.turned += [f"{self._name(one.ticket)} {one.reason} {one.retry_after_s}" for one in turned]

    def _name(self, ticket: Ticket) -> str:
        return next(name for name, one in self.tickets.items() if one is ticket)

    def come(self, *names: str, of: str = "mid", timeout_s: float = 1e6, **fields: Any) -> str:
        """Requests come; who goes on by that."""
        gone = []
        for name in names:
            rank = [one.name for one in self.classes.all].index(of)
            details = {"cost": 100, "tenant": name[0], **fields}
            ticket = self.tickets[name] = Ticket(rank=rank, arrived=self.now, deadline=self.now + timeout_s, **details)
            passed, turned = self.queues.offer(ticket, self.now, self.capacity)
            gone += [self._name(one) for one in passed] + [name] * (ticket.state is State.RUNNING)
            self._note(turned)
        return " ".join(gone)

    def ends(self, *names: str, tokens: int = 100) -> str:
        """Requests end; who goes on by that."""
        gone = []
        for name in names:
            self.queues.leave(self.tickets[name], self.now, tokens)
            gone += [self._name(one) for one in self.queues.pump(self.now, self.capacity)]
        return " ".join(gone)

    def room(self, limit: int, **more: Any) -> str:
        self.capacity = capacity(limit, **more)
        return " ".join(self._name(one) for one in self.queues.pump(self.now, self.capacity))

    def serve(self, count: int, tokens: int = 100) -> str:
        """One after the other goes on and ends."""
        gone: list[str] = []
        for _ in range(count):
            gone += (name := self.room(sum(self.queues.running) + 1)).split()
            if name:
                self.queues.leave(self.tickets[name], self.now, tokens)
        self.capacity = capacity(0)
        return " ".join(gone)

    def wait(self, seconds: float) -> str:
        self.now += seconds
        self._note(self.queues.expire(self.now))
        gone = [self._name(one) for one in self.queues.pump(self.now, self.capacity)]
        self._note(self.queues.expire(self.now))
        return " ".join(gone)


def test_what_the_workers_have_room_for_passes_and_the_rest_goes_on_in_order() -> None:
    story = Story(2)
    assert story.come("a1", "a2", "a3", "a4") == "a1 a2"
    assert story.ends("a2") == "a3"
    assert story.ends("a1", "a3") == "a4"
    assert (story.queues.requests, story.queues.tokens) == (0, 0)
    assert not any(story.queues.queues[0]._lanes), "nothing is kept of who has nothing here"


def test_higher_classes_go_first() -> None:
    story = Story()
    story.come("l1", of="low")
    story.come("m1", "m2")
    story.come("h1", of="high")
    assert story.serve(4) == "h1 m1 m2 l1"


def test_what_runs_of_lower_classes_does_not_hold_up_a_higher_one() -> None:
    story = Story(2)
    assert story.come("l1", "l2", "l3", of="low") == "l1 l2"
    # The engine pauses both.
    assert story.come("h1", "h2", "h3", of="high") == "h1 h2"
    assert story.ends("h1") == "h3"
    assert story.ends("h2", "h3") == "", "those of the low class are on the workers, so there is no room for a third"
    assert story.ends("l1") == "l3"


def test_one_that_needs_many_slots_is_not_overtaken_and_runs_where_nothing_else_does() -> None:
    story = Story(4)
    assert story.come("a1") == "a1"
    assert story.come("b1", slots=9) == ""
    assert story.come("c1") == ""
    assert story.ends("a1") == "b1"
    assert story.ends("b1") == "c1"


def test_answers_of_one_request_free_their_slots_one_by_one() -> None:
    story = Story(3)
    story.come("a1", slots=3)
    assert story.come("b1") == ""
    story.queues.freed(story.tickets["a1"])
    assert story.wait(0) == "b1"
    story.ends("a1", "b1")
    assert sum(story.queues.running) == 0


class TestFairShare:
    def test_tenants_take_turns_whatever_number_each_sends(self) -> None:
        story = Story()
        story.come(*(f"a{i}" for i in range(10)))
        story.come("b0", "b1", "b2")
        assert story.serve(7) == "a0 b0 a1 b1 a2 b2 a3"

    def test_by_tokens_not_by_requests(self) -> None:
        story = Story()
        story.come("a0", "a1", "a2", cost=300)
        story.come("b0", "b1", "b2", "b3", "b4", "b5", cost=100)
        assert story.serve(8, tokens=0).count("a") >= 2
        story = Story()
        story.come("a0", "a1", "a2", cost=300)
        story.come("b0", "b1", "b2", "b3", "b4", "b5", cost=100)
        served = []
        for _ in range(8):
            name = story.room(sum(story.queues.running) + 1)
            served.append(name)
            story.queues.leave(story.tickets[name], story.now, story.tickets[name].cost)
        assert " ".join(served) == "a0 b0 b1 b2 a1 b3 b4 b5"

    def test_by_weight(self) -> None:
        story = Story()
        story.come(*(f"a{i}" for i in range(12)), weight=3.0)
        story.come(*(f"b{i}" for i in range(12)))
        served = Counter(name[0] for name in story.serve(12).split())
        assert served == {"a": 9, "b": 3}

    def test_what_an_answer_really_took_is_settled(self) -> None:
        story = Story()
        story.come(*(f"a{i}" for i in range(9)))
        story.come(*(f"b{i}" for i in range(9)))
        assert story.room(1) == "a0"
        assert story.ends("a0", tokens=500) == "b0", "it took five times what it was taken for"
        story.capacity = capacity(0)
        story.ends("b0")
        assert story.serve(6) == "b1 b2 b3 b4 a1 b5"

    def test_who_was_away_has_no_claim_to_the_time_before(self) -> None:
        story = Story()
        story.come("b0")
        story.come(*(f"a{i}" for i in range(100)))
        story.serve(60)
        story.come(*(f"b{i}" for i in range(1, 10)))
        served = story.serve(10).split()
        assert sum(name[0] == "b" for name in served) == 5

    def test_nor_has_a_new_one_to_what_passed_while_nobody_waited(self) -> None:
        story = Story(1000)
        for i in range(100):
            story.come(f"a{i}")
        story.room(0)
        story.come(*(f"a{i}" for i in range(100, 110)))
        story.come(*(f"b{i}" for i in range(10)))
        served = Counter(name[0] for name in story.serve(10).split())
        assert served == {"a": 5, "b": 5}

    def test_idle_tenants_are_forgotten(self) -> None:
        queue = FairQueue()
        for i in range(3 * MAX_IDLE):
            ticket = Ticket(tenant=f"t{i}")
            queue.pass_by(ticket)
            queue.ended(ticket)
        assert len(queue._lanes) <= MAX_IDLE

    @pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 3.0)])
    def test_one_that_sends_ten_times_as_much_gets_no_more(self, weights: tuple[float, float]) -> None:
        """One sends as much as all workers take, the other ten times that, in requests of mixed sizes."""
        story = Story(8, max_requests=50)
        luck = random.Random(1)
        spent: Counter[str] = Counter()
        running: list[str] = []
        number = 0
        for step in range(4000):
            for tenant, weight, count in (("a", weights[0], 80), ("b", weights[1], 8)):
                for _ in range(count if step % 8 == 0 else 0):
                    cost = luck.randint(50, 400)
                    running += story.come(f"{tenant}{number}", cost=cost, weight=weight).split()
                    number += 1
            name = running.pop(luck.randrange(len(running)))
            tokens = luck.randint(20, 2 * story.tickets[name].cost)
            spent[name[0]] += tokens
            running += story.ends(name, tokens=tokens).split()
            story.tickets = {n: t for n, t in story.tickets.items() if t.state is not State.DONE}
        share = spent["a"] / spent.total()
        assert share == pytest.approx(weights[0] / sum(weights), rel=0.05)


class TestBounds:
    def test_over_a_bound_who_sends_most_displaces_its_own(self) -> None:
        story = Story(max_requests=4)
        story.come("a1", "a2", "a3", "b1")
        story.come("a4")
        assert story.turned == ["a4 queue_full 1"]
        story.come("b2")
        assert story.turned[1:] == ["a3 shed 1"]

    def test_the_lowest_class_is_shed_first(self) -> None:
        story = Story(max_requests=3)
        story.come("l1", "l2", of="low")
        story.come("m1")
        story.come("h1", of="high")
        assert story.turned == ["l2 shed 1"]
        story.come("h2", "h3", of="high")
        assert story.turned[1:] == ["l1 shed 1", "m1 shed 1"]
        story.come("h4", of="high")
        story.come("l3", of="low")
        assert story.turned[3:] == ["h4 queue_full 1", "l3 queue_full 1"]

    def test_tokens_are_bounded_too(self) -> None:
        story = Story(max_tokens=1000)
        story.come("a1", "b1", cost=400)
        story.come("c1", cost=300)
        assert story.turned == ["b1 shed 1"]
        story.come("d1", cost=5000)
        assert story.turned[1:] == ["d1 queue_full 1"], "nobody is displaced for what would never fit"

    def test_a_class_has_bounds_of_its_own(self) -> None:
        low = PriorityClass(name="low", priority=-1, max_queued_requests=1, max_queued_tokens=150)
        story = Story(classes=(MID, low))
        story.come("m1", "m2", "m3")
        story.come("l1", "l2", of="low")
        assert story.turned == ["l2 queue_full 1"]
        story.ends("l1")
        story.come("l3", cost=151, of="low")
        assert story.turned[1:] == ["l3 queue_full 1"]

    def test_where_nothing_may_wait_nothing_waits(self) -> None:
        story = Story(1, max_requests=0)
        assert story.come("a1", "a2") == "a1"
        assert story.turned == ["a2 queue_full 1"]

    def test_what_is_too_large_for_the_queue_still_passes_where_there_is_room(self) -> None:
        story = Story(1, max_tokens=10)
        assert story.come("a1", cost=5000) == "a1"


class TestTime:
    def test_a_deadline_in_the_queue(self) -> None:
        story = Story()
        story.come("a1", timeout_s=5)
        story.come("b1", timeout_s=2)
        story.wait(1.9)
        assert story.turned == []
        story.wait(0.1)
        story.wait(3)
        assert story.turned == ["b1 timeout 1", "a1 timeout 1"]
        assert story.queues.requests == 0

    def test_no_time_to_wait_is_refused_only_where_it_would_have_to(self) -> None:
        story = Story(1)
        assert story.come("a1", timeout_s=0) == "a1"
        story.come("a2", timeout_s=0)
        assert story.turned == ["a2 too_slow 1"]

    def test_a_client_that_leaves_frees_its_place_at_once(self) -> None:
        story = Story(max_requests=2)
        story.come("a1", "a2")
        story.ends("a1")
        story.come("a3")
        assert story.turned == []
        assert story.serve(2) == "a2 a3"

    def test_the_rate_of_the_last_seconds_tells_when_to_come_again_and_who_cannot_make_it(self) -> None:
        story = Story(max_requests=100)
        story.come(*(f"a{i}" for i in range(100)))
        for _ in range(40):
            story.now += 0.5
            story.serve(1)
        # 200 tokens/s, 60 requests of 100 tokens wait.
        assert story.queues.wait_s(Ticket(rank=1, tenant="a")) == pytest.approx(30, rel=0.03)
        story.come("a100", timeout_s=20)
        assert story.turned == ["a100 too_slow 30"]
        # Another tenant does not wait behind the first one's.
        story.come("b1", timeout_s=1)
        assert story.serve(1) == "b1"
        story.come(*(f"a{i}" for i in range(101, 142)))
        assert story.turned[1:] == ["a141 queue_full 47"]

    def test_time_in_which_nothing_waits_says_nothing_of_the_rate(self) -> None:
        drain = Drain(0.0)
        drain.advance(100.0, waiting=False)
        assert drain.rate() is None
        for second in range(1, 31):
            drain.advance(100.0 + second, waiting=True)
            drain.served(500)
        assert drain.rate() == pytest.approx(500, rel=0.06)
        before = drain.rate()
        drain.advance(1000.0, waiting=False)
        assert drain.rate() == before
        for second in range(1, 31):
            drain.advance(1000.0 + second, waiting=True)
            drain.served(50)
        assert drain.rate() == pytest.approx(75, rel=0.1), "nearly all that it goes by is of the last seconds"

    def test_a_low_class_is_not_told_the_rate_of_those_before_it(self) -> None:
        story = Story()
        story.come(*(f"h{i}" for i in range(100)), of="high")
        story.come(*(f"l{i}" for i in range(20)), of="low")
        low = Ticket(rank=2, tenant="x")
        for step in range(80):
            story.now += 0.1
            rank_high = story.queues.queues[0].requests
            story.serve(1)
            assert story.queues.queues[0].requests == rank_high - 1, step
        assert story.queues.wait_s(low) == pytest.approx(20 / 10, rel=0.1), "as far as anybody knows"


class TestNoReplica:
    def test_requests_are_held_for_a_replica(self) -> None:
        story = Story(no_replica_s=30.0)
        story.capacity = NOBODY
        story.come("a1", "a2")
        assert story.wait(29) == ""
        assert story.turned == []
        story.capacity = capacity(5)
        assert story.wait(0.1) == "a1 a2"

    def test_but_not_for_ever(self) -> None:
        story = Story(no_replica_s=30.0)
        story.capacity = NOBODY
        story.come("a1")
        story.wait(10)
        story.come("a2")
        story.wait(20)
        assert story.turned == ["a1 no_replica 1"]
        story.wait(10)
        assert story.turned[1:] == ["a2 no_replica 1"]

    def test_and_no_more_than_may_wait(self) -> None:
        story = Story(max_requests=1)
        story.capacity = NOBODY
        story.come("a1", "a2")
        assert story.turned == ["a2 queue_full 1"]

    def test_the_time_begins_when_the_last_replica_goes(self) -> None:
        story = Story(0, no_replica_s=5.0)
        story.come("a1")
        story.wait(100)
        story.capacity = NOBODY
        story.wait(4)
        assert story.turned == []
        story.wait(1.1)
        assert story.turned == []
        story.wait(4)
        assert story.turned == ["a1 no_replica 1"]


def load(running: int = 0, waiting: int = 0, *, kv_used: int = 0, kv_total: int = 10000, most: int = 16) -> LoadReport:
    counters = [f for f in LoadReport.__struct_fields__ if f.endswith("_total") and f != "kv_tokens_total"]
    return LoadReport(
        model="chat",
        ready=True,
        running=running,
        waiting=waiting,
        max_running=most,
        kv_tokens_used=kv_used,
        kv_tokens_total=kv_total,
        heartbeat_age_s=0.0,
        **dict.fromkeys(counters, 0),
    )


def replica(report: LoadReport | None, own: int = 0) -> Replica:
    one = Replica(Endpoint("a", "http://a"))
    one.load, one.requests = report, own
    return one


class TestCapacity:
    def test_a_worker_is_kept_full_and_a_little_more(self) -> None:
        got = Meter(512).measure([replica(load(most=64)), replica(load(most=4))], 0, 1.0)
        assert (got.replicas, got.limit, got.queue, got.kv_free) == (2, 64 + 8 + 4 + 2, 10, 18000)

    def test_what_other_routers_have_there_counts(self) -> None:
        one = replica(load(10, 3), own=4)
        meter = Meter(512)
        assert meter.measure([one], 0, 1.0).others == 9
        one.requests = 7
        assert meter.measure([one], 0, 1.05).others == 9, "what was sent since is this router's own"
        one.load = load(12, 0)
        assert meter.measure([one], 0, 1.1).others == 5

    def test_own_requests_on_replicas_that_get_none_take_no_room(self) -> None:
        assert Meter(512).measure([replica(load())], 5, 1.0).others == -5

    def test_the_bulkhead_holds_too(self) -> None:
        assert Meter(6).measure([replica(load(most=64))], 0, 1.0).limit == 6

    def test_who_has_just_come_gets_a_few_until_it_tells_its_load(self) -> None:
        meter, replicas = Meter(512), [replica(load(most=64)), replica(None)]
        assert meter.measure(replicas, 0, 1.0).limit == 72 + 4
        assert meter.measure(replicas, 0, 1.9).limit == 72 + 4
        assert meter.measure(replicas, 0, 2.0).limit == 72 + 512, "it tells nothing, so the bulkhead is what is known"
        replicas[1].load = load(most=64)
        assert meter.measure(replicas, 0, 2.1).limit == 72 + 72
        assert Meter(512).measure([], 0, 1.0).replicas == 0

    def test_a_full_cache_holds_prompts_back_but_for_a_few_that_wait_in_the_worker(self) -> None:
        story = Story()
        story.room(100, queue=2, kv_free=1000, since=story.now)
        assert story.come("a1", "a2", prompt=400) == "a1 a2"
        assert story.come("a3", "a4", prompt=400) == "", "800 of 1000 tokens are spoken for"
        story.now += 1
        assert story.room(100, queue=2, waiting=1, kv_free=400, since=story.now) == "a3", (
            "the reports know of a1 and a2"
        )
        story.come("a5", prompt=400)
        assert story.room(100, queue=2, waiting=1, kv_free=0, since=story.now) == "", "one waits, one is on its way"
        story.now += 1
        assert story.room(100, queue=2, waiting=1, kv_free=0, since=story.now) == "a4"

    def test_a_request_that_ends_before_any_report_gives_its_room_back(self) -> None:
        story = Story()
        story.room(100, queue=0, kv_free=500, since=story.now)
        story.come("a1", prompt=400)
        assert story.come("a2", prompt=400) == ""
        assert story.ends("a1") == "a2"


class TestClasses:
    @pytest.mark.parametrize(
        ("asked", "caller", "expected"),
        [
            (None, ANYBODY, "mid"),
            (b"high", ANYBODY, "high"),
            (None, Caller(tenant="t", priority_class="high"), "high"),
            (b"low", Caller(tenant="t", priority_class="high"), "low"),
            (b"high", Caller(tenant="t", priority_class="high"), "high"),
            (b"high", Caller(tenant="t", priority_class="mid"), 403),
            (b"high", Caller(tenant="t"), 403),
            (b"low", Caller(key="k"), "low"),
            (None, Caller(tenant="t", priority_class="gone"), "mid"),
            (b"urgent", ANYBODY, 400),
            (b"\xff", ANYBODY, 400),
            (b"", ANYBODY, 400),
        ],
    )
    def test_who_gets_which(self, asked: bytes | None, caller: Caller, expected: str | int) -> None:
        classes = Classes((LOW, HIGH, MID))
        assert [one.name for one in classes.all] == ["high", "mid", "low"]
        if isinstance(expected, str):
            assert classes.all[classes.of(asked, caller)].name == expected
            return
        with pytest.raises(ApiError, match="high, mid, low" if expected == 400 else "may ask for") as refused:
            classes.of(asked, caller)
        assert refused.value.status == expected

    def test_without_any_there_is_one(self) -> None:
        classes = Classes()
        assert [(one.name, one.priority) for one in classes.all] == [("default", 0)]
        assert classes.of(b"default", ANYBODY) == 0

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("name=a", PriorityClass(name="a")),
            (
                "name=a-1, priority=-5,max-queued-requests=2,max-queued-tokens=0,default",
                PriorityClass(name="a-1", priority=-5, max_queued_requests=2, max_queued_tokens=0, default=True),
            ),
            ("name=a,default=false", PriorityClass(name="a")),
            ("priority=1", None),
            ("name=a,name=b", None),
            ("name=a,color=red", None),
            ("name=a,priority=x", None),
            ("name=a,default=yes", None),
            ("", None),
        ],
    )
    def test_as_a_flag(self, text: str, expected: PriorityClass | None) -> None:
        if expected is None:
            with pytest.raises(ValueError, match=r"\S"):
                parse_class(text)
        else:
            assert parse_class(text) == expected

    @pytest.mark.parametrize(
        ("classes", "problem"),
        [
            ([PriorityClass(name="A", default=True)], "no name"),
            ([PriorityClass(name="a", priority=10**7, default=True)], "not within"),
            ([PriorityClass(name="a", max_queued_tokens=-1, default=True)], "negative"),
            ([PriorityClass(name="a", default=True), PriorityClass(name="a", priority=1)], "one name"),
            ([PriorityClass(name="a", default=True), PriorityClass(name="b")], "one priority"),
            ([PriorityClass(name="a")], "exactly one"),
            ([PriorityClass(name="a", default=True), PriorityClass(name="b", priority=1, default=True)], "exactly one"),
        ],
    )
    def test_what_does_not_go_together(self, classes: list[PriorityClass], problem: str) -> None:
        with pytest.raises(ValueError, match=problem):
            Classes(classes)
