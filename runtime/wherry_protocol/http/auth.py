"""Bearer tokens. Tokens are hashed before they are compared, so that the comparison's time says nothing about them."""

import hashlib
import hmac
import ipaddress

from wherry_protocol.http.asgi import Scope, header


class TokenGuard:
    """Lets a request through when its path is open or it carries the token. Everything not named open is closed.

    Paths are compared as the raw bytes that the client sent, the same bytes that routing looks at.
    """

    def __init__(self, token: str | None, open_paths: frozenset[bytes]) -> None:
        self._digest = None if not token else hashlib.sha256(token.encode()).digest()
        self._open = open_paths

    def allows(self, scope: Scope) -> bool:
        """Whether this request may go on."""
        if self._digest is None or scope["raw_path"] in self._open:
            return True
        scheme, _, given = (header(scope, b"authorization") or b"").partition(b" ")
        same = hmac.compare_digest(hashlib.sha256(given.strip()).digest(), self._digest)
        return same and scheme.lower() == b"bearer"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
