"""Who is chosen, by policy; and the bookkeeping that policies look at."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import pytest

from wherry_protocol.prefix import pack_keys
from wherry_protocol.worker import EXPECTED_OUTPUT, End, LoadReport, LoadUpdate, PrefixChange, Started, Token
from wherry_router.policies import POLICIES, Ask, Policy
from wherry_router.policies.hashing import identity_of
from wherry_router.policies.power_of_two import PowerOfTwo
from wherry_router.policies.prefix_aware import BOUND, View, decide
from wherry_router.policies.random import RandomChoice
from wherry_router.pool import Endpoint, Pool, Replica


@dataclass
class Fake:
    """A candidate as a test wants it."""

    name: str
    load_tokens: int = 0
    load_requests: int = 0
    last_chosen: int = 0
    cached: int = 0

    @property
    def identity(self) -> int:
        return identity_of(self.name)

    def cached_tokens(self, ask: Ask) -> int:
        return self.cached


def chosen(policy: Policy, candidates: Sequence[Fake], ask: Ask | None = None) -> str:
    return candidates[policy.choose(candidates, ask or Ask()).which].name


CASES = [
    ("round-robin", "the one not chosen for longest", [Fake("a", 0, 0, 7), Fake("b", 9, 9, 3)], "b"),
    ("least-requests", "fewest requests, though more tokens", [Fake("a", 500, 1), Fake("b", 400, 8)], "a"),
    ("least-requests", "ties go to fewer tokens", [Fake("a", 500, 1), Fake("b", 400, 1)], "b"),
    ("least-requests", "then to the one not chosen for longest", [Fake("a", 0, 0, 7), Fake("b", 0, 0, 3)], "b"),
    ("least-tokens", "the only one", [Fake("a", 900, 9)], "a"),
    ("least-tokens", "fewest tokens, though more requests", [Fake("a", 500, 1), Fake("b", 400, 8)], "b"),
    ("least-tokens", "ties go to fewer requests", [Fake("a", 100, 3), Fake("b", 100, 2)], "b"),
    ("least-tokens", "then to the one not chosen for longest", [Fake("a", 0, 0, 7), Fake("b", 0, 0, 3)], "b"),
    ("power-of-two", "the only one", [Fake("a", 900)], "a"),
    ("power-of-two", "of two both are looked at", [Fake("a", 900), Fake("b", 100)], "b"),
    ("session-affinity", "without a session, the fewest tokens", [Fake("a", 900), Fake("b", 100)], "b"),
    ("prefix-aware", "without a key, the fewest tokens", [Fake("a", 900, cached=9), Fake("b", 100)], "b"),
]


@pytest.mark.parametrize("name, _, candidates, expected", CASES, ids=[f"{case[0]}: {case[1]}" for case in CASES])
def test_choice(name: str, _: str, candidates: list[Fake], expected: str) -> None:
    assert chosen(POLICIES[name](), candidates) == expected


def test_random_takes_all_alike_and_two_choices_never_the_worst() -> None:
    three = [Fake("a", 100), Fake("b", 200), Fake("c", 900)]
    policy, two = RandomChoice(Random(1)), PowerOfTwo(Random(1))
    at_random = [chosen(policy, three) for _ in range(900)]
    assert all(250 < at_random.count(name) < 350 for name in "abc")
    of_two = [chosen(two, three) for _ in range(900)]
    assert "c" not in of_two
    assert of_two.count("a") == pytest.approx(600, abs=50), "it is in two of three pairs"


# Sessions.


def homes(candidates: Sequence[Fake], sessions: int = 800) -> dict[str, str]:
    policy = POLICIES["session-affinity"]()
    return {f"s{n}": chosen(policy, candidates, Ask(session=f"s{n}")) for n in range(sessions)}


def test_a_session_stays_and_a_replica_that_leaves_moves_only_its_own() -> None:
    five = [Fake(name) for name in "abcde"]
    before = homes(five)
    assert homes(list(reversed(five))) == before, "another router, which lists them otherwise"
    assert min(list(before.values()).count(name) for name in "abcde") > 100
    after = homes([one for one in five if one.name != "c"])
    assert {s for s in before if after[s] != before[s]} == {s for s in before if before[s] == "c"}
    assert homes(five) == before, "and back"


def test_a_session_moves_on_from_a_replica_with_too_many_requests_and_always_to_the_same() -> None:
    policy = POLICIES["session-affinity"]()
    ask = Ask(session="mine")
    loads = dict.fromkeys("abcd", 8)
    order = [chosen(policy, [Fake(n, load_requests=loads[n]) for n in "abcd"], ask)]
    loads[order[0]] = 14  # of 38, so its share is 12
    order.append(chosen(policy, [Fake(n, load_requests=loads[n]) for n in "abcd"], ask))
    assert order[0] != order[1]
    loads[order[0]] = 10
    assert chosen(policy, [Fake(n, load_requests=loads[n]) for n in "abcd"], ask) == order[0]


# Prefix-aware.

A, B, C = 11, 22, 33


def view(load: int, cached: int = 0, identity: int = A, last_chosen: int = 0) -> View:
    return View(load, cached, identity, last_chosen)


# Prompts of 1000 tokens, 100 tokens of answer.
DECISIONS = [
    ("idle: who has it", [view(0), view(0, 900), view(0)], 1, "prefix"),
    ("idle: who has more of it", [view(0, 300), view(0, 900), view(0)], 1, "prefix"),
    ("all have it: the least busy", [view(300, 900), view(100, 900), view(200, 900)], 1, "prefix"),
    ("all equal: whose turn it is", [view(5, 900, A, 3), view(5, 900, B, 1), view(5, 900, C, 2)], 1, "prefix"),
    ("little is owed: the queue costs less than the prompt", [view(0), view(1700, 900), view(0)], 1, "prefix"),
    ("little is owed: the queue costs more than the prompt", [view(0), view(1900, 900), view(0)], 0, "hot"),
    ("hot: a shorter prefix where there is room", [view(0, 400), view(9000, 900), view(0)], 0, "hot"),
    ("much is owed: a busier one for most of the prompt", [view(90000), view(110000, 900), view(95000)], 1, "prefix"),
    ("much is owed: not for a tenth of it", [view(90000), view(110000, 100), view(95000)], 0, "hot"),
    ("never above the bound", [view(90000), view(150000, 900), view(90000)], 0, "hot"),
    ("a few tokens are no reason", [view(100, 0, A), view(90000, 40, B), view(100, 0, A)], 0, "cold"),
]


@pytest.mark.parametrize("_, views, expected, reason", DECISIONS, ids=[case[0] for case in DECISIONS])
def test_decision(_: str, views: list[View], expected: int, reason: str) -> None:
    assert decide(views, 1000, 100, key=5) == (expected, reason)


def test_routers_that_know_nothing_of_one_another_agree_on_a_cold_prompt() -> None:
    names = "abcdefgh"
    one = [view(0, 0, identity_of(name)) for name in names]
    other = [view(100 if name == "c" else 0, 0, identity_of(name)) for name in reversed(names)]
    found = [names[decide(one, 1000, 100, key).which] for key in range(0, 2**64, 2**55)]
    assert found == [names[::-1][decide(other, 1000, 100, key).which] for key in range(0, 2**64, 2**55)]
    assert min(found.count(name) for name in names) > 30
    hot = [view(9000 if name == "c" else 0, 0, identity_of(name)) for name in names]
    moved = [names[decide(hot, 1000, 100, key).which] for key in range(0, 2**64, 2**55)]
    assert "c" not in moved
    assert [name for name in found if name != "c"] == [m for m, f in zip(moved, found, strict=True) if f != "c"]
    gone = [v for v, name in zip(one, names, strict=True) if name != "c"]
    left = names.replace("c", "")
    assert [left[decide(gone, 1000, 100, key).which] for key in range(0, 2**64, 2**55)] == moved


def test_a_prefix_that_everybody_asks_for_does_not_pile_up_on_one() -> None:
    """The death spiral: whoever has the prefix gets everything, answers ever more slowly, and keeps getting it."""
    loads, cached = [0] * 8, [0] * 8
    for _ in range(2000):
        views = [
            view(load, have, identity_of(str(n))) for n, (load, have) in enumerate(zip(loads, cached, strict=True))
        ]
        which = decide(views, 1000, 100, key=7).which
        loads[which] += 1000 - cached[which] + 100
        cached[which] = 900
    assert max(loads) / (sum(loads) / 8) <= BOUND
    assert min(cached) == 900, "each of them has it now"


# What replicas tell.


def report(running: int = 0, waiting: int = 0, owed: int = 0) -> LoadReport:
    return LoadReport(
        model="chat",
        ready=True,
        running=running,
        waiting=waiting,
        max_running=64,
        kv_tokens_used=0,
        kv_tokens_total=1000,
        prompt_tokens_total=0,
        completion_tokens_total=0,
        prefix_hit_tokens_total=0,
        preemptions_total=0,
        steps_total=0,
        heartbeat_age_s=0.0,
        tokens_owed=owed,
    )


def told(replica: Replica, whole: bool, added: Sequence[int] = (), removed: Sequence[int] = ()) -> None:
    replica.prefixes.apply(PrefixChange(whole=whole, added=pack_keys(list(added)), removed=pack_keys(list(removed))))


class Clocked:
    """A pool with the prefix-aware policy and two replicas."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pool = Pool(policy=POLICIES["prefix-aware"](), clock=lambda: self.now)
        self.pool.set_endpoints([Endpoint(name, f"http://{name}") for name in "ab"])
        self.a, self.b = self.pool.replicas()

    def ask(self, *keys: int) -> Ask:
        return Ask(prompt_tokens=64 * len(keys), output_tokens=16, keys=keys, tokens_per_key=64)


def test_what_others_have_there_counts_and_what_this_router_has_counts_once() -> None:
    replica = Replica(Endpoint("a", "http://a"))
    pool = Pool()
    lease = pool.lease(replica, 100, 50)
    replica.reported(report(running=1))
    assert (replica.load_requests, replica.load_tokens) == (1, 150)
    replica.reported(report(running=1, owed=190))
    assert replica.load_tokens == 150, "the worker reckons otherwise, and there is nobody else"
    replica.reported(report(running=2, waiting=1, owed=900))
    assert (replica.load_requests, replica.load_tokens) == (3, 900)
    lease.release()
    assert (replica.load_requests, replica.load_tokens) == (2, 750)
    replica.reported(None)
    assert (replica.load_requests, replica.load_tokens, replica.load) == (0, 0, None)


def test_a_restarted_router_learns_the_caches_from_the_first_report_and_follows_evictions() -> None:
    story = Clocked()
    told(story.b, True, [1, 2, 3])
    assert story.pool.choose([], story.ask(1, 2, 3, 4)) is story.b
    assert story.b.cached_tokens(story.ask(1, 2, 3, 4)) == 192
    told(story.b, False, [4], [])
    assert story.b.cached_tokens(story.ask(1, 2, 3, 4)) == 256
    told(story.b, False, [9], [3, 4])
    assert story.b.cached_tokens(story.ask(1, 2, 3, 4)) == 128
    told(story.b, True, [])
    assert story.b.cached_tokens(story.ask(1, 2, 3, 4)) == 0, "the worker began anew"


def test_an_answer_that_lost_its_worker_goes_on_where_its_prompt_is_cached() -> None:
    story = Clocked()
    told(story.b, True, [1, 2, 3])
    story.b.outstanding_tokens = 100
    assert story.pool.choose_successor([], story.ask(1, 2, 3)) is story.b
    assert story.pool.choose_successor([story.b], story.ask(1, 2, 3)) is story.a


def test_what_is_on_its_way_counts_as_cached_until_reports_can_tell() -> None:
    story = Clocked()
    for replica in (story.a, story.b):
        told(replica, True)
    ask = story.ask(1, 2, 3)
    first = story.pool.choose([], ask)
    assert first is not None
    lease = story.pool.lease(first, 120, 16, ask)
    assert story.pool.choose([], ask) is first, "before any report"
    second = story.pool.lease(first, 0, 16, ask)
    lease.release()
    story.now += 10
    assert first.cached_tokens(ask) == 192, "the other one is still there"
    second.release()
    assert first.cached_tokens(ask) == 192, "the report may be on its way"
    story.now += 1
    story.pool.lease(first, 1, 1, story.ask(9)).release()
    assert first.cached_tokens(ask) == 0, "no report confirmed it"


def test_a_worker_that_tells_no_prefixes_is_not_taken_to_have_any() -> None:
    story = Clocked()
    ask = story.ask(1, 2, 3)
    story.pool.lease(story.a, 192, 16, ask)
    assert story.a.cached_tokens(ask) == 0


def test_bytes_of_a_token_are_learned_from_workers() -> None:
    story = Clocked()
    ask = Ask(prompt_bytes=1000, prompt_tokens=250)
    for _ in range(200):
        story.pool.started(ask, Started(id="x", prompt_tokens=500, cached_tokens=0, seed=0))
    assert story.pool.asks.bytes_per_token == pytest.approx(2.0, abs=0.01)
    for _ in range(200):
        story.pool.started(Ask(prompt_bytes=9), Started(id="x", prompt_tokens=500, cached_tokens=0, seed=0))
    assert story.pool.asks.bytes_per_token == pytest.approx(2.0, abs=0.01), "short prompts are mostly template"


def test_a_report_that_cannot_be_read_changes_nothing() -> None:
    story = Clocked()
    told(story.a, True, [1, 2])
    broken = PrefixChange(whole=True, added=b"12345")
    with pytest.raises(ValueError, match="whole number"):
        story.pool.reported(story.a, LoadUpdate(load=report(), prefixes=broken))
    assert story.a.prefixes.match([1, 2]) == 2


# The pool's books.


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
