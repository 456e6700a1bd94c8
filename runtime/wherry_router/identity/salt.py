"""What keeps tenants' cached prefixes apart.

With one cache for all, how fast an answer begins tells whether somebody has sent its prompt before.
"""

import functools
import hashlib
import hmac


class Salts:
    """A tenant's salt: the same on every router of a deployment, and after a restart; nobody else can compute it.

    `secret`: what the routers of a deployment share and clients do not know.
    """

    def __init__(self, secret: str | None) -> None:
        key = hashlib.sha256(b"wherry-cache-salt\0" + (secret or "").encode()).digest()

        @functools.lru_cache(maxsize=4096)
        def of(tenant: str) -> str:
            return hmac.new(key, tenant.encode(), hashlib.sha256).hexdigest()[:32] if tenant else ""

        self.of = of
