"""How fast a queue is served, measured while something waits. Pure: every call gets the time."""

import math

# What the rate is an average over, in seconds of waiting, and how many of them and of requests must have been seen.
WINDOW_S = 10.0
ENOUGH_S = 1.0
ENOUGH_REQUESTS = 5.0


class Drain:
    """Tokens per second. While nothing waits, the rate says what was asked for and not what could be served: that time
    is not counted, and the last rate stays."""

    __slots__ = ("_at", "_busy_s", "_requests", "_tokens")

    def __init__(self, now: float) -> None:
        self._at = now
        self._requests = 0.0
        self._tokens = 0.0
        self._busy_s = 0.0

    def advance(self, now: float, *, waiting: bool) -> None:
        """The time is `now`, and since the last call something was `waiting` or nothing."""
        if waiting:
            kept = math.exp((self._at - now) / WINDOW_S)
            self._requests *= kept
            self._tokens *= kept
            self._busy_s = self._busy_s * kept + WINDOW_S * (1 - kept)
        self._at = now

    def served(self, tokens: int) -> None:
        """A request of so many tokens left the queue for a worker."""
        self._requests += 1
        self._tokens += tokens

    def rate(self) -> float | None:
        """None: not known yet."""
        if self._busy_s < ENOUGH_S or self._requests < ENOUGH_REQUESTS:
            return None
        return self._tokens / self._busy_s
