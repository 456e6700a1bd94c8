"""Blocks of the paged KV cache: who holds which, and which hold a known prefix.

A block is in one of two states: *held* by one or more requests (its reference count), or *free*. A free block may
still hold the keys and values of a known prefix; it is then handed out again last, least recently used first, and a
request with that prefix may take it back instead of computing it. Paging: Kwon et al., 2023
(https://arxiv.org/abs/2309.06180).
"""

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from wherry_runtime.scheduling.digest import PrefixDigest


class OutOfBlocksError(Exception):
    """Fewer blocks are free than were asked for; nothing was changed."""


class IntegrityError(Exception):
    """The block manager's books do not add up: a bug, never a user's fault."""


def extend_hashes(hashes: list[bytes], tokens: Sequence[int], block_size: int, salt: bytes) -> None:
    """Appends the hash of each further full block of `tokens` to `hashes`.

    A block's hash covers its tokens and its parent's hash, so equal hashes mean equal prefixes. BLAKE2b with 256 bits:
    nobody can craft a prompt that takes over another one's cache entry.
    """
    for index in range(len(hashes), len(tokens) // block_size):
        parent = hashes[index - 1] if index else hashlib.blake2b(salt, digest_size=32, person=b"wherry-salt").digest()
        content = array("q", tokens[index * block_size : (index + 1) * block_size]).tobytes()
        hashes.append(hashlib.blake2b(parent + content, digest_size=32).digest())


class BlockManager:
    """Reference counts, the free list and the prefix index of `num_blocks` blocks of `block_size` tokens."""

    def __init__(self, num_blocks: int, block_size: int, prefix_cache: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self.digest = PrefixDigest()
        self._references = [0] * num_blocks
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        # Taken from the front: blocks with nothing worth keeping, then the least recently used.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated, those with a known prefix included."""
        return len(self._free)

    def is_free(self, block: int) -> bool:
        """Whether nobody holds `block`."""
        return not self._references[block]

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks `num_tokens` tokens need."""
        return -(-num_tokens // self.block_size)

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks that hold the longest known prefix. Changes nothing."""
        blocks = []
        for digest in hashes:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_free_among(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` nobody holds: sharing them takes them off the free list."""
        return sum(1 for block in blocks if not self._references[block])

    def num_held_only_by(self, tables: Iterable[Iterable[int]]) -> int:
        """How many blocks would be free if the holders of `tables` gave them back."""
        held = Counter(block for table in tables for block in table)
        return sum(1 for block, references in held.items() if self._references[block] == references)

    def share(self, blocks: Iterable[int]) -> None:
        """Holds blocks that `match` found once more."""
        for block in blocks:
            if not self._references[block]:
                del self._free[block]
            self._references[block] += 1

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with a reference each; what they held is forgotten.

        Raises:
            OutOfBlocksError: fewer are free.
        """
        if count > len(self._free):
            raise OutOfBlocksError(f"{count} blocks asked for, {len(self._free)} free")
        blocks = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            if (digest := self._hash_of.pop(block, None)) is not None:
                del self._block_of[digest]
                self.digest.drop(digest)
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def release(self, blocks: Sequence[int], hashes: Sequence[bytes] = ()) -> None:
        """Gives one reference of each block back, the last first: a prefix outlives what followed it.

        `hashes`, of the leading blocks, count as used now, too. Where two requests computed one prefix at the same time
        only one's blocks are known; they must not be evicted before the blocks that follow the other's.
        """
        for index in range(len(blocks) - 1, -1, -1):
            block = blocks[index]
            if self._references[block] <= 0:
                raise IntegrityError(f"block {block} is released but nobody holds it")
            self._references[block] -= 1
            if not self._references[block]:
                self._free[block] = None
                if block not in self._hash_of:
                    self._free.move_to_end(block, last=False)
            if index < len(hashes):
                known = self._block_of.get(hashes[index], block)
                if known != block and not self._references[known]:
                    self._free.move_to_end(known)

    def register(self, block: int, digest: bytes) -> None:
        """`block` now holds the prefix `digest`. The first block to hold a prefix stays its block."""
        if self.prefix_cache and digest not in self._block_of and block not in self._hash_of:
            self._block_of[digest] = block
            self._hash_of[block] = digest

    def mark(self, digest: bytes, key: int) -> None:
        """Routers know the prefix `digest` by `key`."""
        if digest in self._block_of:
            self.digest.tie(digest, key)

    def forget(self, blocks: Iterable[int]) -> None:
        """Takes blocks out of the prefix index: their content is not to be trusted."""
        for block in blocks:
            if (digest := self._hash_of.pop(block, None)) is not None:
                del self._block_of[digest]
                self.digest.drop(digest)

    def check_integrity(self, held: Iterable[Sequence[int]]) -> None:
        """Checks every invariant against the block tables of all live requests.

        Raises:
            IntegrityError: naming the first one that does not hold.
        """
        expected = Counter(block for table in held for block in table)
        for block, references in enumerate(self._references):
            if references != expected[block]:
                raise IntegrityError(f"block {block} has {references} references, {expected[block]} requests hold it")
            if (block in self._free) != (references == 0):
                raise IntegrityError(f"block {block} has {references} references and is free: {block in self._free}")
        if {d: b for b, d in self._hash_of.items()} != self._block_of:
            raise IntegrityError("the prefix index and its inverse differ")
