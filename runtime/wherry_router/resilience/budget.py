"""How many retries are allowed, and how long to pause before one. Pure: every call gets the time.

A pool that is overloaded fails requests, and each failed request that is sent again adds to the load. So retries are a
share of the requests of the last ten seconds, plus a few a second, so that a quiet router can retry at all.
"""

_WINDOW_S = 10
_FIRST_PAUSE_S = 0.025
_MAX_PAUSE_S = 1.0


class RetryBudget:
    """Counts requests and retries by the second over a sliding window of ten."""

    __slots__ = ("_min_per_s", "_ratio", "_requests", "_retries", "_second")

    def __init__(self, ratio: float, min_per_s: float) -> None:
        self._ratio = ratio
        self._min_per_s = min_per_s
        self._second = 0
        self._requests = [0] * _WINDOW_S
        self._retries = [0] * _WINDOW_S

    def request(self, now: float) -> None:
        """A request came."""
        self._slide(now)
        self._requests[self._second % _WINDOW_S] += 1

    def take(self, now: float) -> bool:
        """Whether one retry is allowed now; takes it if so."""
        self._slide(now)
        allowed = self._min_per_s * _WINDOW_S + self._ratio * sum(self._requests)
        if sum(self._retries) + 1 > allowed:
            return False
        self._retries[self._second % _WINDOW_S] += 1
        return True

    def _slide(self, now: float) -> None:
        second = int(now)
        for passed in range(max(self._second + 1, second - _WINDOW_S + 1), second + 1):
            self._requests[passed % _WINDOW_S] = self._retries[passed % _WINDOW_S] = 0
        self._second = max(second, self._second)


def backoff_s(retries: int, draw: float) -> float:
    """The pause before a retry. `retries`: those before it. `draw`: a random number in [0, 1), over the whole range, so
    that requests that failed together do not come back together."""
    doublings = float(2 ** min(retries, 16))
    return draw * min(_FIRST_PAUSE_S * doublings, _MAX_PAUSE_S)
