"""The router's books of an answer, and what its failed tries add up to: pure, so each case is a short story."""

from typing import Any

import pytest

from wherry_protocol.openai.errors import ApiError
from wherry_protocol.worker import (
    Embedding,
    EmbedRequest,
    End,
    ErrorEvent,
    Event,
    ExecuteRequest,
    Metrics,
    Prompt,
    Resume,
    SamplingParams,
    Started,
    Token,
)
from wherry_router.backend import Delivery
from wherry_router.fault import QueueFull, WorkerFault
from wherry_router.ledger import SEVERAL, EmbeddingLedger, Ledger, books_of
from wherry_router.pool import Endpoint, Replica
from wherry_router.settings import Limits
from wherry_router.tries import Tries

REQUEST = ExecuteRequest(
    id="r",
    model="m",
    prompt=Prompt(text="Hello"),
    sampling=SamplingParams(max_tokens=9, temperature=0.5, stop=["x"]),
    priority=3,
    created=77,
    cache_salt="salt",
)
METRICS = Metrics(queue_s=0, prefill_s=0, decode_s=0)


def started(**change: Any) -> Started:
    return Started(**{"id": "r", "prompt_tokens": 5, "cached_tokens": 4, "seed": 42, "prompt_digest": "aa"} | change)


def token(index: int, *ids: int) -> Token:
    return Token(index=index, ids=list(ids) or [100 + index], text=f"<{index}>")


def end(count: int, **change: Any) -> End:
    return End(**{"finish_reason": "stop", "prompt_tokens": 5, "completion_tokens": count} | change)


def begun(*, restarts: bool = False) -> Ledger:
    """An answer with three tokens, after which a worker was lost."""
    ledger = Ledger(REQUEST, restarts=restarts)
    assert ledger.request(0) is REQUEST
    for event in (started(), token(0), token(1, 101, 102)):
        assert ledger.take(event) is event
    return ledger


def test_a_resumed_request_is_the_first_one_with_the_tokens_so_far() -> None:
    request = begun().request(2)
    assert request.id == "r~2"
    assert request.resume == Resume(token_ids=[100, 101, 102], seed=42, prompt_digest="aa")
    same = ("model", "prompt", "sampling", "priority", "created", "cache_salt")
    assert [getattr(request, name) for name in same] == [getattr(REQUEST, name) for name in same]


def test_a_try_that_goes_on_tells_the_client_only_what_is_new() -> None:
    ledger = begun()
    ledger.request(1)
    assert ledger.take(started(id="r~1", cached_tokens=5)) is None
    assert ledger.take(token(3)) == token(3)
    assert ledger.take(METRICS) is METRICS
    assert ledger.take(end(4, cached_tokens=5)) == end(4, cached_tokens=4), "the prompt was cached as at first"
    assert ledger.ids == [100, 101, 102, 103]


@pytest.mark.parametrize(("version", "whole"), [("old", "old"), ("new", SEVERAL)])
def test_an_answer_that_a_worker_of_another_model_goes_on_with_is_of_neither(version: str, whole: str) -> None:
    ledger = Ledger(REQUEST)
    ledger.request(0)
    first = started(version="old")
    ledger.take(first)
    ledger.take(token(0))
    ledger.request(1)
    assert ledger.take(started(version=version)) is None
    assert first.version == whole


def test_before_the_first_token_a_try_begins_anew() -> None:
    ledger = Ledger(REQUEST)
    ledger.request(0)
    ledger.take(started())
    assert ledger.request(1).resume is None
    assert ledger.take(started(seed=43)) == started(seed=43)
    ledger.take(token(0))
    resume = ledger.request(2).resume
    assert resume is not None
    assert resume.seed == 43


def test_where_answers_restart_the_books_are_empty() -> None:
    ledger = begun(restarts=True)
    assert ledger.request(1).resume is None
    for event in (started(seed=43), token(0), METRICS, end(1)):
        assert ledger.take(event) is event


WRONG: dict[str, list[Event]] = {
    "a token left out": [started(), token(4)],
    "a token told twice": [started(), token(2)],
    "a worker that knows no resume": [started(), token(0)],
    "tokens before the start": [token(3)],
    "an end before the start": [METRICS],
    "two starts": [started(), started()],
    "another seed": [started(seed=41)],
    "another prompt": [started(prompt_tokens=6)],
    "the same length, another prompt": [started(prompt_digest="bb")],
    "fewer tokens than counted": [started(), token(3), end(5)],
    "more tokens than counted": [started(), token(3), end(3)],
}


@pytest.mark.parametrize("events", WRONG.values(), ids=WRONG)
def test_what_does_not_follow_is_the_workers_fault(events: list[Event]) -> None:
    ledger = begun()
    ledger.request(1)
    for event in events[:-1]:
        ledger.take(event)
    before = list(ledger.ids)
    with pytest.raises(WorkerFault) as fault:
        ledger.take(events[-1])
    assert fault.value.reason == "protocol"
    assert ledger.ids == before


@pytest.mark.parametrize(
    "code, reason",
    [("shutting_down", "shutting_down"), ("engine_error", "worker_error"), ("rank_lost", "worker_error")],
)
def test_an_error_that_may_be_tried_elsewhere_is_a_fault(code: str, reason: str) -> None:
    event = ErrorEvent(code=code, message="why", retryable=True)
    with pytest.raises(WorkerFault) as fault:
        begun().take(event)
    assert (fault.value.reason, fault.value.event) == (reason, event)


def test_other_errors_and_cancellations_are_the_clients_to_see() -> None:
    error = ErrorEvent(code="bad_logits", message="why")
    assert begun().take(error) is error
    cancelled = end(2, finish_reason="cancelled")
    assert begun().take(cancelled) == end(2, finish_reason="cancelled", cached_tokens=4)


LIMITS = Limits(max_resume_tries=2, resume_wait_s=10, first_token_timeout_s=100)
REPLICA = Replica(Endpoint("a", "http://a"))
FULL = QueueFull(ApiError(429, "queue_full", "full"))
# A story: limits, whether the delivery is whole, then a token (None) or a failure's reason for each second; and what
# ends it, "" for nothing.
STORIES: list[tuple[str, dict[str, Any], bool, list[str | None], str]] = [
    ("failures before any token are no resumes", {}, False, ["lost", "lost", "lost", "lost"], ""),
    ("one loss is mended", {}, False, [None, "lost"], ""),
    ("as many tries as there may be", {}, False, [None, "lost", "frozen", "worker_error"], "resume_failed"),
    ("the same of a whole answer", {}, True, [None, "lost", "frozen", "protocol"], "resume_failed"),
    ("all refuse to go on", {}, False, [None, "refused", "refused", "refused"], "resume_failed"),
    ("tokens in between make it good", {}, False, [None, "lost", "lost", None, "lost", "lost", None, "lost"], ""),
    ("who is not reached is not harmed", {}, False, [None, "lost", *["unreachable"] * 6, "not_ready"], ""),
    ("nor who is full or leaves", {}, False, [None, "shutting_down", *["queue_full"] * 6, "draining"], ""),
    ("without resume the first loss ends a stream", {"resume": False}, False, [None, "lost"], "worker_lost"),
    ("without resume a whole answer begins anew", {"resume": False}, True, [None, "lost"], ""),
]


def play(limits: Limits, whole: bool, story: list[str | None]) -> Tries:
    ledger = Ledger(REQUEST)
    tries = Tries(limits, 0.0, Delivery(whole=whole), ledger)
    for second, step in enumerate(story, 1):
        if step is None:
            ledger.request(tries.failed)
            ledger.take(started())
            ledger.take(token(len(ledger.ids)))
            tries.moved_on()
        else:
            tries.note(REPLICA, FULL if step == "queue_full" else WorkerFault(step, ""), float(second))
    return tries


@pytest.mark.parametrize("_, change, whole, story, code", STORIES, ids=[story[0] for story in STORIES])
def test_tries(_: str, change: dict[str, Any], whole: bool, story: list[str | None], code: str) -> None:
    limits = Limits(**{name: getattr(LIMITS, name) for name in Limits.__struct_fields__} | change)
    tries = play(limits, whole, story)
    assert ("" if tries.error is None else tries.error.code) == code
    assert tries.failed == sum(step is not None for step in story)


def test_the_wait_for_a_replica_counts_from_the_loss_and_ends() -> None:
    tries = play(LIMITS, False, [None, "lost", "unreachable"])
    assert tries.resuming
    assert tries.going_on
    assert tries.deadline == 12.0
    assert tries.left(11.5) == 0.5
    assert tries.error is None
    assert tries.left(12.0) == 0.0
    assert tries.error is not None
    assert (tries.error.code, tries.error.retryable) == ("resume_timeout", True)


def test_a_token_begins_the_count_anew() -> None:
    tries = play(LIMITS, False, [None, "lost", None])
    assert not tries.stuck
    assert not tries.tried
    tries.note(REPLICA, WorkerFault("lost", ""), 20.0)
    assert tries.left(21.0) == 9.0


def test_silence_counts_from_the_last_sign_of_life() -> None:
    tries = play(LIMITS, False, [None])
    fault = WorkerFault("frozen", "")
    fault.since = 18.0
    tries.note(REPLICA, fault, 20.0)
    assert tries.lost_at == 18.0


def test_the_choices_of_an_answer_share_what_the_client_has() -> None:
    """One that has no token yet is not refused any more when its sibling has."""
    delivery = Delivery(whole=False)
    first, second = (Tries(LIMITS, 0.0, delivery, Ledger(REQUEST)) for _ in range(2))
    second.note(REPLICA, WorkerFault("lost", ""), 1.0)
    assert not second.resuming
    first.moved_on()
    assert second.resuming
    assert not second.begun


TEXTS = EmbedRequest(id="e", model="m", inputs=["a", [1, 2]], dimensions=8, priority=2)
VECTORS = [Embedding(index=index, vector=b"....") for index in range(3)]
DONE = End(finish_reason="stop", prompt_tokens=5, completion_tokens=0)


def test_vectors_begin_anew_with_every_try() -> None:
    books = books_of(TEXTS)
    assert isinstance(books, EmbeddingLedger)
    assert books.request(0) == TEXTS
    for event in (started(), VECTORS[0]):
        assert books.take(event) is event
    assert books.request(1) == EmbedRequest(id="e~1", model="m", inputs=["a", [1, 2]], dimensions=8, priority=2)
    for event in (started(version="other"), *VECTORS[:2], METRICS, DONE):
        assert books.take(event) is event
    assert books.ids == [], "nothing of it is worth anything to another worker"


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        ([VECTORS[0]], "protocol"),
        ([started(), started()], "protocol"),
        ([started(), VECTORS[1]], "protocol"),
        ([started(), VECTORS[0], VECTORS[0]], "protocol"),
        ([started(), VECTORS[0], DONE], "protocol"),
        ([started(), *VECTORS, DONE], "protocol"),
        ([started(), ErrorEvent(code="out_of_memory", message="", retryable=True)], "worker_error"),
        ([ErrorEvent(code="shutting_down", message="", retryable=True)], "shutting_down"),
    ],
)
def test_vectors_that_do_not_follow_are_the_workers_fault(events: list[Event], reason: str) -> None:
    books = books_of(TEXTS)
    books.request(0)
    with pytest.raises(WorkerFault) as fault:
        list(map(books.take, events))
    assert fault.value.reason == reason


def test_what_ends_a_request_for_vectors_is_passed_on() -> None:
    refused = ErrorEvent(code="bad_vector", message="", retryable=False)
    assert books_of(TEXTS).take(refused) is refused
    cancelled = End(finish_reason="cancelled", prompt_tokens=5, completion_tokens=0)
    assert books_of(TEXTS).take(cancelled) is cancelled
