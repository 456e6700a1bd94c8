"""Judges a history: what each client saw against what the undisturbed request gets. Pure: no process, no clock.

Where log probabilities were asked for, tokens are compared one by one, with their bytes; else the text's characters.
"""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.reliability.history import Asked, Chunk, Event, Expected, Left, Outcome, Over

# Prefill and decode add up in different orders; a token drawn in the wrong state is off by much more.
LOGPROB_TOLERANCE = 2e-3
END = "(end)"


@dataclass
class Choice:
    """One choice of an answer, gathered."""

    text: str = ""
    tokens: list[str] = field(default_factory=list)  # with their bytes in chat
    logprobs: list[float] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    finish: str | None = None
    roles: int = 0
    late: int = 0  # pieces after the finish reason


@dataclass
class Verdict:
    """`problems`: in words, empty where all is well. `gaps`: each whole stream's longest silence in seconds."""

    problems: list[str]
    gaps: list[float]
    outcomes: Counter[str]
    codes: Counter[str]

    @property
    def wrong(self) -> int:
        """Streams that got something else than they should have, whatever their outcome."""
        return len({p.split(":")[0] for p in self.problems if ": choice " in p})


def judge(events: Iterable[Event], allowed: Sequence[Outcome] = ("done", "left")) -> Verdict:
    """`allowed`: outcomes that are fine. What was received must be right whatever the outcome."""
    asked: dict[int, Asked] = {}
    expected: dict[int, Expected] = {}
    chunks: dict[int, list[Chunk]] = defaultdict(list)
    over: dict[int, Over] = {}
    problems: list[str] = []
    for event in events:
        match event:
            case Asked():
                asked[event.stream] = event
            case Expected():
                expected[event.stream] = event
            case Chunk():
                if event.stream in over:
                    problems.append(f"stream {event.stream}: a chunk after its end")
                chunks[event.stream].append(event)
            case Over():
                if event.stream in over:
                    problems.append(f"stream {event.stream}: ended twice")
                over[event.stream] = event
            case Left() if event.running or event.waiting:
                problems.append(f"{event.worker}: {event.running} running and {event.waiting} waiting with no client")
    verdict = Verdict(problems, [], Counter(), Counter())
    for number, request in asked.items():
        _stream(verdict, request, expected.get(number), chunks[number], over.get(number), allowed)
    return verdict


def _stream(
    verdict: Verdict,
    request: Asked,
    expected: Expected | None,
    chunks: list[Chunk],
    over: Over | None,
    allowed: Sequence[Outcome],
) -> None:
    name = f"stream {request.stream}"
    if over is None:
        verdict.problems.append(f"{name}: no terminal outcome")
        return
    verdict.outcomes[over.outcome] += 1
    if over.code:
        verdict.codes[over.code] += 1
    if over.outcome not in allowed:
        verdict.problems.append(f"{name}: ended with {over.outcome} {over.code} after {len(chunks)} chunks")
    if over.outcome == "done" and not request.paced:
        verdict.gaps.append(longest_gap(request, chunks, over))
    if len({chunk.data.get("id") for chunk in chunks}) > 1:
        verdict.problems.append(f"{name}: chunks of more than one answer")
    if expected is None:
        verdict.problems.append(f"{name}: nothing to compare with")
        return
    whole = over.outcome == "done"
    want, got = whole_answer(expected.body), streamed(chunks)
    for index in sorted(want.keys() | got.keys()):
        for problem in differences(want.get(index), got.get(index), whole=whole, chat="chat" in request.path):
            verdict.problems.append(f"{name}: choice {index}: {problem}")
    if whole and (request.body.get("stream_options") or {}).get("include_usage"):
        usage = [chunk.data["usage"] for chunk in chunks if chunk.data.get("usage")]
        keys = ("prompt_tokens", "completion_tokens")
        if [{k: u[k] for k in keys} for u in usage] != [{k: expected.body["usage"][k] for k in keys}]:
            verdict.problems.append(f"{name}: usage {usage}, not {expected.body['usage']}")


def longest_gap(request: Asked, chunks: list[Chunk], over: Over) -> float:
    """The longest silence that the client saw, from its request to the end of its answer, in seconds."""
    times = [request.t, *(chunk.t for chunk in chunks), over.t]
    return max(later - earlier for earlier, later in itertools.pairwise(times))


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that `percent` of all do not exceed; 0 of nothing."""
    ordered = sorted(values)
    return ordered[max(math.ceil(len(ordered) * percent / 100), 1) - 1] if ordered else 0.0


def streamed(chunks: list[Chunk]) -> dict[int, Choice]:
    """The choices of a streamed answer."""
    choices: dict[int, Choice] = defaultdict(Choice)
    for chunk in chunks:
        for part in chunk.data["choices"]:
            choice = choices[part["index"]]
            delta = part.get("delta", {})
            text = (delta.get("content") if "delta" in part else part.get("text")) or ""
            if choice.finish is not None:
                choice.late += 1
            choice.roles += "role" in delta
            _gather(choice, text, part.get("logprobs"))
            choice.finish = part.get("finish_reason") or choice.finish
    return dict(choices)


def whole_answer(body: dict[str, Any]) -> dict[int, Choice]:
    """The choices of an answer that was not streamed."""
    choices: dict[int, Choice] = {}
    for part in body["choices"]:
        choice = choices[part["index"]] = Choice(finish=part["finish_reason"])
        text = part["message"]["content"] if "message" in part else part["text"]
        _gather(choice, text or "", part.get("logprobs"))
    return choices


def _gather(choice: Choice, text: str, logprobs: dict[str, Any] | None) -> None:
    choice.text += text
    if not logprobs:
        return
    if "content" in logprobs:
        for entry in logprobs["content"] or []:
            choice.tokens.append(f"{entry['token']}{entry['bytes']}")
            choice.logprobs.append(entry["logprob"])
    else:
        choice.tokens += logprobs["tokens"]
        choice.logprobs += logprobs["token_logprobs"]
        choice.offsets += logprobs["text_offset"]


def differences(want: Choice | None, got: Choice | None, *, whole: bool, chat: bool) -> list[str]:
    """How `got` differs from `want`, in words. `whole` False: it may end anywhere, but is right up to there."""
    if want is None:
        return ["nobody asked for it"]
    if got is None:
        return ["it never came"] if whole else []
    found = []
    if want.tokens or got.tokens:
        if told := compare(want.tokens, got.tokens, whole=whole):
            found.append(f"tokens {told}")
        else:
            worst = max((abs(a - b) for a, b in zip(want.logprobs, got.logprobs, strict=False)), default=0.0)
            if worst > LOGPROB_TOLERANCE:
                found.append(f"log probabilities off by {worst:.4f}")
        if not found and got.offsets != want.offsets[: len(got.offsets)]:
            found.append(f"text offsets {got.offsets}, not {want.offsets}")
    if told := compare(want.text, got.text, whole=whole):
        found.append(f"text {told}")
    if got.late:
        found.append(f"{got.late} pieces after its finish reason")
    if chat and got.roles != 1:
        found.append(f"its role came {got.roles} times")
    if (whole or got.finish is not None) and got.finish != want.finish:
        found.append(f"finish reason {got.finish}, not {want.finish}")
    return found


def compare(want: Sequence[str], got: Sequence[str], *, whole: bool = True) -> str:
    """Nothing where they agree, else what happened to the sequence and where."""
    if want == got or (not whole and want[: len(got)] == got):
        return ""
    at = next((i for i, (a, b) in enumerate(zip(want, got, strict=False)) if a != b), min(len(want), len(got)))
    place = f"at {at} of {len(want)}: {_excerpt(got, at)}, not {_excerpt(want, at)}"
    if _within(got, want):
        return f"lost {place}"
    if _within(want, got) or (not whole and _repeats(want, got, at)):
        return f"doubled {place}"
    if Counter(got) == Counter(want):
        return f"reordered {place}"
    return f"wrong {place}"


def _within(small: Sequence[str], large: Sequence[str]) -> bool:
    rest = iter(large)
    return all(any(item == other for other in rest) for item in small)


def _repeats(want: Sequence[str], got: Sequence[str], at: int) -> bool:
    tail = got[at:]
    return any(want[start : start + len(tail)] == tail for start in range(at))


def _excerpt(items: Sequence[str], at: int) -> str:
    part = items[at : at + 8]
    return repr(part) if len(part) else END


def streamed_pieces(body: dict[str, Any]) -> int:
    """About how many chunks the answer has when it is streamed."""
    return int(body["usage"]["completion_tokens"]) + 2 * len(body["choices"])
