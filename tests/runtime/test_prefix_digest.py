"""What of the prefix cache routers are told: keys of text that follow the blocks, into the cache and out of it."""

import pytest

from wherry_protocol.prefix import CHUNK_BYTES, MAX_KEYS, pack_keys, prefix_keys, unpack_keys, written_out
from wherry_protocol.worker import ChatMessage, PrefixChange, Prompt
from wherry_runtime.scheduling.blocks import BlockManager
from wherry_runtime.scheduling.digest import PrefixDigest, marks_of
from wherry_runtime.scheduling.plan import StepPlan
from wherry_runtime.scheduling.request import Request
from wherry_runtime.scheduling.scheduler import Scheduler


def keys(text: str, model: str = "chat", salt: str = "") -> list[int]:
    return prefix_keys(written_out(Prompt(text=text)), model, salt)


def turns(*contents: str) -> Prompt:
    roles = ("user", "assistant")
    return Prompt(messages=[ChatMessage(role=roles[n % 2], content=text) for n, text in enumerate(contents)])  # type: ignore[arg-type]


LONG = "A boat crosses the river. " * 100


def test_prompts_that_begin_alike_share_the_keys_of_what_they_share() -> None:
    one, other = keys(LONG + "one"), keys(LONG[:1500] + "other" * 300)
    shared = (1500 + len(b"text\0")) // CHUNK_BYTES
    assert one[:shared] == other[:shared]
    assert not set(one[shared:]) & set(other)
    assert len(one) == len(set(one)) == (len(LONG) + 3 + 5) // CHUNK_BYTES


def test_the_next_turn_of_a_conversation_begins_with_the_keys_of_the_one_before() -> None:
    first = prefix_keys(written_out(turns(LONG)), "chat")
    second = prefix_keys(written_out(turns(LONG, "A ferry. " * 50, "And back?")), "chat")
    assert second[: len(first)] == first
    assert len(second) > len(first)


@pytest.mark.parametrize(
    "other",
    [
        keys(LONG, model="another"),
        keys(LONG, salt="tenant"),
        prefix_keys(written_out(turns(LONG)), "chat"),
        prefix_keys(written_out(Prompt(token_ids=list(LONG.encode()))), "chat"),
    ],
    ids=["another model", "another tenant's salt", "a message", "token ids"],
)
def test_nothing_is_shared_with(other: list[int]) -> None:
    assert not set(keys(LONG)) & set(other)


def test_keys_are_bounded_and_survive_the_wire() -> None:
    many = keys("x" * (MAX_KEYS + 5) * CHUNK_BYTES)
    assert len(many) == MAX_KEYS
    assert unpack_keys(pack_keys(many)) == many
    assert keys("short") == []
    with pytest.raises(ValueError, match="whole number"):
        unpack_keys(b"123456789")


# 1024 bytes have keys 0 to 3; the block that each is tied to.
MARKS = [
    ("a token is four bytes", 256, 16, [(3, 0), (7, 1), (11, 2), (15, 3)]),
    ("a token is a byte", 1024, 16, [(15, 0), (31, 1), (47, 2), (63, 3)]),
    ("two keys end in one block", 32, 16, [(0, 0), (0, 1), (1, 2), (1, 3)]),
    ("the last block is not full, so the last key waits for another prompt", 250, 16, [(3, 0), (7, 1), (11, 2)]),
    ("not one full block", 15, 16, []),
]


@pytest.mark.parametrize("_, tokens, block_size, expected", MARKS, ids=[case[0] for case in MARKS])
def test_marks(_: str, tokens: int, block_size: int, expected: list[tuple[int, int]]) -> None:
    assert marks_of([0, 1, 2, 3], 1024, tokens, block_size) == expected


class Reader:
    """A router's view, from the changes alone."""

    def __init__(self, digest: PrefixDigest) -> None:
        self.digest = digest
        self.cursor = None
        self.keys: set[int] = set()

    def read(self) -> PrefixChange | None:
        self.cursor, change = self.digest.since(self.cursor)  # type: ignore[assignment]
        if change is not None:
            if change.whole:
                self.keys.clear()
            self.keys -= set(unpack_keys(change.removed))
            self.keys |= set(unpack_keys(change.added))
        return change


def test_changes_add_up_to_what_is_cached() -> None:
    digest = PrefixDigest()
    reader = Reader(digest)
    first = reader.read()
    assert first is not None
    assert (first.whole, first.added) == (True, b""), "an empty cache is told, too"
    assert reader.read() is None
    digest.tie(b"one", 1)
    digest.tie(b"two", 2)
    digest.tie(b"also two", 2)
    assert reader.read() is not None
    assert reader.keys == {1, 2}
    digest.drop(b"one")
    digest.drop(b"two")
    digest.drop(b"never tied")
    digest.tie(b"three", 3)
    change = reader.read()
    assert change is not None
    assert not change.whole
    assert reader.keys == {2, 3}, "2 has another block"
    late = Reader(digest)
    late.read()
    assert late.keys == {2, 3}


def test_who_missed_too_much_or_reads_another_engine_gets_all() -> None:
    digest = PrefixDigest()
    reader = Reader(digest)
    reader.read()
    for key in range(40_000):
        digest.tie(b"%d" % (key % 100), key)
        digest.drop(b"%d" % (key % 100))
    digest.tie(b"kept", 7)
    change = reader.read()
    assert change is not None
    assert change.whole
    assert reader.keys == {7}
    reader.digest = PrefixDigest()
    reader.read()
    assert reader.keys == set(), "a step loop that began anew has an empty cache"


def run(scheduler: Scheduler, request: Request) -> None:
    scheduler.add(request)
    while request.id in scheduler:
        plan: StepPlan = scheduler.schedule()
        scheduler.commit(plan, {step.request_id: [7] for step in plan.sequences if step.samples})
        if request.num_new >= request.max_new_tokens:
            scheduler.remove(request.id)


def request(name: str, tokens: list[int], marks: list[tuple[int, int]]) -> Request:
    return Request(id=name, tokens=tokens, max_new_tokens=1, marks=marks)


def test_a_key_is_told_once_its_block_is_computed_and_until_it_is_evicted() -> None:
    blocks = BlockManager(8, 4)
    scheduler = Scheduler(blocks, max_running=4, max_batched_tokens=8, max_queued=8)
    reader = Reader(blocks.digest)
    a = request("a", list(range(16)), [(1, 101), (3, 103)])
    scheduler.add(a)
    plan = scheduler.schedule()
    reader.read()
    assert reader.keys == {101, 103}, "whoever comes later finds it computed"
    scheduler.commit(plan, {})
    reader.read()
    assert reader.keys == {101, 103}
    scheduler.remove("a")
    reader.read()
    assert reader.keys == {101}, "it left when half of the prompt was computed"
    run(scheduler, request("a", list(range(16)), [(1, 101), (3, 103)]))
    reader.read()
    assert reader.keys == {101, 103}
    run(scheduler, request("again", [*range(8), *range(50, 58)], [(0, 100), (1, 101)]))
    reader.read()
    assert reader.keys == {100, 101, 103}, "a block that was found in the cache has the keys of who found it, too"
    run(scheduler, request("other", list(range(100, 124)), []))
    reader.read()
    assert reader.keys == {100, 101}, "the end of the first prompt went first"
    run(scheduler, request("more", list(range(200, 230)), []))
    reader.read()
    assert reader.keys == set()
    assert len(blocks.digest) == 0


def test_what_is_owed_counts_neither_cached_prompts_nor_what_is_done() -> None:
    scheduler = Scheduler(BlockManager(300, 4), max_running=1, max_batched_tokens=8, max_queued=8)
    assert scheduler.tokens_owed == 0
    marks = [(1, 101), (3, 103)]
    first = Request(id="a", tokens=list(range(16)), max_new_tokens=3, marks=marks)
    scheduler.add(first)
    assert scheduler.tokens_owed == 16 + 3
    scheduler.commit(scheduler.schedule(), {})
    assert scheduler.tokens_owed == 8 + 3
    scheduler.add(Request(id="b", tokens=[*range(16), 90, 91], max_new_tokens=1000, marks=[*marks, (4, 104)]))
    assert scheduler.tokens_owed == (8 + 3) + (18 - 16 + 256), "what the first one still computes is owed once"
    scheduler.commit(scheduler.schedule(), {"a": [7]})
    assert scheduler.tokens_owed == 2 + (18 - 16 + 256)


def test_without_a_prefix_cache_nothing_is_told() -> None:
    blocks = BlockManager(8, 4, prefix_cache=False)
    run(
        Scheduler(blocks, max_running=4, max_batched_tokens=8, max_queued=8),
        request("a", list(range(16)), [(1, 101)]),
    )
    assert len(blocks.digest) == 0
