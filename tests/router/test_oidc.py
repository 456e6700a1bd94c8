"""Tokens of an issuer that really serves its keys. The router's code runs here, its clock is ours."""

import asyncio
import base64
import hashlib
import hmac
import json
import time
from collections.abc import Iterator
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from tests.router.harness import eventually
from tests.router.issuer import Issuer

from wherry_protocol.openai.errors import ApiError
from wherry_router.caller import Caller
from wherry_router.identity.oidc import MIN_GAP_S, OidcSettings
from wherry_router.identity.oidc import Issuer as Checks


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    issuer = Issuer()
    issuer.add("one")
    yield issuer
    issuer.die()


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def checks(issuer: Issuer, clock: Clock | None = None, **settings: str) -> Checks:
    given = {"issuer": issuer.url, "audience": "wherry"} | settings
    return Checks(OidcSettings(**given), clock or Clock())


async def caller(checks: Checks, token: str) -> Caller:
    return await checks.caller(token.encode(), hashlib.sha256(token.encode()).digest())


async def refusal(checks: Checks, token: str) -> tuple[int, str]:
    with pytest.raises(ApiError) as caught:
        await caller(checks, token)
    assert token not in caught.value.message
    return caught.value.status, caught.value.code


async def test_a_token_names_its_tenant(issuer: Issuer) -> None:
    issuer.add("two", "RSA")
    assert await caller(checks(issuer), issuer.token("one")) == Caller(tenant="alice", key="alice")
    by_team = checks(issuer, tenant_claim="team")
    assert await caller(by_team, issuer.token("two", team="blue")) == Caller(tenant="blue", key="blue/alice")
    for algorithm in ("RS512", "PS256"):
        assert (await caller(by_team, issuer.token("two", algorithm=algorithm, team="blue"))).tenant == "blue"


def _part(value: Any) -> str:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def unsigned(issuer: Issuer) -> str:
    _, claims, _ = issuer.token("one").split(".")
    return f"{_part({'alg': 'none', 'kid': 'one'})}.{claims}."


def signed_with_the_public_key(issuer: Issuer) -> str:
    """What opens the door of those who let the token choose between RSA and HMAC."""
    issuer.add("rsa", "RSA")
    form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    public = issuer.keys["rsa"].public_key().public_bytes(*form)

    claims = {"iss": issuer.url, "aud": "wherry", "sub": "root", "exp": int(time.time()) + 600}
    text = f"{_part({'alg': 'HS256', 'kid': 'rsa'})}.{_part(claims)}"
    return f"{text}.{_part(hmac.new(public, text.encode(), hashlib.sha256).digest())}"


def signed_by_another(issuer: Issuer) -> str:
    other = Issuer()
    other.add("one")
    other.die()
    return issuer.token("one", key=other.keys["one"])


def changed(issuer: Issuer) -> str:
    head, body, signature = issuer.token("one").split(".")
    claims = json.loads(base64.urlsafe_b64decode(body + "=="))
    claims["sub"] = "root"
    forged = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
    return f"{head}.{forged}.{signature}"


REFUSED = {
    "expired": (lambda i: i.token("one", exp=int(time.time()) - 60), 401, "token_expired"),
    "never expires": (lambda i: i.token("one", exp=None), 401, "invalid_token"),
    "not valid yet": (lambda i: i.token("one", nbf=int(time.time()) + 600), 401, "invalid_token"),
    "for another audience": (lambda i: i.token("one", aud="other"), 401, "invalid_token"),
    "for nobody": (lambda i: i.token("one", aud=None), 401, "invalid_token"),
    "of another issuer": (lambda i: i.token("one", iss="http://evil"), 401, "invalid_token"),
    "unsigned": (unsigned, 401, "invalid_token"),
    "HMAC with the public key": (signed_with_the_public_key, 401, "invalid_token"),
    "signed by another": (signed_by_another, 401, "invalid_token"),
    "changed": (changed, 401, "invalid_token"),
    "unknown key": (lambda i: i.token("nine", key=i.keys["one"]), 401, "invalid_token"),
    "no token": (lambda _: "a.b.c", 401, "invalid_api_key"),
    "no tenant": (lambda i: i.token("one", sub=None), 403, "tenant_missing"),
    "a tenant with a line's end": (lambda i: i.token("one", sub="a\nb"), 403, "tenant_missing"),
}


@pytest.mark.parametrize("make, status, code", REFUSED.values(), ids=REFUSED)
async def test_what_is_refused(issuer: Issuer, make: Any, status: int, code: str) -> None:
    assert await refusal(checks(issuer), make(issuer)) == (status, code)


ODD_HEADERS = [
    b"{}",
    b"[]",
    b"[" * 9000,
    b'{"alg": 5, "kid": "one"}',
    b'{"alg": "ES256", "kid": ["one"]}',
    b'{"alg": "ES256", "kid": "one", "b64": false, "crit": ["b64"]}',
    b'{"alg": "ES256", "kid": "one", "jku": "http://127.0.0.1:1/keys", "jwk": {"kty": "oct", "k": "AA"}}',
    b'{"alg": "ES256", "kid": "' + b"\xff" * 10 + b'"}',
    b'{"alg": "none"}',
    b"",
]


@pytest.mark.parametrize("head", ODD_HEADERS, ids=range(len(ODD_HEADERS)))
async def test_odd_heads_are_refused_like_all_others(issuer: Issuer, head: bytes) -> None:
    _, claims, signature = issuer.token("one").split(".")
    check = checks(issuer)
    await caller(check, issuer.token("one"))
    status, code = await refusal(check, f"{_part(head)}.{claims}.{signature}")
    assert (status, code) in {(401, "invalid_token"), (401, "invalid_api_key")}


@pytest.mark.parametrize("claim", [{"exp": 1e308}, {"exp": "soon"}, {"nbf": "x"}, {"iat": []}, {"aud": 5}, {"iss": []}])
async def test_odd_claims_are_refused_though_signed(issuer: Issuer, claim: dict[str, Any]) -> None:
    head, body, _ = issuer.token("one").split(".")
    claims = json.loads(base64.urlsafe_b64decode(body + "==")) | claim
    # Signed by hand, as the library would not.
    text = f"{head}.{_part(claims)}"
    signature = jwt.algorithms.ECAlgorithm(jwt.algorithms.ECAlgorithm.SHA256, ec.SECP256R1).sign(
        text.encode(), issuer.keys["one"]
    )
    check = checks(issuer)
    if claim == {"exp": 1e308}:
        assert (await caller(check, f"{text}.{_part(signature)}")).tenant == "alice"
    else:
        assert (await refusal(check, f"{text}.{_part(signature)}"))[0] == 401


async def test_a_key_of_another_kind_than_the_token_says_is_no_crash(issuer: Issuer) -> None:
    issuer.add("rsa", "RSA")
    token = issuer.token("one", key=issuer.keys["rsa"])
    assert await refusal(checks(issuer), token) == (401, "invalid_token")


async def test_a_key_is_for_the_algorithm_that_its_issuer_says(issuer: Issuer) -> None:
    issuer.add("rsa", "RSA")
    issuer.algorithm = "RS256"
    assert (await caller(checks(issuer), issuer.token("rsa"))).tenant == "alice"
    assert await refusal(checks(issuer), issuer.token("rsa", algorithm="PS256")) == (401, "invalid_token")


async def test_keys_are_exchanged_and_unknown_ones_fetch_nothing_twice(issuer: Issuer) -> None:
    clock = Clock()
    check = checks(issuer, clock)
    old = issuer.token("one")
    await caller(check, old)
    del issuer.keys["one"]
    issuer.add("two")
    fresh = issuer.token("two")
    # Just fetched: whoever invents key names must not make us ask all the time.
    for _ in range(50):
        assert await refusal(check, fresh) == (401, "invalid_token")
    assert issuer.hits["/keys"] == 1
    clock.now += MIN_GAP_S
    results = await asyncio.gather(*(caller(check, issuer.token("two", sub=f"user-{n}")) for n in range(20)))
    assert {c.tenant for c in results} == {f"user-{n}" for n in range(20)}
    assert issuer.hits["/keys"] == 2
    # The issuer gave the old key up: its tokens, checked before or not, are over.
    assert await refusal(check, old) == (401, "invalid_token")


async def test_an_issuer_that_dies_takes_nobody_with_it_who_has_its_keys(issuer: Issuer) -> None:
    clock = Clock()
    check = checks(issuer, clock)
    await caller(check, issuer.token("one"))
    issuer.die()
    clock.now += 1000
    assert (await caller(check, issuer.token("one", sub="bob"))).tenant == "bob"
    assert await refusal(check, issuer.token("two", key=issuer.keys["one"])) == (401, "invalid_token")
    assert check.down
    # One that never had them cannot know.
    blind = checks(issuer, clock)
    assert await refusal(blind, issuer.token("one")) == (503, "issuer_unreachable")
    back = Issuer(issuer.port)
    back.keys = issuer.keys
    try:
        clock.now += MIN_GAP_S
        assert (await caller(blind, issuer.token("one"))).tenant == "alice"
        assert not blind.down
    finally:
        back.die()


async def test_only_the_issuer_itself_is_believed(issuer: Issuer) -> None:
    issuer.named = "http://evil"
    assert await refusal(checks(issuer), issuer.token("one")) == (503, "issuer_unreachable")


async def test_a_token_that_was_checked_is_refused_once_it_has_expired(issuer: Issuer) -> None:
    wall = Clock()
    wall.now = time.time()
    check = Checks(OidcSettings(issuer=issuer.url, audience="wherry"), Clock(), wall)
    token = issuer.token("one", exp=int(wall.now) - 29)
    assert (await caller(check, token)).tenant == "alice"
    # Within the leeway of 30 s; what was remembered must not outlive it.
    await asyncio.to_thread(eventually, lambda: time.time() > wall.now + 2)
    wall.now = time.time()
    assert await refusal(check, token) == (401, "token_expired")
