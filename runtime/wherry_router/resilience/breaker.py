"""A circuit breaker: closed → open → half-open → closed. Pure: every call gets the time.

One fault of the whole worker opens it, or `faults` failed requests in a row. A probe that succeeds makes it half-open
(after a pause that doubles with each opening), and so does time alone after `max_open_s`, should probes be what is
broken. Half-open it lets one request through at a time: that request's first token closes it, its fault opens it again.
A trial that tells nothing for `_TRIAL_S` no longer holds the place, so no state lasts for good.
"""

from enum import Enum

from wherry_router.resilience.faults import Blame

_FIRST_PAUSE_S = 0.5
_FORGET_S = 60.0
_TRIAL_S = 30.0
# Probes that close a half-open breaker when no request comes to do it.
_QUIET_PROBES = 10


class State(Enum):
    """The value is its name in metrics."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Breaker:
    """One replica's. Seconds throughout.

    Whoever reports a fault says at which `epoch` the worker last gave it a sign of life. Faults from before the last
    change of state say nothing new, so fifty streams cut at once open the breaker once.
    """

    __slots__ = (
        "_by_time",
        "_closed_at",
        "_faults",
        "_max_faults",
        "_max_open",
        "_opened_at",
        "_quiet",
        "_trial",
        "_trial_id",
        "epoch",
        "state",
        "trips",
    )

    def __init__(self, max_faults: int, max_open_s: float) -> None:
        self._max_faults = max_faults
        self._max_open = max_open_s
        self._faults = 0
        self._opened_at = 0.0
        self._closed_at = float("-inf")
        self._trial: float | None = None
        self._trial_id = 0
        self._quiet = 0
        self._by_time = False  # half-open though no probe succeeded
        self.epoch = 0  # changes of state so far
        self.state = State.CLOSED
        self.trips = 0

    def allows(self, now: float) -> bool:
        """Whether a request may go there."""
        return self.state is State.CLOSED or self.trial_due(now)

    def trial_due(self, now: float) -> bool:
        """Whether it waits for the one request that tests it."""
        if self.state is State.OPEN and now - self._opened_at >= self._max_open:
            self._turn(State.HALF_OPEN)
            self._by_time = True
        if self.state is not State.HALF_OPEN:
            return False
        return self._trial is None or now - self._trial >= _TRIAL_S

    def begin(self, now: float) -> int:
        """A request goes there. Returns the number of the trial that it is, 0 for none."""
        if not self.trial_due(now):
            return 0
        self._trial = now
        self._trial_id += 1
        return self._trial_id

    def ended(self, trial: int) -> None:
        """A request is over, whatever it told: if it was the trial, its place is free."""
        if trial and trial == self._trial_id:
            self._trial = None

    def answered(self, now: float) -> None:
        """The first token of a request came: the worker works. From a request of any epoch: what comes now is new."""
        if self.state is not State.CLOSED:
            self._closed_at = now
            self._turn(State.CLOSED)

    def completed(self) -> None:
        """An answer is whole."""
        self._faults = 0

    def failed(self, epoch: int, blame: Blame, now: float) -> bool:
        """A request failed. Whether that was news; the breaker is open where it was and weighs enough."""
        if blame is Blame.NONE or epoch != self.epoch or self.state is State.OPEN:
            return False
        self._faults += 1
        if self.state is State.HALF_OPEN or blame is Blame.WORKER or self._faults >= self._max_faults:
            self._open(now)
        return True

    def probed(self, *, well: bool, now: float) -> None:
        """What a probe found. Where it failed a half-open breaker is open again; the pause does not grow by it.

        Not if time made it half-open: then a request is to try in spite of the probes.
        """
        if not well:
            if self.state is State.HALF_OPEN and not self._by_time:
                self._turn(State.OPEN)
                self._opened_at = now
        elif self.state is State.OPEN:
            if now - self._opened_at >= self._pause():
                self._turn(State.HALF_OPEN)
        elif self.state is State.HALF_OPEN and self._trial is None:
            self._quiet += 1
            if self._quiet >= _QUIET_PROBES:
                self._closed_at = now
                self._turn(State.CLOSED)

    def _pause(self) -> float:
        """How long it stays open though probes succeed. Not at all at first: one cut connection is no dead worker."""
        doublings = min(self.trips - 2, 16)
        return min(_FIRST_PAUSE_S * 2**doublings, self._max_open) if self.trips > 1 else 0.0

    def _open(self, now: float) -> None:
        # Openings that follow one another closely make the pause grow.
        self.trips = self.trips + 1 if self.state is State.HALF_OPEN or now - self._closed_at < _FORGET_S else 1
        self._opened_at = now
        self._turn(State.OPEN)

    def _turn(self, state: State) -> None:
        self.state = state
        self.epoch += 1
        self._faults = self._quiet = 0
        self._by_time = False
        self._trial = None
