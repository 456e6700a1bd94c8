"""When something that a request can do without is not asked any more. Pure."""

from collections.abc import Callable

LEAST_S = 0.5
MOST_S = 10.0


class Circuit:
    """Open after `failures` in a row; then nobody asks but a probe, at times that grow from `LEAST_S` to `MOST_S`
    apart, and one probe that succeeds closes it. Times are the clock's, in seconds."""

    def __init__(self, failures: int, clock: Callable[[], float], most_s: float = MOST_S) -> None:
        self._failures = failures
        self._clock = clock
        self._most_s = most_s
        self._in_a_row = 0
        self._gap_s = LEAST_S
        self._probe_at = 0.0
        self.open = False

    def succeeded(self) -> bool:
        """Notes an answer; returns whether it closed the circuit."""
        closed, self.open = self.open, False
        self._in_a_row, self._gap_s = 0, LEAST_S
        return closed

    def failed(self) -> bool:
        """Notes a failure; returns whether it opened the circuit."""
        self._in_a_row += 1
        if self.open or self._in_a_row < self._failures:
            return False
        self.open = True
        self._probe_at = self._clock() + self._gap_s
        return True

    def due(self) -> bool:
        """Whether it is time for a probe. Whoever is told so makes it, and tells `succeeded` or `failed`."""
        if not self.open or self._clock() < self._probe_at:
            return False
        self._gap_s = min(2 * self._gap_s, self._most_s)
        self._probe_at = self._clock() + self._gap_s
        return True
