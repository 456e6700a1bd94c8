"""Limits counted in this process. Pure but for the clock."""

import time
from collections.abc import Callable, Sequence

from wherry_router.caller import LimitSet
from wherry_router.limits.bounds import WINDOW_S, Bound, Outcome, Standing, share

_SWEEP_S = 60
# How long a request waits for another to end is not known; this is when asking again makes sense.
CONCURRENT_WAIT_S = 1


class _Counts:
    """Amounts by the second in which they began to count."""

    __slots__ = ("_amounts",)

    def __init__(self) -> None:
        self._amounts: dict[int, int] = {}

    def add(self, second: int, amount: int) -> None:
        self._amounts[second] = max(self._amounts.get(second, 0) + amount, 0)

    def used(self, now: int) -> int:
        """What still counts."""
        for second in [s for s in self._amounts if s < now - WINDOW_S]:
            del self._amounts[second]
        return sum(self._amounts.values())

    def reset_s(self, now: int) -> int:
        return (
            max((s for s, amount in self._amounts.items() if amount), default=now - WINDOW_S - 1) + WINDOW_S + 1 - now
        )

    def wait_s(self, now: int, over: int) -> int:
        """Seconds until `over` of it have ceased to count."""
        for second in sorted(self._amounts):
            over -= self._amounts[second]
            if over <= 0:
                return second + WINDOW_S + 1 - now
        return WINDOW_S + 1


class _Window:
    __slots__ = ("requests", "running", "tokens")

    def __init__(self) -> None:
        self.requests = _Counts()
        self.tokens = _Counts()
        self.running: set[str] = set()

    def standing(self, now: int) -> Standing:
        requests, tokens = self.requests, self.tokens
        return Standing(requests.used(now), requests.reset_s(now), tokens.used(now), tokens.reset_s(now))

    def lacks(self, limits: LimitSet, need: int, now: int) -> tuple[int, str]:
        """Seconds until a request that needs `need` tokens has room, and what of; (0, "") if it has."""
        found = (0, "")
        if limits.concurrent and len(self.running) >= limits.concurrent:
            found = (CONCURRENT_WAIT_S, "concurrent")
        if limits.requests_per_minute and (over := self.requests.used(now) + 1 - limits.requests_per_minute) > 0:
            found = max(found, (self.requests.wait_s(now, over), "requests"))
        if limits.tokens_per_minute and (over := self.tokens.used(now) + need - limits.tokens_per_minute) > 0:
            found = max(found, (self.tokens.wait_s(now, over), "tokens"))
        return found


class _Held:
    __slots__ = ("parts", "second")

    def __init__(self, second: int, parts: list[tuple[_Window, int]]) -> None:
        self.second = second
        self.parts = parts  # each window, and what of its tokens is held


class LocalStore:
    """Counts in memory. `routers`: how many count like this, each for its part of every limit."""

    def __init__(self, routers: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self._routers = routers
        self._clock = clock
        self._windows: dict[tuple[str, str], _Window] = {}
        self._held: dict[str, _Held] = {}
        self._swept = 0

    def __len__(self) -> int:
        return len(self._windows)

    def reserve(self, request_id: str, bounds: Sequence[Bound], tokens: int, *, force: bool = False) -> Outcome:
        """Counts a request against all `bounds` or, where one has no room, against none. `force`: in any case."""
        now = int(self._clock())
        self._sweep(now)
        windows = [self._window(bound) for bound in bounds]
        limits = [share(bound.limits, self._routers) for bound in bounds]
        # A request that is larger than the limit takes all of it: it may run when nothing else did.
        needs = [min(tokens, limit.tokens_per_minute or tokens) for limit in limits]
        if not force:
            lacks = [w.lacks(limit, need, now) for w, limit, need in zip(windows, limits, needs, strict=True)]
            wait_s, what = max(lacks, default=(0, ""))
            if wait_s:
                refused = lacks.index((wait_s, what))
                return Outcome([w.standing(now) for w in windows], refused, what, wait_s)
        for window, need in zip(windows, needs, strict=True):
            window.requests.add(now, 1)
            window.tokens.add(now, need)
            window.running.add(request_id)
        self._held[request_id] = _Held(now, list(zip(windows, needs, strict=True)))
        return Outcome([w.standing(now) for w in windows])

    def add(self, request_id: str, tokens: int) -> None:
        """A request that still runs takes more than was reserved."""
        if (held := self._held.get(request_id)) is not None:
            now = int(self._clock())
            for window, _ in held.parts:
                window.tokens.add(now, tokens)
            held.parts = [(window, need + tokens) for window, need in held.parts]

    def settle(self, request_id: str, tokens: int) -> None:
        """A request has ended, and took so many tokens. Known once only."""
        held = self._held.pop(request_id, None)
        if held is None:
            return
        now = int(self._clock())
        for window, need in held.parts:
            window.running.discard(request_id)
            # What was reserved counts from when the request began; what it took on top of an old one counts now.
            second = held.second if held.second >= now - WINDOW_S else now
            if second == held.second or tokens > need:
                window.tokens.add(second, tokens - need)

    def _window(self, bound: Bound) -> _Window:
        key = (bound.scope, bound.name)
        if (window := self._windows.get(key)) is None:
            window = self._windows[key] = _Window()
        return window

    def _sweep(self, now: int) -> None:
        """Forgets those of whom nothing counts any more."""
        if now - self._swept < _SWEEP_S:
            return
        self._swept = now
        self._windows = {
            key: window
            for key, window in self._windows.items()
            if window.running or window.requests.used(now) or window.tokens.used(now)
        }
