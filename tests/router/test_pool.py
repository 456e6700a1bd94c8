"""The pool: who gets the next request after what has happened. Its clock is the test's."""

import asyncio

import pytest

from wherry_protocol.router_report import ReplicaReport
from wherry_protocol.worker import End, Started, Token
from wherry_router.pool import Endpoint, Lease, Pool, Replica
from wherry_router.settings import Limits

END = End(finish_reason="stop", prompt_tokens=1, completion_tokens=1)


class Story:
    """A pool of `count` replicas called a, b, c …"""

    def __init__(self, count: int, **limits: float) -> None:
        self.now = 1000.0
        self.opened: list[str] = []
        self.pool = Pool(
            Limits(**limits),  # type: ignore[arg-type]
            on_open=lambda replica: self.opened.append(replica.endpoint.name),
            clock=lambda: self.now,
        )
        self.endpoints = [Endpoint(name, f"http://{name}") for name in "abcdefghij"[:count]]
        self.pool.set_endpoints(self.endpoints)

    def replica(self, name: str) -> Replica:
        return next(replica for replica in self.pool.replicas() if replica.endpoint.name == name)

    def begin(self, name: str) -> Lease:
        return self.pool.lease(self.replica(name), 1, 1)

    def answer(self, name: str, ttft_s: float = 0.0) -> None:
        lease = self.begin(name)
        self.now += ttft_s
        for event in (Started(id="x", prompt_tokens=1, cached_tokens=0, seed=1), Token(index=0, ids=[1]), END):
            lease.observe(event)
        lease.release()

    def fail(self, name: str, reason: str, lease: Lease | None = None) -> None:
        lease = lease or self.begin(name)
        lease.failed(reason)
        lease.release()

    def choices(self, count: int) -> str:
        """Who gets the next `count` requests, none of which ends."""
        names = ""
        for _ in range(count):
            chosen = self.pool.choose([])
            if chosen is None:
                names += "-"
                continue
            self.pool.lease(chosen, 1, 1)
            names += chosen.endpoint.name
        return names

    def states(self) -> str:
        return " ".join(report.state for report in self.pool.report())


def test_a_worker_that_is_gone_gets_nothing_until_a_probe_and_then_one_request() -> None:
    story = Story(3)
    story.fail("a", "lost")
    assert story.opened == ["a"]
    assert story.states() == "suspect routable routable"
    assert story.choices(4) == "bcbc"
    story.pool.probed(story.replica("a"), well=False)
    assert "a" not in story.choices(4)
    story.pool.probed(story.replica("a"), well=True)
    assert story.choices(3) == "abc", "the next request tests it, though b and c are well; no second one does"


def test_an_answer_that_goes_on_tests_nobody_while_another_is_well() -> None:
    story = Story(2)
    story.fail("a", "lost")
    story.pool.probed(story.replica("a"), well=True)
    b = story.replica("b")
    for _ in range(3):
        assert story.pool.choose_successor([]) is b
    assert story.pool.choose_successor([b]) is story.replica("a")


def test_requests_that_fail_one_after_the_other_open_the_breaker_and_4xx_do_not() -> None:
    story = Story(2)
    for _ in range(9):
        story.begin("a").release()  # what a refusal of the request itself, or a client that left, comes to
    story.fail("a", "worker_error")
    story.fail("a", "queue_full")
    story.fail("a", "worker_error")
    assert story.states() == "routable routable"
    story.fail("a", "worker_error")
    assert story.states() == "suspect routable"


def test_fifty_streams_that_are_cut_are_one_fault() -> None:
    story = Story(3)
    leases = [story.begin("a") for _ in range(50)]
    for lease in leases:
        lease.observe(Token(index=0, ids=[1]))
    for lease in leases:
        story.fail("a", "lost", lease)
    assert story.opened == ["a"]
    story.pool.probed(story.replica("a"), well=True)
    story.answer("a")
    assert story.states() == "routable routable routable", "neither open nor ejected for the fifty"


def test_a_stream_that_began_before_the_trouble_and_lived_through_it_counts_again() -> None:
    story = Story(2)
    old = story.begin("a")
    old.observe(Token(index=0, ids=[1]))
    story.fail("a", "lost")
    story.pool.probed(story.replica("a"), well=True)
    story.answer("a")
    old.observe(Token(index=1, ids=[1]))
    story.fail("a", "frozen", old)
    assert story.opened == ["a", "a"]


def test_a_slow_replica_is_ejected_and_comes_back_by_itself() -> None:
    story = Story(4, eject_s=10)
    for _ in range(10):
        for name in "abc":
            story.answer(name, 0.1)
        story.answer("d", 1.5)
    assert story.states() == "routable routable routable suspect"
    assert "d" not in story.choices(8)
    story.now += 11
    assert story.states() == "routable routable routable routable"
    assert "d" in story.choices(8)


def test_a_replica_that_fails_every_other_request_is_ejected_though_never_three_in_a_row() -> None:
    story = Story(3)
    for _ in range(12):
        story.now += 0.5
        for name in "bc":
            story.answer(name)
        story.answer("a")
        story.fail("a", "worker_error")
    assert story.opened == []
    assert story.states() == "suspect routable routable"


@pytest.mark.parametrize("count, failed, chosen", [(3, "ab", "cccccc"), (3, "abc", "abcabc"), (1, "a", "aaaaaa")])
def test_panic_uses_all_where_too_many_look_bad(count: int, failed: str, chosen: str) -> None:
    story = Story(count)
    for name in failed:
        story.fail(name, "lost")
    assert story.choices(6) == chosen


def test_the_bulkhead_holds_new_requests_and_no_answer_that_goes_on() -> None:
    story = Story(2, max_per_replica=2)
    assert story.choices(5) == "abab-"
    assert story.pool.lacks_room([])
    assert story.pool.choose_successor([]) is not None
    full = Story(2, max_per_replica=2)
    full.fail("a", "lost")
    assert full.choices(3) == "bb-"
    assert full.pool.lacks_room([])
    assert not full.pool.lacks_room([full.replica("b")]), "a is not full, it is away"


def test_retries_cost_the_budget_but_for_the_first_move_off_a_worker_that_is_gone() -> None:
    story = Story(3, retry_share=0.0, retry_min_per_s=0.1)
    story.fail("a", "lost")
    assert [story.pool.retry_pause("lost", 0) for _ in range(50)] == [0.0] * 50
    assert story.pool.retry_pause("lost", 1) is not None, "the second move is a retry like any"
    assert story.pool.retry_pause("worker_error", 0) is None, "and the budget was one"


def test_in_panic_no_retry_is_free() -> None:
    story = Story(1, retry_share=0.0, retry_min_per_s=0.1)
    story.fail("a", "lost")
    assert story.pool.retry_pause("lost", 0) is not None
    assert story.pool.retry_pause("lost", 0) is None


def test_who_drains_gets_nothing_new_and_does_not_count_as_failed() -> None:
    story = Story(3)
    story.pool.set_endpoints(story.endpoints, {story.endpoints[0]: 1060.0, story.endpoints[1]: None})
    assert story.states() == "draining draining routable"
    assert story.choices(3) == "ccc"
    assert (story.replica("a").drain_deadline, story.replica("b").drain_deadline) == (1060.0, None)
    story.fail("a", "lost")
    story.fail("b", "lost")
    assert story.choices(2) == "cc", "no panic: whoever serves is well"
    story.pool.set_endpoints(story.endpoints[:2], dict.fromkeys(story.endpoints[:2]))
    assert story.choices(1) == "-", "a pool that only drains takes nothing"


async def test_a_replica_that_comes_back_with_its_streams_and_an_open_breaker_is_probed_again() -> None:
    story = Story(2)
    lease = story.begin("a")
    story.fail("a", "lost")
    story.pool.set_endpoints(story.endpoints[1:])
    assert story.pool.report()[-1] == ReplicaReport(name="a", state="draining", in_flight=1)
    story.pool.set_endpoints(story.endpoints)
    assert story.opened == ["a", "a"]
    assert story.states() == "suspect routable"
    lease.release()


async def test_a_withdrawn_drain_wakes_who_waits() -> None:
    pool = Pool()
    endpoint = Endpoint("a", "http://a")
    pool.set_endpoints([endpoint], {endpoint: None})
    waiting = asyncio.create_task(pool.wait(60))
    await asyncio.sleep(0)
    assert pool.choose([]) is None
    pool.set_endpoints([endpoint])
    async with asyncio.timeout(20):
        await waiting
    assert pool.choose([]) is not None
