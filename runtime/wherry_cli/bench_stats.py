"""What a load test measured, request by request, and what that comes to. Pure."""

import math
from collections import Counter
from collections.abc import Sequence

import msgspec

PERCENTILES = (50, 90, 95, 99)


class Outcome(msgspec.Struct, kw_only=True):
    """One request. Times in seconds since the test began.

    `scheduled` is when it had to be sent, whether or not the generator managed to: every latency counts from there.
    """

    scheduled: float
    sent: float
    turn: int = 0
    first: float | None = None  # the first text
    end: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    gaps: list[float] = []  # seconds between pieces of text
    failure: str = ""  # its kind; empty: the answer is whole

    @property
    def ttft(self) -> float | None:
        return None if self.first is None else self.first - self.scheduled

    @property
    def per_token(self) -> float:
        """Mean seconds of a token after the first one."""
        return 0.0 if self.first is None else (self.end - self.first) / max(self.output_tokens - 1, 1)


class Slo(msgspec.Struct, frozen=True):
    """What a request must keep to count as good, in seconds; None: anything will do."""

    ttft_s: float | None = None
    itl_s: float | None = None  # mean of a request's tokens after the first

    def kept(self, outcome: Outcome) -> bool:
        """Whether this answer is whole, and in time."""
        if outcome.failure or outcome.ttft is None:
            return False
        in_time = self.ttft_s is None or outcome.ttft <= self.ttft_s
        return in_time and (self.itl_s is None or outcome.per_token <= self.itl_s)


class Spread(msgspec.Struct):
    """Seconds: mean, percentiles (`p50`…) and the largest. None where nothing was measured."""

    mean: float | None
    percentiles: dict[str, float | None]
    highest: float | None


class Summary(msgspec.Struct, kw_only=True):
    """A load test's figures. Rates are per second of `seconds`, from the first arrival to the last end."""

    seconds: float
    sent: int
    complete: int
    failed: int
    failures: dict[str, int]
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    prompt_tokens_per_s: float
    good: int
    goodput_per_s: float
    good_share: float
    ttft: Spread
    itl: Spread
    per_token: Spread
    e2e: Spread
    late: Spread  # from the time a request had to be sent to when it was: the generator's own fault


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that `share` percent of `ordered` (ascending, not empty) do not exceed."""
    return ordered[max(math.ceil(share / 100 * len(ordered)) - 1, 0)]


def spread(values: Sequence[float]) -> Spread:
    """Of values in any order."""
    ordered = sorted(values)
    cuts: dict[str, float | None] = {f"p{p}": percentile(ordered, p) if ordered else None for p in PERCENTILES}
    return Spread(sum(ordered) / len(ordered) if ordered else None, cuts, ordered[-1] if ordered else None)


def summarize(outcomes: Sequence[Outcome], slo: Slo) -> Summary:
    """What all of them come to; latencies are those of whole answers."""
    whole = [outcome for outcome in outcomes if not outcome.failure]
    first = min((outcome.scheduled for outcome in outcomes), default=0.0)
    seconds = max((outcome.end for outcome in outcomes), default=0.0) - first
    per_s = 1 / seconds if seconds > 0 else 0.0
    failures = Counter(outcome.failure for outcome in outcomes if outcome.failure)
    good = sum(slo.kept(outcome) for outcome in outcomes)
    output, prompt = sum(o.output_tokens for o in outcomes), sum(o.prompt_tokens for o in outcomes)
    return Summary(
        seconds=seconds,
        sent=len(outcomes),
        complete=len(whole),
        failed=len(outcomes) - len(whole),
        failures=dict(failures.most_common()),
        prompt_tokens=prompt,
        cached_tokens=sum(outcome.cached_tokens for outcome in outcomes),
        output_tokens=output,
        requests_per_s=len(whole) * per_s,
        output_tokens_per_s=output * per_s,
        prompt_tokens_per_s=prompt * per_s,
        good=good,
        goodput_per_s=good * per_s,
        good_share=good / len(outcomes) if outcomes else 0.0,
        ttft=spread([outcome.ttft for outcome in whole if outcome.ttft is not None]),
        itl=spread([gap for outcome in whole for gap in outcome.gaps]),
        per_token=spread([outcome.per_token for outcome in whole if outcome.output_tokens > 1]),
        e2e=spread([outcome.end - outcome.scheduled for outcome in whole]),
        late=spread([outcome.sent - outcome.scheduled for outcome in outcomes]),
    )


class Slice(msgspec.Struct):
    """A part of the test by time of arrival: `at` is its middle."""

    at: float
    outcomes: list[Outcome]


def slices(outcomes: Sequence[Outcome], parts: int = 10) -> list[Slice]:
    """The test in parts of equal length, those without a request left out."""
    if not outcomes:
        return []
    first, last = (pick(outcome.scheduled for outcome in outcomes) for pick in (min, max))
    width = max(last - first, 1e-9) / parts
    found = [Slice(first + (part + 0.5) * width, []) for part in range(parts)]
    for outcome in outcomes:
        found[min(int((outcome.scheduled - first) / width), parts - 1)].outcomes.append(outcome)
    return [part for part in found if part.outcomes]
