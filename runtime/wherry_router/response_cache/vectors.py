"""The questions that were answered, as vectors. Pure but for the clock."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wherry_router.response_cache.fair import Fair

Vector = NDArray[np.float32]


def unit(numbers: list[float]) -> Vector | None:
    """`numbers` as a vector of length 1; None: they have no direction."""
    vector = np.asarray(numbers, dtype=np.float32)
    length = float(np.sqrt(np.dot(vector, vector)))
    return vector / np.float32(length) if 0 < length < float("inf") else None


class Near(NamedTuple):
    """An answered question: the key of its answer, and the cosine of the angle between it and the one asked."""

    key: bytes
    similarity: float


class _Group:
    """Vectors of one group: float32 (rows, dimensions), those in use first."""

    def __init__(self, dimensions: int) -> None:
        self.matrix: Vector = np.empty((1, dimensions), dtype=np.float32)
        self.until: NDArray[np.float64] = np.empty(1)
        self.keys: list[bytes] = []
        self.rows: dict[bytes, int] = {}

    def put(self, key: bytes, vector: Vector, until: float) -> None:
        row = self.rows.get(key)
        if row is None:
            row = self.rows[key] = len(self.keys)
            self.keys.append(key)
            if row == len(self.matrix):
                self.matrix = np.concatenate([self.matrix, np.empty_like(self.matrix)])
                self.until = np.concatenate([self.until, np.empty_like(self.until)])
        self.matrix[row] = vector
        self.until[row] = until

    def drop(self, key: bytes) -> None:
        row, last = self.rows.pop(key), self.keys.pop()
        if last != key:
            self.keys[row] = last
            self.rows[last] = row
            self.matrix[row] = self.matrix[len(self.keys)]
            self.until[row] = self.until[len(self.keys)]


class Vectors:
    """At most `room` vectors of unit length, shared by tenants as `Fair` does it. Groups are never compared."""

    def __init__(self, room: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._fair: Fair[tuple[bytes, bytes]] = Fair(room)
        self._groups: dict[bytes, _Group] = {}

    def __len__(self) -> int:
        return self._fair.used

    def knows(self, group: bytes) -> bool:
        """Whether anything could be near."""
        found = self._groups.get(group)
        return found is not None and float(found.until[: len(found.keys)].max()) > self._clock()

    def nearest(self, tenant: str, group: bytes, vector: Vector) -> Near | None:
        """The most similar one of the group whose time is not over. It counts as used."""
        found = self._groups.get(group)
        if found is None or found.matrix.shape[1] != len(vector):
            return None
        count = len(found.keys)
        similar = found.matrix[:count] @ vector
        similar[found.until[:count] <= self._clock()] = -2
        row = int(similar.argmax())
        if similar[row] < -1.5:
            return None
        self._fair.touch(tenant, (group, found.keys[row]))
        return Near(found.keys[row], min(float(similar[row]), 1.0))

    def put(self, tenant: str, group: bytes, key: bytes, vector: Vector, until: float) -> None:
        """Keeps the vector of the question whose answer has `key`, until that time. One of another size than those of
        its group is of another model, and begins the group anew."""
        found = self._groups.get(group)
        if found is not None and found.matrix.shape[1] != len(vector):
            for other in list(found.keys):
                self.drop(tenant, group, other)
        gone = self._fair.put(tenant, (group, key), 1)
        for _, (of, other) in gone or ():
            self._remove(of, other)
        self._groups.setdefault(group, _Group(len(vector))).put(key, vector, until)

    def drop(self, tenant: str, group: bytes, key: bytes) -> None:
        """Forgets one, if it is there."""
        self._fair.drop(tenant, (group, key))
        self._remove(group, key)

    def _remove(self, group: bytes, key: bytes) -> None:
        found = self._groups.get(group)
        if found is not None and key in found.rows:
            found.drop(key)
            if not found.keys:
                del self._groups[group]
