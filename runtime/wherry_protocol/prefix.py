"""Keys of a prompt's beginnings: by these a router, which has no tokenizer, and a worker mean the same prefix.

A prompt is written out as bytes, and each whole chunk of them gets a 64-bit key that covers all chunks before it, the
model and the cache salt. Equal keys mean equal beginnings, up to chance: they only say where a prefix is likely to be
cached. What may be shared, the engine decides by 256-bit hashes of the tokens themselves.
"""

import hashlib
from array import array

from wherry_protocol.worker import Prompt

CHUNK_BYTES = 256
# What lies behind 256 KiB, some 64,000 tokens, no longer decides where a prompt is sent.
MAX_KEYS = 1024
_KEY_BYTES = 8


def written_out(prompt: Prompt) -> bytes:
    """A prompt's bytes: a conversation's next turn begins with those of the turn before."""
    if prompt.messages is not None:
        turns = [part for turn in prompt.messages for part in (turn.role, turn.name or "", turn.content)]
        return b"messages\0" + "\0".join(turns).encode("utf-8", "surrogatepass")
    if prompt.token_ids is not None:
        return b"token_ids\0" + array("I", prompt.token_ids).tobytes()
    return b"text\0" + (prompt.text or "").encode("utf-8", "surrogatepass")


def prefix_keys(text: bytes, model: str, salt: str = "") -> list[int]:
    """The keys of the whole chunks of `text`, as `written_out` gives it; at most `MAX_KEYS`."""
    digest = hashlib.blake2b(f"{model}\0{salt}".encode("utf-8", "surrogatepass"), digest_size=_KEY_BYTES).digest()
    keys = []
    for start in range(0, min(len(text), MAX_KEYS * CHUNK_BYTES) - CHUNK_BYTES + 1, CHUNK_BYTES):
        digest = hashlib.blake2b(digest + text[start : start + CHUNK_BYTES], digest_size=_KEY_BYTES).digest()
        keys.append(int.from_bytes(digest, "little"))
    return keys


def pack_keys(keys: list[int]) -> bytes:
    """Keys on the wire: eight bytes each, little-endian."""
    return b"".join([key.to_bytes(_KEY_BYTES, "little") for key in keys])


def unpack_keys(data: bytes) -> list[int]:
    """What `pack_keys` packed.

    Raises:
        ValueError: `data` is cut off within a key.
    """
    if len(data) % _KEY_BYTES:
        raise ValueError(f"{len(data)} bytes are no whole number of keys")
    return [int.from_bytes(data[at : at + _KEY_BYTES], "little") for at in range(0, len(data), _KEY_BYTES)]
