"""The validator itself: hand-made histories, good ones and one for each thing that may go wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.reliability.history import Asked, Chunk, Event, Expected, Fault, Left, Over, load, save
from tests.reliability.judge import compare, judge, percentile

WORDS = ["The", " cat", " sat", " 猫", " on", " the", " mat"]
CHAT = "/v1/chat/completions"


def entry(word: str, logprob: float = -0.5) -> dict[str, Any]:
    return {"token": word, "logprob": logprob, "bytes": list(word.encode()), "top_logprobs": []}


def chunk(t: float, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None, **more: Any) -> Chunk:
    part = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
    return Chunk(t=t, stream=0, data={"id": "a", "choices": [part], **more})


def word(t: float, text: str, logprobs: bool = False) -> Chunk:
    return chunk(t, {"content": text}, logprobs={"content": [entry(text)]} if logprobs else None)


def answer(words: list[str], logprobs: bool) -> dict[str, Any]:
    message = {"role": "assistant", "content": "".join(words)}
    content = {"content": [entry(w) for w in words]} if logprobs else None
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": content}
    usage = {"prompt_tokens": 5, "completion_tokens": len(words), "total_tokens": 5 + len(words)}
    return {"id": "b", "choices": [choice], "usage": usage}


def history(words: list[str] = WORDS, *, logprobs: bool = False, usage: int = len(WORDS)) -> list[Event]:
    """A stream of `words`, one every 0.1 s, where `WORDS` should come."""
    body = {"stream": True, "stream_options": {"include_usage": True}}
    last = 0.1 * (len(words) + 2)
    return [
        Asked(t=0.0, stream=0, path=CHAT, body=body),
        Expected(t=0.0, stream=0, body=answer(WORDS, logprobs)),
        chunk(0.1, {"role": "assistant", "content": ""}),
        *(word(0.1 * (n + 2), w, logprobs) for n, w in enumerate(words)),
        chunk(last, {}, "stop"),
        Chunk(
            t=last, stream=0, data={"id": "a", "choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": usage}}
        ),
        Over(t=last, stream=0, outcome="done"),
        Fault(t=0.3, what="kill", target="worker-0"),
        Left(t=last, worker="worker-0", running=0, waiting=0),
    ]


def without(events: list[Event], kind: type) -> list[Event]:
    return [event for event in events if not isinstance(event, kind)]


def ended(outcome: Any, words: list[str], code: str = "") -> list[Event]:
    events = without(history(words), Over)
    cut = [
        e
        for e in events
        if not (isinstance(e, Chunk) and (not e.data["choices"] or e.data["choices"][0]["finish_reason"]))
    ]
    return [*cut, Over(t=9.0, stream=0, outcome=outcome, code=code)]


@pytest.mark.parametrize("logprobs", [False, True])
def test_a_good_history(logprobs: bool) -> None:
    verdict = judge(history(logprobs=logprobs))
    assert verdict.problems == []
    assert verdict.outcomes == {"done": 1}
    assert verdict.gaps == [pytest.approx(0.1)]


def test_a_client_that_left_got_the_right_beginning() -> None:
    assert judge(ended("left", WORDS[:3])).problems == []
    assert judge(ended("left", [])).problems == []


SWAPPED = [WORDS[1], WORDS[0], *WORDS[2:]]
BAD: dict[str, tuple[Callable[[bool], list[Event]], str]] = {
    "a lost token": (lambda lp: history(WORDS[:2] + WORDS[3:], logprobs=lp), "lost at"),
    "a lost end": (lambda lp: history(WORDS[:4], logprobs=lp), "lost at"),
    "a doubled token": (lambda lp: history([*WORDS[:3], *WORDS[2:]], logprobs=lp), "doubled at"),
    "begun anew": (lambda lp: history(WORDS[:3] + WORDS, logprobs=lp), "doubled at"),
    "reordered tokens": (lambda lp: history(SWAPPED, logprobs=lp), "reordered at"),
    "another token": (lambda lp: history([*WORDS[:3], " dog", *WORDS[4:]], logprobs=lp), "wrong at"),
    "the wrong usage": (lambda lp: history(logprobs=lp, usage=len(WORDS) + 2), "usage"),
    "no terminal outcome": (lambda lp: without(history(logprobs=lp), Over), "no terminal outcome"),
    "two terminal outcomes": (
        lambda lp: [*history(logprobs=lp), Over(t=3, stream=0, outcome="done")],
        "ended twice",
    ),
    "a chunk after the end": (lambda lp: [*history(logprobs=lp), word(3, "!", lp)], "a chunk after its end"),
    "a piece after the finish reason": (
        lambda lp: [*(h := history(logprobs=lp))[:-4], word(3, "", False), *h[-4:]],
        "after its finish reason",
    ),
    "a second role": (
        lambda lp: [*(h := history(logprobs=lp))[:4], chunk(0.3, {"role": "assistant"}), *h[4:]],
        "role came 2 times",
    ),
    "a chunk of another answer": (
        lambda lp: [*(h := history(logprobs=lp))[:3], Chunk(t=0.1, stream=0, data={"id": "x", "choices": []}), *h[3:]],
        "more than one answer",
    ),
    "an unexpected choice": (
        lambda lp: [
            *(h := history(logprobs=lp))[:3],
            Chunk(t=0.1, stream=0, data={"id": "a", "choices": [{"index": 4, "delta": {"content": "x"}}]}),
            *h[3:],
        ],
        "nobody asked for it",
    ),
    "nothing to compare with": (lambda lp: without(history(logprobs=lp), Expected), "nothing to compare with"),
    "an error": (lambda _: ended("error", WORDS[:3], "worker_lost"), "ended with error worker_lost"),
    "a stream that was cut": (lambda _: ended("cut", WORDS[:3]), "ended with cut"),
    "a stream that hung": (lambda _: ended("hung", WORDS[:3]), "ended with hung"),
    "a refusal": (lambda _: ended("refused", [], "503"), "ended with refused 503"),
    "a doubled token before the client left": (lambda _: ended("left", [*WORDS[:3], WORDS[2]]), "doubled at"),
    "a wrong token before the client left": (lambda _: ended("left", [*WORDS[:3], "??"]), "wrong at"),
    "a request left running": (
        lambda lp: [*history(logprobs=lp), Left(t=9, worker="worker-1", running=1, waiting=0)],
        "worker-1: 1 running",
    ),
}


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_history(name: str, logprobs: bool) -> None:
    make, words = BAD[name]
    problems = judge(make(logprobs)).problems
    assert any(words in problem for problem in problems), problems


def test_a_log_probability_from_the_wrong_state() -> None:
    events = history(logprobs=True)
    at = next(i for i, e in enumerate(events) if isinstance(e, Chunk) and e.data["choices"][0]["logprobs"])
    events[at] = chunk(0.2, {"content": WORDS[0]}, logprobs={"content": [entry(WORDS[0], -0.51)]})
    assert any("log probabilities off by 0.0100" in problem for problem in judge(events).problems)


def test_an_allowed_error_must_still_be_right_up_to_there() -> None:
    assert judge(ended("error", WORDS[:3]), allowed=("done", "error")).problems == []
    assert judge(ended("error", SWAPPED), allowed=("done", "error")).wrong == 1


def test_the_longest_gap_counts_the_wait_for_the_first_and_the_last() -> None:
    events = history()
    assert judge([e for e in events if getattr(e, "t", 0) not in (0.1,)]).gaps == [pytest.approx(0.2)]
    late = [Over(t=5.0, stream=0, outcome="done") if isinstance(e, Over) else e for e in events]
    assert judge(late).gaps == [pytest.approx(5.0 - 0.9)]


def test_a_slow_client_makes_its_own_gaps() -> None:
    events = history()
    slow = [Asked(t=0.0, stream=0, path=CHAT, body=events[0].body, paced=True), *events[1:]]  # type: ignore[union-attr]
    assert judge(slow).gaps == []


@pytest.mark.parametrize(
    "values, percent, want",
    [([], 99, 0), ([7], 99, 7), (list(range(1, 101)), 99, 99), (list(range(1, 101)), 50, 50), ([3, 1, 2], 50, 2)],
)
def test_percentiles(values: list[float], percent: float, want: float) -> None:
    assert percentile(values, percent) == want


def test_text_is_compared_by_characters() -> None:
    assert compare("héllo 🚀", "héllo 🚀") == ""
    assert compare("héllo 🚀", "héllo \ufffd").startswith("wrong at 6 of 7")
    assert compare("abc", "ab", whole=False) == ""


def test_a_history_is_kept_and_read_back(tmp_path: Path) -> None:
    events = history(logprobs=True)
    save(events, tmp_path / "kept" / "history.jsonl")
    assert load(tmp_path / "kept" / "history.jsonl") == events
