"""Which beginnings of prompts are in the prefix cache now, in the keys that routers know them by.

A key says how much of a prompt's text it covers, a block how many of its tokens. Keys are tied to blocks in proportion,
rounded up. A key is told for as long as a block that it is tied to is in the prefix index, or a live request has it in
its prompt: what the digest tells goes away with the eviction of the block. The text is not evenly spread over the
tokens, so near the end of what is cached it may be off by a few blocks.
"""

import secrets
import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from itertools import islice

import msgspec

from wherry_protocol.prefix import CHUNK_BYTES, pack_keys, prefix_keys, written_out
from wherry_protocol.worker import ExecuteRequest, PrefixChange

Mark = tuple[int, int]  # index of a prompt's block, and the key of the text that ends in it

# Texts that differ and have the same tokens: more of them than this for one block are not worth telling.
_MAX_KEYS_PER_BLOCK = 4
# Changes that are remembered. Whoever has missed more gets the whole digest.
_MAX_CHANGES = 16384


def marks_of(keys: Sequence[int], num_bytes: int, num_tokens: int, block_size: int) -> list[Mark]:
    """Ties the keys of a prompt of `num_bytes` and `num_tokens` to its full blocks, in their order."""
    full = num_tokens // block_size
    marks = []
    for index, key in enumerate(keys):
        tokens = -(-num_tokens * (index + 1) * CHUNK_BYTES // num_bytes)
        block = -(-tokens // block_size) - 1
        if block >= full:
            break
        marks.append((block, key))
    return marks


def marks_for(request: ExecuteRequest, num_tokens: int, block_size: int) -> list[Mark]:
    """What routers know the blocks of a request's prompt by, which has `num_tokens`."""
    text = written_out(request.prompt)
    return marks_of(prefix_keys(text, request.model, request.cache_salt), len(text), num_tokens, block_size)


class Cursor(msgspec.Struct, frozen=True):
    """How far a reader of a digest is."""

    epoch: int
    version: int


class PrefixDigest:
    """Keys by the blocks they are tied to. Written by the step loop's thread, read from any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._epoch = secrets.randbits(53)
        self._version = 0
        self._keys_of: dict[bytes, list[int]] = {}  # by block hash
        self._count: dict[int, int] = {}  # key → blocks it is tied to
        self._coming: dict[int, int] = {}  # key → live requests that have it in their prompt
        self._changes: deque[int] = deque(maxlen=_MAX_CHANGES)

    def __len__(self) -> int:
        return len(self._count.keys() | self._coming.keys())

    def expect(self, marks: Sequence[Mark]) -> None:
        """A request is in the queue: whoever comes later will find its prompt in the cache."""
        with self._lock:
            for _, key in marks:
                count = self._coming.get(key, 0)
                self._coming[key] = count + 1
                if not count and key not in self._count:
                    self._note(key)

    def over(self, marks: Sequence[Mark]) -> None:
        """The request has ended: what it has not computed will not be there."""
        with self._lock:
            for _, key in marks:
                count = self._coming[key] - 1
                if count:
                    self._coming[key] = count
                else:
                    del self._coming[key]
                    if key not in self._count:
                        self._note(key)

    def tie(self, block_hash: bytes, key: int) -> None:
        """`block_hash` is in the prefix index, and `key`'s text ends in it."""
        keys = self._keys_of.get(block_hash)
        if keys is not None and (key in keys or len(keys) >= _MAX_KEYS_PER_BLOCK):
            return
        with self._lock:
            self._keys_of.setdefault(block_hash, []).append(key)
            count = self._count.get(key, 0)
            self._count[key] = count + 1
            if not count and key not in self._coming:
                self._note(key)

    def drop(self, block_hash: bytes) -> None:
        """`block_hash` is no longer in the prefix index."""
        if block_hash not in self._keys_of:
            return
        with self._lock:
            for key in self._keys_of.pop(block_hash):
                count = self._count[key] - 1
                if count:
                    self._count[key] = count
                else:
                    del self._count[key]
                    if key not in self._coming:
                        self._note(key)

    def cached_blocks(self, marks: Sequence[Mark]) -> int:
        """How many leading blocks of a waiting prompt with these `marks` are cached, or in another live request's
        prompt, about; for any thread."""
        found = bisect_left(
            marks, True, key=lambda mark: mark[1] not in self._count and self._coming.get(mark[1], 0) < 2
        )
        return marks[found - 1][0] + 1 if found else 0

    def since(self, cursor: Cursor | None) -> tuple[Cursor, PrefixChange | None]:
        """What changed since `cursor`, which another digest may have given; None: nothing."""
        with self._lock:
            now = Cursor(self._epoch, self._version)
            missed = self._version - cursor.version if cursor is not None and cursor.epoch == self._epoch else -1
            if missed == 0:
                return now, None
            if 0 < missed <= len(self._changes):
                changed = set(islice(self._changes, len(self._changes) - missed, None))
                present = {key for key in changed if key in self._count or key in self._coming}
                added, removed = list(present), list(changed - present)
            else:
                changed, added, removed = set(), list(self._count.keys() | self._coming.keys()), []
        return now, PrefixChange(whole=not changed, added=pack_keys(added), removed=pack_keys(removed))

    def _note(self, key: int) -> None:
        self._version += 1
        self._changes.append(key)
