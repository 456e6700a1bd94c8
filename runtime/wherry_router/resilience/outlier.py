"""Which replicas do visibly worse than the others, and for how long they are left out. Pure: every call gets the time.

The breaker sees faults in a row. This sees what it cannot: a replica that fails every third request, or answers, but
much later than the others. Both are measured against the other replicas, so that what all of them suffer from (a bad
prompt, a burst) ejects nobody, and never is more than a share of the pool out.
"""

import statistics
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

WINDOW_S = 30.0
_MIN_RESULTS = 10
_MIN_OTHERS = 2
_MAX_SAMPLES = 128
# How much more often than the others it fails, and how much later at least its tokens begin.
_FAULTS_FACTOR = 3.0
_TTFT_MARGIN_S = 0.5
_MAX_TIMES = 8
_FORGET_S = 300.0


class Rules(NamedTuple):
    """`share`: of the pool that may be out at a time. `seconds`: the first ejection's; the next lasts twice as long."""

    share: float
    seconds: float
    fault_rate: float
    ttft_factor: float


class View(NamedTuple):
    """One replica's last 30 s. `ttft_s`: the median, None where there are too few answers to tell."""

    results: int = 0
    faults: int = 0
    ttft_s: float | None = None
    ejected: bool = False


class Record:
    """One replica's results, and its ejection."""

    __slots__ = ("_results", "_times", "_ttfts", "_until")

    def __init__(self) -> None:
        self._results: deque[tuple[float, bool]] = deque(maxlen=_MAX_SAMPLES)
        self._ttfts: deque[tuple[float, float]] = deque(maxlen=_MAX_SAMPLES)
        self._until = float("-inf")
        self._times = 0

    def result(self, now: float, *, fault: bool) -> None:
        """A request ended."""
        self._results.append((now, fault))

    def ttft(self, now: float, seconds: float) -> None:
        """An answer's first token came."""
        self._ttfts.append((now, seconds))

    def ejected(self, now: float) -> bool:
        """Whether it is out."""
        return now < self._until

    def view(self, now: float) -> View:
        """What `outliers` looks at."""
        results = [fault for at, fault in self._results if now - at < WINDOW_S]
        ttfts = [seconds for at, seconds in self._ttfts if now - at < WINDOW_S]
        median = statistics.median(ttfts) if len(ttfts) >= _MIN_RESULTS else None
        return View(len(results), sum(results), median, self.ejected(now))

    def eject(self, now: float, rules: Rules) -> None:
        """Takes it out. It comes back by itself and is judged by what it does from then on."""
        self._times = self._times + 1 if now - self._until < _FORGET_S else 1
        self._until = now + rules.seconds * 2 ** min(self._times - 1, _MAX_TIMES)
        self._results.clear()
        self._ttfts.clear()


def outliers(views: Sequence[View], rules: Rules) -> list[tuple[int, str]]:
    """Indices of those to eject now, the worst first, each with the cause: `faults` or `latency`."""
    room = int(rules.share * len(views)) - sum(view.ejected for view in views)
    found: list[tuple[float, int, str]] = []
    for index, view in enumerate(views):
        others = [other for at, other in enumerate(views) if at != index and not other.ejected]
        if view.ejected or len(others) < _MIN_OTHERS:
            continue
        if _fails(view, others, rules):
            # Faults are worse than any delay.
            found.append((1e9 * view.faults / view.results, index, "faults"))
        elif (ratio := _delay(view, others)) >= rules.ttft_factor:
            found.append((ratio, index, "latency"))
    return [(index, cause) for _, index, cause in sorted(found, key=lambda f: -f[0])[: max(room, 0)]]


def _fails(view: View, others: Sequence[View], rules: Rules) -> bool:
    results, faults = sum(o.results for o in others), sum(o.faults for o in others)
    if view.results < _MIN_RESULTS or results < _MIN_RESULTS:
        return False
    rate = view.faults / view.results
    return rate >= rules.fault_rate and rate >= _FAULTS_FACTOR * faults / results


def _delay(view: View, others: Sequence[View]) -> float:
    """How many times as long as with the others a first token takes; 0 where it cannot be told."""
    medians = [other.ttft_s for other in others if other.ttft_s is not None]
    if view.ttft_s is None or len(medians) < _MIN_OTHERS:
        return 0.0
    typical = statistics.median(medians)
    return view.ttft_s / max(typical, 1e-6) if view.ttft_s - typical >= _TTFT_MARGIN_S else 0.0
