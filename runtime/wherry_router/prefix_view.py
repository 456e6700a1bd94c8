"""What one replica has cached, as its reports tell and as this router's own requests will have it soon."""

from collections import Counter, deque
from collections.abc import Sequence

from wherry_protocol.prefix import unpack_keys
from wherry_protocol.worker import PrefixChange

# For how long after a request's end its prompt is taken to be cached though no report says so: a report may have been
# on its way. From then on only reports count.
_FADES_S = 0.3


class PrefixView:
    """Keys of prefixes. Empty until the replica has told of a prefix cache."""

    __slots__ = ("_cached", "_coming", "_fading", "told")

    def __init__(self) -> None:
        self.told = False
        self._cached: set[int] = set()
        self._coming: Counter[int] = Counter()
        self._fading: deque[tuple[float, Sequence[int]]] = deque()

    def __len__(self) -> int:
        return len(self._cached)

    def apply(self, change: PrefixChange) -> None:
        """A report.

        Raises:
            ValueError: it is no report; nothing changed.
        """
        added, removed = unpack_keys(change.added), unpack_keys(change.removed)
        if change.whole:
            self._cached = set(added)
        else:
            self._cached.difference_update(removed)
            self._cached.update(added)
        self.told = True

    def expect(self, keys: Sequence[int], now: float) -> None:
        """A prompt is on its way there."""
        self._forget(now)
        self._coming.update(keys)

    def over(self, keys: Sequence[int], now: float) -> None:
        """Its request has ended."""
        self._fading.append((now, keys))
        self._forget(now)

    def match(self, keys: Sequence[int]) -> int:
        """How many of the leading `keys` it has. A block outlives those after it: the first miss is the end."""
        if not self.told:
            return 0
        low, high = 0, len(keys)
        while low < high:
            middle = (low + high) // 2
            if keys[middle] in self._cached or keys[middle] in self._coming:
                low = middle + 1
            else:
                high = middle
        return low

    def _forget(self, now: float) -> None:
        fading, coming = self._fading, self._coming
        while fading and fading[0][0] < now - _FADES_S:
            for key in fading.popleft()[1]:
                if coming[key] > 1:
                    coming[key] -= 1
                else:
                    del coming[key]
