"""Which texts go together, and what becomes of batches that fail: the queue and its thread, without a model."""

import threading
from collections.abc import Sequence
from queue import SimpleQueue

import pytest

from wherry_runtime.embedding.core import Computed, EmbeddingCore
from wherry_runtime.engine.core import EngineClosedError
from wherry_runtime.scheduling.embedding import Batch, EmbeddingQueue, EmbeddingRequest
from wherry_runtime.scheduling.scheduler import QueueFullError

# requests as (name, lengths of texts, priority); tokens of a batch; then batches as the names whose texts they have
TURNS: list[tuple[str, list[tuple[str, list[int], int]], int, list[str]]] = [
    ("one by one", [("a", [5, 5, 5, 5], 0), ("b", [5], 0)], 10, ["ab", "aa", "a"]),
    ("a short one among long ones", [("a", [9] * 3, 0), ("b", [2] * 4, 0)], 10, ["a", "bbbb", "a", "a"]),
    ("a text over the bound goes alone", [("a", [50, 50], 0), ("b", [1, 1], 0)], 10, ["a", "bb", "a"]),
    ("a bound of one", [("a", [3, 3, 3], 0), ("b", [3], 0), ("c", [3, 3], 0)], 1, ["a", "b", "c", "a", "c", "a"]),
    ("the urgent first", [("a", [4, 4], 0), ("b", [4, 4], 5)], 8, ["bb", "aa"]),
    ("what the urgent leave", [("a", [4, 4], 0), ("b", [4], 5)], 8, ["ba", "a"]),
    ("those over max_running wait", [("a", [4], 0), ("b", [4], 0), ("c", [4], 0), ("d", [4], 0)], 99, ["abc", "d"]),
]


@pytest.mark.parametrize(("requests", "tokens", "batches"), [case[1:] for case in TURNS], ids=[c[0] for c in TURNS])
def test_turns(requests: list[tuple[str, list[int], int]], tokens: int, batches: list[str]) -> None:
    queue = EmbeddingQueue(max_running=3, max_queued=1)
    for name, lengths, priority in requests:
        queue.add(EmbeddingRequest(name, [[1] * length for length in lengths], priority))
    owed = sum(sum(lengths) for _, lengths, _ in requests)
    found = []
    while batch := queue.take(tokens):
        assert len(batch) == 1 or sum(len(r.texts[i]) for r, i in batch) <= tokens
        assert queue.tokens_owed == owed
        owed -= finish(queue, batch)
        found.append("".join(request.id for request, _ in batch))
    assert (found, owed, len(queue)) == (batches, 0, 0)


def finish(queue: EmbeddingQueue, batch: Batch) -> int:
    for request, index in batch:
        if request.book(index):
            assert queue.remove(request.id) is request
    return sum(len(request.texts[index]) for request, index in batch)


def test_texts_of_a_request_come_in_order() -> None:
    queue = EmbeddingQueue(4, 4)
    for name in "ab":
        queue.add(EmbeddingRequest(name, [[1] * (1 + n % 5) for n in range(20)]))
    seen: dict[str, list[int]] = {"a": [], "b": []}
    while batch := queue.take(7):
        for request, index in batch:
            seen[request.id].append(index)
    assert seen == {"a": list(range(20)), "b": list(range(20))}


class Told:
    """A model that computes a text's first token, and fails as it is told by it."""

    def __init__(self, *, gate: threading.Event | None = None) -> None:
        self.batches: list[list[int]] = []
        self.began = threading.Event()
        self._gate = gate

    def embed(self, texts: Sequence[Sequence[int]], dimensions: Sequence[int | None]) -> list[bytes | None]:
        firsts = [text[0] for text in texts]
        self.batches.append(firsts)
        self.began.set()
        if self._gate is not None:
            self._gate.wait(10)
        if 13 in firsts:
            raise ValueError("thirteen")
        if len(texts) > 2 and 77 in firsts:
            raise MemoryError
        return [None if first == 99 else bytes([first]) for first in firsts]


class Running:
    def __init__(self, model: Told, max_tokens: int = 100, max_queued: int = 8) -> None:
        self.news: SimpleQueue[Computed] = SimpleQueue()
        self.core = EmbeddingCore(model, EmbeddingQueue(4, max_queued), self._told, max_tokens)

    def _told(self, news: list[Computed]) -> None:
        for one in news:
            self.news.put(one)

    def result(self, *names: str) -> dict[str, object]:
        """Of each request its vectors, or the code of its error."""
        found: dict[str, list[bytes]] = {name: [] for name in names}
        ended: dict[str, object] = {}
        while len(ended) < len(names):
            one = self.news.get(timeout=10)
            if one.error is not None:
                ended[one.request_id] = one.error.code
                continue
            assert one.index == len(found[one.request_id])
            found[one.request_id].append(one.vector)
            if one.last:
                ended[one.request_id] = b"".join(found[one.request_id])
        return ended


def request(name: str, *firsts: int) -> EmbeddingRequest:
    return EmbeddingRequest(name, [[first] for first in firsts])


def test_only_what_cannot_be_computed_fails() -> None:
    running = Running(Told())
    for one in (request("good", 1, 2, 3), request("bad", 4, 13, 5), request("odd", 6, 99), request("also", 7, 8)):
        running.core.add(one)
    running.core.start()
    expected = {"good": b"\1\2\3", "bad": "engine_error", "odd": "bad_vector", "also": b"\7\x08"}
    assert running.result("good", "bad", "odd", "also") == expected
    assert running.core.counts() == (0, 0, 0)
    running.core.close()


def test_a_batch_that_runs_out_of_memory_is_made_smaller() -> None:
    model = Told()
    running = Running(model, max_tokens=8)
    running.core.add(request("a", *[77] * 16))
    running.core.start()
    assert running.result("a") == {"a": b"\x4d" * 16}
    assert len(model.batches[0]) == 8
    assert len(model.batches[-1]) <= 2
    running.core.close()


def test_of_a_cancelled_request_nothing_more_is_told() -> None:
    gate = threading.Event()
    model = Told(gate=gate)
    running = Running(model, max_tokens=1)
    running.core.add(request("gone", 1, 2))
    running.core.start()
    assert model.began.wait(10)
    assert running.core.cancel("gone")
    assert not running.core.cancel("gone")
    gate.set()
    running.core.add(request("next", 3))
    assert running.result("next") == {"next": b"\3"}
    assert running.news.empty()
    assert model.batches == [[1], [3]]
    running.core.close()


def test_the_end() -> None:
    running = Running(Told(), max_queued=0)
    for name in "abcd":
        running.core.add(request(name, 1))
    with pytest.raises(QueueFullError, match="4 requests are running or waiting already"):
        running.core.add(request("e", 1))
    running.core.close()  # before it began
    running.core.start()
    assert running.result(*"abcd") == dict.fromkeys("abcd", "shutting_down")
    with pytest.raises(EngineClosedError):
        running.core.add(request("f", 1))
