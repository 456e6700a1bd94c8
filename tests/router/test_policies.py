"""Least outstanding tokens, and the bookkeeping it looks at."""

from typing import NamedTuple

import pytest

from wherry_protocol.worker import End, Started, Token
from wherry_router.policies.least_outstanding import choose
from wherry_router.pool import EXPECTED_OUTPUT, Endpoint, Pool, Replica


class View(NamedTuple):
    name: str
    outstanding_tokens: int = 0
    requests: int = 0
    last_chosen: int = 0


CASES = [
    ("nobody", [], None),
    ("the only one", [View("a", 900, 9)], "a"),
    ("fewest tokens, though more requests", [View("a", 500, 1), View("b", 400, 8)], "b"),
    ("ties go to fewer requests", [View("a", 100, 3), View("b", 100, 2)], "b"),
    ("then to the one not chosen for longest", [View("a", 0, 0, 7), View("b", 0, 0, 3)], "b"),
]


@pytest.mark.parametrize("_, candidates, expected", CASES, ids=[case[0] for case in CASES])
def test_choice(_: str, candidates: list[View], expected: str | None) -> None:
    chosen = choose(candidates)
    assert (chosen.name if chosen else None) == expected


def test_a_lease_is_put_right_by_events_and_leaves_nothing() -> None:
    replica = Replica(Endpoint("a", "http://a"))
    lease = Pool().lease(replica, prompt_estimate=50, max_tokens=10)
    assert (replica.outstanding_tokens, replica.requests) == (60, 1)
    lease.observe(Started(id="x", prompt_tokens=100, cached_tokens=40, seed=0))
    assert replica.outstanding_tokens == 70
    lease.observe(Token(index=0, ids=[1, 2, 3]))
    assert replica.outstanding_tokens == 7
    lease.observe(Token(index=3, ids=list(range(30))))
    assert replica.outstanding_tokens == 1
    lease.observe(End(finish_reason="stop", prompt_tokens=100, completion_tokens=33))
    lease.release()
    assert (replica.outstanding_tokens, replica.requests) == (0, 0)


def test_an_answer_of_unknown_length_has_an_expected_one() -> None:
    replica = Replica(Endpoint("a", "http://a"))
    pool = Pool()
    pool.lease(replica, 0, None)
    pool.lease(replica, 0, 10**9)
    assert replica.outstanding_tokens == 2 * EXPECTED_OUTPUT


async def test_replicas_that_stay_keep_their_state() -> None:
    pool = Pool()
    a, b = Endpoint("a", "http://a"), Endpoint("b", "http://b")
    assert not pool.known
    pool.set_endpoints([a])
    first = pool.choose([])
    assert first is not None
    first.outstanding_tokens = 5
    pool.set_endpoints([a, b])
    assert pool.has(first)
    assert pool.known
    second = pool.choose([])
    assert second is not None
    assert second.endpoint == b
    assert pool.choose([first, second]) is None
    pool.set_endpoints([Endpoint("a-again", "http://a")])
    assert not pool.has(first), "a new pod at an old address is another replica"


async def test_waiting_for_a_replica_is_bounded() -> None:
    pool = Pool()
    await pool.wait(0.01)
    assert pool.choose([]) is None
