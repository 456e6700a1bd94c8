"""How far a download is: written by its threads, read by logs, probes, metrics and terminals."""

import threading
import time
from collections import deque
from dataclasses import dataclass

RATE_WINDOW_S = 10.0


@dataclass(frozen=True)
class Snapshot:
    """A download at one moment. Bytes; seconds; `rate` in bytes a second, `eta_s` None where nobody can know.

    Attributes:
        waiting_for: who downloads it for us: another process that shares the cache.
    """

    done: int
    total: int
    rate: float
    eta_s: float | None
    waiting_for: str = ""

    @property
    def percent(self) -> int:
        """Of all bytes; 100 only when they are all there."""
        return min(100, self.done * 100 // self.total) if self.total else 0

    def __str__(self) -> str:
        text = f"{self.percent}% of {size_text(self.total)}" if self.total else size_text(self.done)
        if self.waiting_for:
            return f"{text}, by {self.waiting_for}"
        text += f", {size_text(self.rate)}/s"
        return text if self.eta_s is None else f"{text}, {_time_text(self.eta_s)} left"


class Download:
    """What one model's download has come to. Bytes that were there before count as done, but not into the rate."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._done = self._total = 0
        self._new = 0
        self._marks: deque[tuple[float, int]] = deque()
        self._waiting_for = ""
        self.active = False  # whether there is a download, or a wait for one, just now

    def begin(self, total: int) -> None:
        """A download of `total` bytes, 0 where nobody knows, begins."""
        with self._lock:
            self._done, self._total, self._new, self._waiting_for = 0, total, 0, ""
            self._marks.clear()
            self.active = True

    def add(self, count: int, *, found: bool = False) -> None:
        """`count` more bytes are here; fewer, where they had to be thrown away. `found`: they had been here before."""
        now = time.monotonic()
        with self._lock:
            self._done = max(0, self._done + count)
            if not found and count > 0:
                self._new += count
                if not self._marks or now - self._marks[-1][0] >= 0.1:
                    self._marks.append((now, self._new))
                while len(self._marks) > 2 and now - self._marks[0][0] > RATE_WINDOW_S:
                    self._marks.popleft()

    def wait(self, who: str, done: int, total: int) -> None:
        """Another one, `who`, downloads; this is how far it is."""
        with self._lock:
            self._waiting_for, self._done, self._total, self.active = who, done, total, True

    def end(self) -> None:
        """It is over."""
        with self._lock:
            self.active, self._waiting_for = False, ""

    def snapshot(self) -> Snapshot:
        """How it is now."""
        now = time.monotonic()
        with self._lock:
            rate = 0.0
            if self._marks and now > (since := self._marks[0])[0]:
                rate = (self._new - since[1]) / (now - since[0])
            left = max(0, self._total - self._done)
            eta = left / rate if rate > 0 and self._total else None
            return Snapshot(self._done, self._total, rate, eta, self._waiting_for)


def size_text(count: float) -> str:
    """Bytes for people, in powers of 1000 as disks and networks have them."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit in ("B", "kB") else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def _time_text(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
