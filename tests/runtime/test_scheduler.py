"""Scheduling without a model: case tables of step plans, and properties over random workloads."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wherry_runtime.scheduling.blocks import BlockManager, IntegrityError, OutOfBlocksError, extend_hashes
from wherry_runtime.scheduling.plan import StepPlan
from wherry_runtime.scheduling.request import Request
from wherry_runtime.scheduling.scheduler import DoesNotFitError, QueueFullError, Scheduler


def scheduler(blocks: int = 100, *, size: int = 4, running: int = 8, budget: int = 16, queued: int = 100) -> Scheduler:
    return Scheduler(BlockManager(blocks, size), max_running=running, max_batched_tokens=budget, max_queued=queued)


def request(name: str, prompt: int, new: int = 4, priority: int = 0, first_token: int | None = None) -> Request:
    """Prompts of different names share nothing; a token says whose it is and where."""
    base = (first_token if first_token is not None else ord(name[0])) * 1000
    return Request(id=name, tokens=[base + i for i in range(prompt)], max_new_tokens=new, priority=priority)


def compute(s: Scheduler, plan: StepPlan, token: int = 7) -> list[str]:
    """Pretends to run the plan; returns the requests that finished."""
    s.commit(plan, {step.request_id: [token] for step in plan.sequences if step.samples})
    done = []
    for step in plan.sequences:
        r = s.get(step.request_id)
        if r.num_new >= r.max_new_tokens:
            s.remove(r.id)
            done.append(r.id)
    s.check_integrity()
    return done


def shown(plan: StepPlan) -> str:
    """`a:0+16 b:3+1*`: ranges, and a star where a token is drawn."""
    steps = " ".join(f"{s.request_id}:{s.start}+{len(s.tokens)}{'*' if s.samples else ''}" for s in plan.sequences)
    return steps + (f" preempted {' '.join(plan.preempted)}" if plan.preempted else "")


@dataclass
class Table:
    """Requests that arrive before each step, and the steps expected."""

    about: str
    expected: list[str]
    arrivals: dict[int, list[Request]]
    settings: dict[str, int] = field(default_factory=dict)


TABLES = [
    Table(
        "a request alone: prompt, then a token a step",
        ["a:0+5*", "a:5+1*", "a:6+1*", ""],
        {0: [request("a", 5, new=3)]},
    ),
    Table(
        "a long prompt is cut to the budget",
        ["a:0+16", "a:16+16", "a:32+8*", "a:40+1*"],
        {0: [request("a", 40, new=2)]},
    ),
    Table(
        "the rest of the budget goes to the next prompt",
        ["a:0+10* b:0+6", "a:10+1* b:6+4*", "b:10+1*"],
        {0: [request("a", 10, new=2), request("b", 10, new=2)]},
    ),
    Table(
        "decodes come before a prompt that is half done, even one that ranks first",
        ["b:0+3*", "b:3+1* a:0+15", "b:4+1* a:15+15"],
        {0: [request("b", 3)], 1: [request("a", 40, priority=1)]},
    ),
    Table(
        "priority first, then arrival",
        ["c:0+4* a:0+4*", "c:4+1* a:4+1*", "b:0+4*"],
        {0: [request("a", 4, new=2), request("b", 4, new=1), request("c", 4, new=2, priority=5)]},
        {"running": 2},
    ),
    Table(
        "no more run than may: the next one starts when one has ended",
        ["a:0+2*", "b:0+2*", "c:0+2*"],
        {0: [request(n, 2, new=1) for n in "abc"]},
        {"running": 1},
    ),
    Table(
        "never more requests than tokens in the budget",
        ["a:0+1* b:0+1*", "a:1+1* b:1+1*", "c:0+1*"],
        {0: [request(n, 1, new=2) for n in "abc"]},
        {"running": 8, "budget": 2},
    ),
    Table(
        "the last one gives way when blocks run out, and comes back from the prefix cache",
        [
            "a:0+8* b:0+4*",
            "a:8+1* b:4+1*",
            "a:9+1* b:5+1*",
            "a:10+1* b:6+1*",
            "a:11+1* b:7+1*",
            "a:12+1* preempted b",
            "a:13+1*",
            "b:4+5*",
        ],
        {0: [request("a", 8, new=7), request("b", 4, new=6)]},
        {"blocks": 5},
    ),
    Table(
        "a prompt waits until all of it fits, and does not chase others out",
        ["a:0+8*", "a:8+1*", "b:0+12*"],
        {0: [request("a", 8, new=2), request("b", 12, new=1)]},
        {"blocks": 4},
    ),
    Table(
        "a higher priority takes the slot of the lowest, which comes back and computes what the cache has lost",
        ["a:0+4* b:0+4*", "a:4+1* c:0+4* preempted b", "c:4+1* a:5+1*", "a:6+1* b:4+1*", "b:5+1*", "b:6+1*"],
        {
            0: [request("a", 4, new=4, priority=1), request("b", 4, new=4)],
            1: [request("c", 4, new=2, priority=2)],
        },
        {"running": 2},
    ),
    Table(
        "of equals the one that came first keeps its slot",
        ["a:0+4*", "a:4+1*", "b:0+4*"],
        {0: [request("a", 4, new=2, priority=1)], 1: [request("b", 4, priority=1)]},
        {"running": 1},
    ),
    Table(
        "a higher priority takes the blocks of as few as it needs",
        ["a:0+4* b:0+4* c:0+4*", "a:4+1* b:4+1* d:0+11* preempted c", "a:5+1* b:5+1* c:0+5*", "c:5+1*"],
        {
            0: [request("a", 4, new=3), request("b", 4, new=3), request("c", 4, new=3)],
            1: [request("d", 11, new=1, priority=1)],
        },
        {"blocks": 7, "budget": 20},
    ),
    Table(
        "nobody gives way to a prompt that would not fit even then",
        ["a:0+8* b:0+4*", "a:8+1* b:4+1*", "a:9+1*", "c:0+12*"],
        {
            0: [request("a", 8, new=3, priority=2), request("b", 4, new=2)],
            1: [request("c", 12, new=1, priority=1)],
        },
        {"blocks": 5},
    ),
    Table(
        "several begin at once, as far as a step has tokens for them",
        ["a:0+2* b:0+2* c:0+2*", "a:2+1* x:0+8* y:0+7 preempted c b", "x:8+1* y:7+1* z:0+8* preempted a"],
        {
            0: [request(n, 2) for n in "abc"],
            1: [request(n, 8, priority=1) for n in "xyz"],
        },
        {"running": 3},
    ),
    Table(
        "known blocks are not computed again, but the last token always is",
        ["a:0+9*", "b:8+1*"],
        {0: [request("a", 9, new=1)], 1: [request("b", 9, new=1, first_token=ord("a"))]},
    ),
    Table(
        "a whole prompt of known blocks still computes its last block",
        ["a:0+8*", "b:4+4*"],
        {0: [request("a", 8, new=1)], 1: [request("b", 8, new=1, first_token=ord("a"))]},
    ),
]


@pytest.mark.parametrize("table", TABLES, ids=lambda t: t.about)
def test_steps(table: Table) -> None:
    s = scheduler(**table.settings)
    for step, expected in enumerate(table.expected):
        for arriving in table.arrivals.get(step, []):
            # The table is read once per run; requests are written to.
            s.add(Request(arriving.id, list(arriving.tokens), arriving.max_new_tokens, arriving.priority))
        plan = s.schedule()
        assert shown(plan) == expected
        compute(s, plan)


def test_the_queue_is_bounded() -> None:
    s = scheduler(running=1, queued=1)
    s.add(request("a", 3))
    s.add(request("b", 3))
    with pytest.raises(QueueFullError):
        s.add(request("c", 3))


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (Request("x", [], 1), ValueError),
        (Request("x", [1], 0), ValueError),
        (Request("live", [1], 1), ValueError),
        (Request("x", [1] * 13, 4), DoesNotFitError),
    ],
)
def test_requests_that_cannot_be_queued(bad: Request, error: type[Exception]) -> None:
    s = scheduler(blocks=4)
    s.add(request("live", 2))
    with pytest.raises(error):
        s.add(bad)


def test_removing_frees_blocks_at_any_moment() -> None:
    s = scheduler()
    for name in "abc":
        s.add(request(name, 20))
    plan = s.schedule()
    assert s.remove("a") is not None  # in the middle of the step
    s.commit(plan, {})
    assert s.remove("c") is not None  # still waiting
    assert s.remove("b") is not None
    assert s.remove("b") is None
    assert s.idle
    assert s.blocks.num_free == 100
    s.check_integrity()


def test_salts_keep_prefixes_apart() -> None:
    s = scheduler()
    for name, salt in (("a", b"one"), ("b", b"two"), ("c", b"one")):
        r = Request(name, list(range(9)), 1, salt=salt)
        s.add(r)
        compute(s, s.schedule())
        assert r.cached_tokens == (8 if name == "c" else 0)


def test_a_hash_covers_everything_before_it() -> None:
    def hashes(tokens: list[int], salt: bytes = b"") -> list[bytes]:
        out: list[bytes] = []
        extend_hashes(out, tokens, 2, salt)
        return out

    assert hashes([1, 2, 3, 4, 5]) == hashes([1, 2, 3, 4])
    assert hashes([1, 2, 3, 4])[0] == hashes([1, 2, 9, 9])[0]
    every = [*hashes([1, 2, 3, 4]), hashes([9, 2, 3, 4])[1], hashes([3, 4])[0], hashes([1, 2], b"s")[0]]
    assert len(set(every)) == len(every)
    grown = hashes([1, 2])
    extend_hashes(grown, [1, 2, 3, 4], 2, b"")
    assert grown == hashes([1, 2, 3, 4])


class TestBlocks:
    def test_unknown_blocks_are_taken_first_then_the_least_recently_used(self) -> None:
        blocks = BlockManager(4, 2)
        a, b, c, _ = blocks.allocate(4)
        blocks.register(a, b"a")
        blocks.register(b, b"b")
        blocks.release([b])
        blocks.release([a])
        blocks.release([c])
        assert blocks.allocate(2) == [c, b]
        assert blocks.match([b"a"]) == [a]
        assert blocks.match([b"b"]) == []

    def test_a_shared_block_is_free_when_the_last_holder_lets_go(self) -> None:
        blocks = BlockManager(2, 2)
        (a,) = blocks.allocate(1)
        blocks.share([a])
        blocks.release([a])
        assert blocks.num_free == 1
        blocks.release([a])
        assert blocks.num_free == 2
        with pytest.raises(IntegrityError):
            blocks.release([a])

    def test_what_follows_a_prefix_is_evicted_before_the_prefix(self) -> None:
        """Leaf first among blocks released together, and a prefix that is used again outlives what is not."""
        blocks = BlockManager(6, 2)
        system, first, second, other = blocks.allocate(4)
        for block, digest in ((system, b"s"), (first, b"s1"), (second, b"s2"), (other, b"o")):
            blocks.register(block, digest)
        blocks.share([system])
        blocks.release([system, first], [b"s", b"s1"])
        blocks.release([other], [b"o"])
        blocks.release([system, second], [b"s", b"s2"])
        assert blocks.match([b"s", b"s2"]) == [system, second]
        evicted = [blocks.allocate(1)[0] for _ in range(6)]
        assert evicted[2:] == [first, other, second, system]

    def test_a_prefix_computed_twice_is_not_evicted_before_what_follows_its_copy(self) -> None:
        blocks = BlockManager(3, 2)
        known, copy, after = blocks.allocate(3)
        blocks.register(known, b"p")
        blocks.release([known], [b"p"])
        blocks.register(copy, b"p")  # the same prefix, computed at the same time
        blocks.register(after, b"pa")
        blocks.release([copy, after], [b"p", b"pa"])
        assert [blocks.allocate(1)[0] for _ in range(3)] == [copy, after, known]

    def test_eviction_takes_the_same_time_however_large_the_cache_is(self) -> None:
        """Counted in calls of Python functions and operations on the free list, not in seconds."""

        class Counting(OrderedDict[int, None]):
            calls = 0

            def popitem(self, last: bool = True) -> tuple[int, None]:
                Counting.calls += 1
                return super().popitem(last)

            def __iter__(self) -> Iterator[int]:
                raise AssertionError("somebody walks through the free list")

        for size in (10, 10_000):
            blocks = BlockManager(size, 2)
            blocks._free = Counting.fromkeys(range(size))
            Counting.calls = 0
            held = blocks.allocate(5)
            blocks.release(held)
            assert Counting.calls == 5

    def test_allocating_too_many_changes_nothing(self) -> None:
        blocks = BlockManager(2, 2)
        with pytest.raises(OutOfBlocksError):
            blocks.allocate(3)
        assert blocks.num_free == 2

    def test_integrity_names_the_block(self) -> None:
        blocks = BlockManager(2, 2)
        (a,) = blocks.allocate(1)
        with pytest.raises(IntegrityError, match=f"block {a} has 1 references, 0 requests hold it"):
            blocks.check_integrity([])
        blocks.check_integrity([[a]])


@st.composite
def workloads(draw: st.DrawFn) -> tuple[dict[str, int], list[tuple[int, int, int, int, int, int | None]]]:
    size = draw(st.sampled_from([1, 2, 4]))
    blocks = draw(st.integers(2, 24))
    room = size * blocks
    requests = []
    for _ in range(draw(st.integers(1, 12))):
        prompt = draw(st.integers(1, room - 1))
        new = draw(st.integers(1, min(12, room - prompt)))
        arrival = draw(st.integers(0, 12))
        cancel = draw(st.none() | st.integers(0, 20))
        requests.append((arrival, prompt, new, draw(st.integers(0, 2)), draw(st.integers(0, 1)), cancel))
    return {
        "blocks": blocks,
        "size": size,
        "running": draw(st.integers(1, 6)),
        "budget": draw(st.integers(1, 20)),
    }, requests


@settings(max_examples=300, deadline=None)
@given(workloads())
def test_every_request_finishes_and_no_block_is_lost(
    workload: tuple[dict[str, int], list[tuple[int, int, int, int, int, int | None]]],
) -> None:
    """Random arrivals, cancellations, shared prompts and caches as small as fit one request: always progress, never a
    range computed twice without a preemption, and books that add up after every step."""
    options, specs = workload
    s = scheduler(**options)
    finished: set[str] = set()
    cancelled: set[str] = set()
    computed: dict[str, int] = {}
    for step in range(5000):
        for i, (arrival, prompt, new, priority, group, cancel) in enumerate(specs):
            if arrival == step:
                s.add(request(f"r{i}", prompt, new, priority, first_token=group))
                computed[f"r{i}"] = 0
            if cancel is not None and cancel + arrival == step and s.remove(f"r{i}") is not None:
                cancelled.add(f"r{i}")
        plan = s.schedule()
        assert plan.num_tokens <= s.max_batched_tokens
        assert len(s.running) <= s.max_running
        if not plan.sequences:
            if s.idle and step > 40:
                break
            assert s.idle, "live requests and nothing to do"
        for name in [*plan.preempted, *plan.admitted]:
            computed[name] = -1
        for seq in plan.sequences:
            assert len(seq.blocks) == len(set(seq.blocks)) >= -(-seq.end // options["size"])
            assert computed[seq.request_id] in (-1, seq.start)
            computed[seq.request_id] = seq.end
        finished.update(compute(s, plan))
    assert finished | cancelled == {f"r{i}" for i in range(len(specs))}
    assert s.blocks.num_free == options["blocks"]
