"""What is known of acceptance and of costs: measured while serving, forgotten exponentially, never assumed."""

from bisect import bisect_left
from collections import deque

DECAY = 0.98  # of a trial's weight, per later trial of its class: about the last 50 count
REQUEST_DECAY = 0.95
REQUEST_WEIGHT = 8.0  # trials of its own after which a request counts as much as all the others
PRIOR = 0.7  # acceptance of what was never tried: hopeful, so that it is tried
PRIOR_WEIGHT = 2.0
CERTAIN = 0.995  # no estimate is higher

SAMPLES = 9  # timings of a number of rows that the median is over
EXACT_ROWS = 16  # numbers of rows up to this are told apart; above, within an eighth
OLD = 200  # timings later, a number of rows is measured afresh: what held it up may be over
HOPE, MOST_HOPE = 0.999, 0.7  # per timing since, how much cheaper an old measurement is taken to be, down to this share
STALE = 4000  # timings later, a number of rows that did not come up again is forgotten


class Ratio:
    """Accepted of tried, the past fading."""

    __slots__ = ("accepted", "decay", "tried")

    def __init__(self, accepted: float, tried: float, decay: float) -> None:
        self.accepted, self.tried, self.decay = accepted, tried, decay

    def add(self, accepted: float, tried: float = 1.0) -> None:
        self.accepted = self.accepted * self.decay + accepted
        self.tried = self.tried * self.decay + tried

    @property
    def value(self) -> float:
        return self.accepted / self.tried


class Acceptance:
    """How often guesses of each class hold, given that those before them in the run held.

    A class is what the proposer knows about a guess: how long its match is, or how sure the draft model was. A request
    differs from the others by a factor of its own on all classes: accepted guesses to expected ones.
    """

    def __init__(self, num_classes: int) -> None:
        self._classes = [Ratio(PRIOR * PRIOR_WEIGHT, PRIOR_WEIGHT, DECAY) for _ in range(num_classes)]
        self._all = Ratio(PRIOR * PRIOR_WEIGHT, PRIOR_WEIGHT, DECAY)
        self._factors: dict[str, Ratio] = {}

    def of(self, request_id: str, guess_class: int) -> float:
        """Probability that a guess holds if those before it did."""
        return self._scaled(request_id, self._classes[guess_class].value)

    def mean(self, request_id: str) -> float:
        """The same for a guess that is not made yet."""
        return self._scaled(request_id, self._all.value)

    def run(self, request_id: str, classes: list[int]) -> list[float]:
        """Probability of each guess of a run to be accepted, which takes all before it too."""
        held, chances = 1.0, []
        for guess_class in classes:
            held *= self.of(request_id, guess_class)
            chances.append(held)
        return chances

    def note(self, request_id: str, classes: list[int], accepted: int) -> None:
        """Books a checked run: the first `accepted` held and the next one, if there is one, did not."""
        factor = self._factors.get(request_id)
        if factor is None:
            factor = self._factors[request_id] = Ratio(REQUEST_WEIGHT, REQUEST_WEIGHT, REQUEST_DECAY)
        for index, guess_class in enumerate(classes[: accepted + 1]):
            held = float(index < accepted)
            factor.add(held, self._classes[guess_class].value)
            self._classes[guess_class].add(held)
            self._all.add(held)

    def forget(self, request_id: str) -> None:
        self._factors.pop(request_id, None)

    def _scaled(self, request_id: str, value: float) -> float:
        factor = self._factors.get(request_id)
        return min(CERTAIN, value if factor is None else value * factor.value)


class Cost:
    """Seconds that a step with some number of rows takes: medians of what was measured, straight lines between.

    `hopeful`: what was not measured lately counts as cheaper than it was, so that something that looks nearly as good
    as what is done now is tried again.
    """

    def __init__(self, *, hopeful: bool = False) -> None:
        self._hopeful = hopeful
        self._samples: dict[int, deque[float]] = {}
        self._noted: dict[int, int] = {}  # bucket → when it was measured last, in timings
        self._count = 0
        self._rows: list[int] = []  # buckets in order, and their medians
        self._seconds: list[float] = []

    @property
    def known(self) -> bool:
        return bool(self._rows)

    def covers(self, rows: int) -> bool:
        """Whether `rows` lies between numbers that were measured, at least twice: the first time is often slow."""
        if not self._rows or not self._rows[0] <= _bucket(rows) <= self._rows[-1]:
            return False
        samples = self._samples.get(_bucket(rows))
        return samples is None or len(samples) > 1

    def settled(self, rows: int) -> bool:
        """Whether `rows` was measured more than once: the first time of anything is often slow."""
        return len(self._samples.get(_bucket(rows), ())) > 1

    def note(self, rows: int, seconds: float) -> None:
        bucket = _bucket(rows)
        self._count += 1
        samples = self._samples.get(bucket)
        if samples is not None and self._count - self._noted[bucket] > OLD:
            samples.clear()
        self._noted[bucket] = self._count
        if samples is None:
            samples = self._samples[bucket] = deque(maxlen=SAMPLES)
            at = bisect_left(self._rows, bucket)
            self._rows.insert(at, bucket)
            self._seconds.insert(at, seconds)
        samples.append(seconds)
        self._seconds[bisect_left(self._rows, bucket)] = _median(samples)
        if self._count % (STALE // 8) == 0:
            self._forget_stale()

    def of(self, rows: int, anchor: tuple[int, float] | None = None) -> float:
        """Seconds for `rows`, on straight lines between what was measured; 0 before anything was.

        Left of all measurements the line begins at `anchor` (rows, seconds), if there is one. Right of them all, it
        goes on as from the first to the last: hopeful where little is known, and put right as soon as it is tried.
        """
        xs = self._rows
        at = bisect_left(xs, rows)
        if at < len(xs) and xs[at] == rows:
            return self._point(at)[1]
        if 0 < at < len(xs):
            return _between(rows, self._point(at - 1), self._point(at))
        if anchor is not None and anchor[0] > rows:
            anchor = None
        if not xs:
            return anchor[1] if anchor is not None else 0.0
        if at == 0:
            return self._point(0)[1] if anchor is None else _between(rows, anchor, self._point(0))
        first = anchor if anchor is not None and anchor[0] < xs[-1] else self._point(0)
        last = self._point(len(xs) - 1)
        slope = max(0.0, (last[1] - first[1]) / (last[0] - first[0])) if last[0] > first[0] else 0.0
        return last[1] + slope * (rows - last[0])

    def _point(self, index: int) -> tuple[int, float]:
        rows = self._rows[index]
        if not self._hopeful:
            return rows, self._seconds[index]
        return rows, self._seconds[index] * max(MOST_HOPE, HOPE ** (self._count - self._noted[rows]))

    def _forget_stale(self) -> None:
        for bucket in [b for b, noted in self._noted.items() if self._count - noted >= STALE]:
            at = bisect_left(self._rows, bucket)
            del self._rows[at], self._seconds[at], self._samples[bucket], self._noted[bucket]


def _between(rows: int, low: tuple[int, float], high: tuple[int, float]) -> float:
    return low[1] + (rows - low[0]) / (high[0] - low[0]) * (high[1] - low[1])


def _median(samples: deque[float]) -> float:
    """The lower one of two: the first time of anything is often slow."""
    return sorted(samples)[(len(samples) - 1) // 2]


def _bucket(rows: int) -> int:
    if rows <= EXACT_ROWS:
        return rows
    width = 1 << (rows.bit_length() - 4)  # an eighth of the power of two below
    return (rows // width) * width + width // 2
