"""Consistent hashing with bounded loads, by which routers that share no state agree on a replica.

Rendezvous hashing (Thaler & Ravishankar, 1998, https://doi.org/10.1109/90.663936): a key ranks the replicas by a hash
of both, so there is no ring to keep, and a replica that leaves only moves the keys that were on it. Each key takes the
first in its order that is not over its share by more than a bound (Mirrokni et al., 2017,
https://arxiv.org/abs/1608.01350).
"""

import hashlib
from collections.abc import Sequence

_MASK = 2**64 - 1


def identity_of(name: str) -> int:
    """64 bits of a name, the same in every process."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def affinity(identity: int, key: int) -> int:
    """How much `key` belongs to the replica `identity`: the finalizer of splitmix64 over both."""
    value = ((identity ^ key) + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def home(identities: Sequence[int], loads: Sequence[float], bound: float, key: int) -> int:
    """The index of the first in the order of `key` whose load is within `bound`; some must be."""
    within = [index for index, load in enumerate(loads) if load <= bound]
    return max(within, key=lambda index: affinity(identities[index], key))
