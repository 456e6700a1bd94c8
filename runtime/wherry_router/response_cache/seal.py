"""What leaves the router to be kept elsewhere is sealed: nobody reads, changes or exchanges it there."""

import hashlib
import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_SALT = 16
_TAG = 16
# Each message has a key of its own, so the nonce may be the same.
_NONCE = bytes(12)


class Seal:
    """Seals with what the routers of a deployment share and nobody else knows: `secret`, their worker token."""

    def __init__(self, secret: str | None) -> None:
        self._key = hashlib.sha256(b"wherry-response-cache\0" + (secret or "").encode()).digest()

    def name(self, name: bytes) -> str:
        """What to call it there: always the same, and nobody can tell what it stands for by trying."""
        return hashlib.blake2b(name, key=self._key, digest_size=20).hexdigest()

    def close(self, name: bytes, plain: bytes) -> bytes:
        """`plain`, to be opened under the same name only."""
        salt = os.urandom(_SALT)
        return salt + self._cipher(salt).encrypt(_NONCE, plain, name)

    def open(self, name: bytes, sealed: bytes) -> bytes | None:
        """What was sealed under `name`; None: it was not, or not with this secret."""
        if len(sealed) < _SALT + _TAG:
            return None
        try:
            return self._cipher(sealed[:_SALT]).decrypt(_NONCE, sealed[_SALT:], name)
        except InvalidTag:
            return None

    def _cipher(self, salt: bytes) -> AESGCM:
        return AESGCM(hashlib.blake2b(salt, key=self._key, digest_size=32).digest())
