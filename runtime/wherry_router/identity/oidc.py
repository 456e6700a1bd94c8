"""Tokens (JWT) of one OIDC issuer: https://openid.net/specs/openid-connect-discovery-1_0.html.

Keys come from the issuer that the router was told of and from nowhere else; nothing in a token becomes an address.
"""

import asyncio
import logging
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import jwt
import msgspec

from wherry_protocol.openai.errors import ApiError
from wherry_router.caller import Caller

log = logging.getLogger("wherry.router")

# Asymmetric only: with a shared secret the public key of one algorithm becomes the secret of another.
ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
REFRESH_S = 300.0
RETRY_S = 5.0
# Between two fetches, whatever key a token names.
MIN_GAP_S = 10.0
TIMEOUT_S = 5.0
MAX_DOCUMENT_BYTES = 1 << 20
MAX_KEYS = 100
LEEWAY_S = 30
MAX_REMEMBERED = 10_000
_TENANT = re.compile(r"[!-~]{1,128}")


class OidcSettings(msgspec.Struct, frozen=True, kw_only=True):
    """`issuer` as tokens name it in `iss`, `audience` in `aud`; the claim `tenant_claim` is the tenant's name."""

    issuer: str
    audience: str
    tenant_claim: str = "sub"


class IssuerError(Exception):
    """The issuer's documents cannot be had, or are not what they should be."""


def _invalid(message: str, code: str = "invalid_token") -> ApiError:
    return ApiError(401, code, message)


class Issuer:
    """Checks tokens. Belongs to the event loop that it is used in."""

    def __init__(
        self,
        settings: OidcSettings,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._wall = wall
        self._keys: dict[str, dict[str, Any]] | None = None  # by `kid`, as fetched; None: never fetched
        self._fetching: asyncio.Task[None] | None = None
        self._tried_at = float("-inf")
        self._down = False
        # What was checked: SHA-256 of the token → whose it is, and when that ends.
        self._known: OrderedDict[bytes, tuple[Caller, float]] = OrderedDict()

    @property
    def down(self) -> bool:
        """Whether the last fetch failed."""
        return self._down

    async def run(self) -> None:
        """Fetches the keys again and again, until cancelled."""
        while True:
            await self._refresh(0.0)
            await asyncio.sleep(RETRY_S if self._down else REFRESH_S)

    async def caller(self, token: bytes, digest: bytes) -> Caller:
        """Whose token this is; `digest` is its SHA-256.

        Raises:
            ApiError: 401, it is not valid; 403, it names no tenant; 503, there are no keys to check it with.
        """
        known = self._known.get(digest)
        if known is not None and known[1] > self._wall():
            return known[0]
        try:
            header = jwt.get_unverified_header(token)
        except (jwt.PyJWTError, ValueError, RecursionError):
            raise _invalid("This is neither an API key nor a token that is known here.", "invalid_api_key") from None
        algorithm, kid = header.get("alg"), header.get("kid", "")
        if algorithm not in ALGORITHMS or not isinstance(kid, str):
            raise _invalid("The token's algorithm is not one that is accepted here.")
        claims = self._decode(token, await self._key(kid), algorithm)
        caller = self._caller(claims)
        self._remember(digest, caller, float(claims["exp"]) + LEEWAY_S)
        return caller

    async def _key(self, kid: str) -> dict[str, Any]:
        if (found := self._find(kid)) is None:
            await self._refresh(MIN_GAP_S if self._keys is not None else RETRY_S)
            found = self._find(kid)
        if found is not None:
            return found
        if self._keys is None:
            raise ApiError(
                503, "issuer_unreachable", "Tokens cannot be checked: their issuer does not answer.", retry_after_s=5
            )
        raise _invalid("The token is signed with a key that its issuer does not have.")

    def _find(self, kid: str) -> dict[str, Any] | None:
        keys = self._keys or {}
        # An issuer with one key need not name it.
        return next(iter(keys.values())) if not kid and len(keys) == 1 else keys.get(kid)

    def _decode(self, token: bytes, key: dict[str, Any], algorithm: str) -> dict[str, Any]:
        if key.get("alg", algorithm) != algorithm:
            raise _invalid("The token is signed by another algorithm than its key is for.")
        try:
            return jwt.decode(
                token,
                jwt.PyJWK(key, algorithm),
                algorithms=[algorithm],
                audience=self._settings.audience,
                issuer=self._settings.issuer,
                leeway=LEEWAY_S,
                options={"require": ["exp", "iss", "aud"]},
            )
        except jwt.ExpiredSignatureError:
            raise _invalid("The token has expired.", "token_expired") from None
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError) as error:
            # The class only: messages quote what the token says.
            raise _invalid(f"The token is not valid here ({type(error).__name__.removesuffix('Error')}).") from None

    def _caller(self, claims: dict[str, Any]) -> Caller:
        claim = self._settings.tenant_claim
        tenant, subject = claims.get(claim), claims.get("sub")
        if not isinstance(tenant, str) or not _TENANT.fullmatch(tenant):
            raise ApiError(403, "tenant_missing", f"The token's claim `{claim}` does not name a tenant.")
        named = isinstance(subject, str) and _TENANT.fullmatch(subject)
        return Caller(tenant=tenant, key=f"{tenant}/{subject}" if named and subject != tenant else tenant)

    def _remember(self, digest: bytes, caller: Caller, until: float) -> None:
        self._known[digest] = caller, until
        if len(self._known) > MAX_REMEMBERED:
            self._known.popitem(last=False)

    async def _refresh(self, min_gap_s: float) -> None:
        """Fetches, unless that was just tried. Whoever wants it at the same time waits for the same fetch."""
        if self._fetching is None:
            if self._clock() - self._tried_at < min_gap_s:
                return
            self._tried_at = self._clock()
            self._fetching = asyncio.create_task(self._fetch())
            self._fetching.add_done_callback(self._fetched)
        await asyncio.shield(self._fetching)

    def _fetched(self, _: asyncio.Task[None]) -> None:
        self._fetching = None

    async def _fetch(self) -> None:
        try:
            keys = await fetch_keys(self._settings.issuer)
        except IssuerError as error:
            self._failed(str(error))
            return
        if self._down or self._keys is None:
            log.info("the issuer's keys are fetched", extra={"fields": {"keys": len(keys)}})
        if keys != self._keys:
            # A key that the issuer gave up takes its tokens with it.
            self._known.clear()
        self._keys, self._down = keys, False

    def _failed(self, why: str) -> None:
        if not self._down:
            kept = "none yet" if self._keys is None else f"{len(self._keys)} stay in use"
            log.error(f"the issuer's keys cannot be fetched; {kept}", extra={"fields": {"why": why}})
        self._down = True


async def fetch_keys(issuer: str) -> dict[str, dict[str, Any]]:
    """The issuer's public keys for signatures, by `kid`.

    Raises:
        IssuerError: they cannot be had.
    """
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    try:
        async with aiohttp.ClientSession(timeout=timeout) as session:
            about = await _document(session, issuer.rstrip("/") + "/.well-known/openid-configuration")
            if about.get("issuer") != issuer:
                raise IssuerError("its discovery document names another issuer")
            url = about.get("jwks_uri")
            if not isinstance(url, str) or urlsplit(url).scheme not in {"https", urlsplit(issuer).scheme}:
                raise IssuerError("its `jwks_uri` is no URL, or is http though the issuer is https")
            found = (await _document(session, url)).get("keys")
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, msgspec.MsgspecError) as error:
        raise IssuerError(f"{type(error).__name__}: {error}"[:300]) from None
    if not isinstance(found, list) or len(found) > MAX_KEYS:
        raise IssuerError(f"its key set is no list, or has more than {MAX_KEYS} keys")
    fit = [key for key in found if isinstance(key, dict) and key.get("use", "sig") == "sig" and key.get("kty") != "oct"]
    return {str(key.get("kid", "")): key for key in fit}


async def _document(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    async with session.get(url, allow_redirects=False) as response:
        if response.status != 200:
            raise IssuerError(f"{url} answered {response.status}")
        body = b""
        async for part in response.content.iter_any():
            body += part
            if len(body) > MAX_DOCUMENT_BYTES:
                raise IssuerError(f"{url} is larger than {MAX_DOCUMENT_BYTES} bytes")
    return msgspec.json.decode(body, type=dict[str, Any])
