"""Who may pass: every path that is not open asks for a key or a token, and nothing but those of this router will do."""

from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING

from wherry_protocol.http.asgi import Scope, header
from wherry_protocol.openai.errors import unauthorized
from wherry_protocol.watched import Watched, listed, read
from wherry_router.caller import ANYBODY, Caller
from wherry_router.identity.keys import KeysError, KeySet, hash_of, read_keys

if TYPE_CHECKING:
    from wherry_router.identity.oidc import Issuer

MAX_CREDENTIAL_BYTES = 16 * 1024


class KeyFiles:
    """The keys at `path`: a directory, as a Secret's volume, or one file."""

    def __init__(self, path: Path) -> None:
        self.keys = KeySet()
        self._path = path
        self.watched = Watched("API keys", [path], self._load, self._use, (KeysError,))
        self.watched.start()

    def _load(self) -> KeySet:
        return read_keys((file.name, read(file)) for file in listed(self._path))

    def _use(self, keys: KeySet) -> None:
        self.keys = keys

    def unready(self) -> str | None:
        """Why nobody has a key yet."""
        if self.watched.loaded:
            return None
        return f"the API keys cannot be used: {self.watched.problem or 'they are being written'}"


class Gate:
    """Tells who a request is from.

    Paths are compared as the raw bytes that the client sent, the same bytes that routing looks at. What a client sends
    is hashed, and the hash is looked up: how long that takes says nothing about any key.
    """

    def __init__(
        self,
        open_paths: frozenset[bytes],
        api_key: str | None = None,
        files: KeyFiles | None = None,
        issuer: "Issuer | None" = None,
    ) -> None:
        """`api_key`: one key for everybody, who then are nobody in particular. Without any of the three nobody is
        asked for anything."""
        self._open = open_paths
        self._single = KeySet({hash_of(api_key): ANYBODY} if api_key else None)
        self._files = files
        self._issuer = issuer
        self._asks = bool(api_key or files or issuer)

    async def identify(self, scope: Scope) -> Caller:
        """Whose request this is; anybody's on an open path.

        Raises:
            ApiError: 401, it may not pass; 503, that cannot be known now.
        """
        if not self._asks or scope["raw_path"] in self._open:
            return ANYBODY
        scheme, _, given = (header(scope, b"authorization") or b"").partition(b" ")
        credential = given.strip()
        if scheme.lower() != b"bearer" or not credential or len(credential) > MAX_CREDENTIAL_BYTES:
            raise unauthorized()
        digest = hash_of(credential)
        caller = self._single.find(digest)
        if caller is None and self._files is not None:
            caller = self._files.keys.find(digest)
        if caller is None and self._issuer is not None and credential.count(b".") == 2:
            caller = await self._issuer.caller(credential, digest)
        if caller is None:
            raise unauthorized()
        return caller

    def unready(self) -> str | None:
        """Why it could let nobody in who has the right to."""
        return self._files.unready() if self._files is not None else None

    def stale(self) -> dict[str, bool]:
        """For each source: whether it says something else than what is in use, since that cannot be used or had."""
        found = {}
        if self._files is not None:
            found["api_keys"] = self._files.watched.problem is not None
        if self._issuer is not None:
            found["issuer"] = self._issuer.down
        return found

    def followers(self) -> list[Coroutine[None, None, None]]:
        """What follows changes of keys. None of them ends."""
        found: list[Coroutine[None, None, None]] = []
        if self._files is not None:
            found.append(self._files.watched.run())
        if self._issuer is not None:
            found.append(self._issuer.run())
        return found
