"""A router that asks who its clients are, over its real socket: keys in a Secret's volume, tokens of an issuer."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from tests.router.harness import Mock, Process, chat, eventually, mock_worker, post, router, script
from tests.router.issuer import Issuer
from tests.router.test_bounds import HOSTS, PATHS, is_openai_error, raw, request
from tests.router.volume import Volume

ALICE, BOB = "wk-alice-0123456789abcdef", "wk-bob-0123456789abcdef"
SPARE = "wk-spare-0123456789abcdef"
TOKEN = "worker-token-0123456789"
ENTRIES = {"alice": ALICE, "bob.yaml": f"key: {BOB}\ntenant: blue"}


class Front(NamedTuple):
    router: Process
    mock: Mock
    volume: Volume
    issuer: Issuer


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    with ExitStack() as stack:
        issuer = Issuer()
        stack.callback(issuer.die)
        issuer.add("one")
        volume = Volume(tmp_path_factory.mktemp("identity") / "keys", **ENTRIES)
        mock = stack.enter_context(mock_worker("a", "--token", TOKEN))
        args = ("--api-keys", str(volume.path), "--oidc-issuer", issuer.url, "--oidc-audience", "wherry")
        process = stack.enter_context(router(mock.url, args=args, env={"WHERRY_WORKER_TOKEN": TOKEN}))
        yield Front(process, mock, volume, issuer)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def status(front: Front, key: str) -> int:
    return post(front.router.url, chat("hello"), headers=bearer(key)).status_code


def test_keys_and_tokens_open_the_door(front: Front) -> None:
    for key in (ALICE, BOB, front.issuer.token("one")):
        assert status(front, key) == 200
        assert httpx.get(front.router.url + "/v1/models", headers=bearer(key)).status_code == 200


@pytest.mark.parametrize("key", ["", "alice", ALICE[:-1], ALICE + "x", ALICE.upper(), "a.b.c", "x" * 20_000, TOKEN])
def test_everything_else_is_a_401_in_openais_shape(front: Front, key: str) -> None:
    for response in (
        post(front.router.url, chat("hello"), headers=bearer(key) if key else {}),
        httpx.get(front.router.url + "/nope", headers={"Authorization": key}),
        httpx.get(front.router.url + "/docs", headers={"Authorization": f"Basic x{key}"}),
    ):
        assert response.status_code == 401
        assert is_openai_error(response.content)
        assert response.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("host", HOSTS)
def test_no_path_and_no_host_gets_past_the_keys(front: Front, host: str) -> None:
    for path in [*PATHS, "/internal/usage", "/internal/replicas", "/metrics/../v1/models", "/healthz%2f..%2fv1/models"]:
        got, body = raw(front.router.url, request("GET", path, host))
        assert got in (400, 401), (path, host, got)
        assert is_openai_error(body)


def test_who_may_not_pass_is_told_so_before_a_body_is_read(front: Front) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 10000000000\r\n\r\n"
    got, body = raw(front.router.url, head + b"{" * 1000)
    assert got == 401
    assert is_openai_error(body)


def test_clients_keys_open_nothing_internal(front: Front) -> None:
    for path in ("/internal/replicas",):
        for key, expected in ((ALICE, 401), (front.issuer.token("one"), 401), (TOKEN, 200)):
            assert httpx.get(front.router.url + path, headers=bearer(key)).status_code == expected


@pytest.mark.parametrize("path", ["/health", "/healthz", "/readyz", "/metrics"])
def test_health_and_metrics_stay_open(front: Front, path: str) -> None:
    assert httpx.get(front.router.url + path).status_code == 200


def stale(front: Front) -> float:
    text = httpx.get(front.router.url + "/metrics").text
    line = next(line for line in text.splitlines() if line.startswith('wherry_router_stale{what="api_keys"}'))
    return float(line.split()[-1])


def test_keys_are_rotated_under_running_streams(front: Front) -> None:
    """To a new key, to something broken, and back; the stream that began with the old key goes on."""
    assert status(front, SPARE) == 401
    body = chat(script(tokens=3, hold_after=2, text="x"), stream=True)
    with httpx.stream("POST", front.router.url + "/v1/chat/completions", json=body, headers=bearer(ALICE)) as response:
        lines = response.iter_lines()
        assert "data: " in next(lines)
        front.volume.put(alice=SPARE, **{"bob.yaml": ENTRIES["bob.yaml"]})
        eventually(lambda: status(front, SPARE) == 200)
        assert status(front, ALICE) == 401
        assert "data: " in next(line for line in lines if line)
    assert stale(front) == 0
    front.volume.put(alice=ALICE, broken="short")
    eventually(lambda: stale(front) == 1)
    assert [status(front, key) for key in (SPARE, BOB, ALICE)] == [200, 200, 401]
    front.volume.put(**ENTRIES)
    eventually(lambda: status(front, ALICE) == 200)
    assert stale(front) == 0
    assert status(front, SPARE) == 401


def test_each_tenant_has_a_salt_of_its_own(front: Front) -> None:
    salts = {}
    for name, key in {"alice": ALICE, "bob": BOB, "token of alice": front.issuer.token("one")}.items():
        before = len(front.mock.state()["cache_salts"])
        assert status(front, key) == 200
        salts[name] = front.mock.state()["cache_salts"][before:]
    assert salts["alice"] == salts["token of alice"] != salts["bob"]
    assert all(len(salt) == 1 and len(salt[0]) == 32 for salt in salts.values())


def test_no_secret_is_in_anything_that_the_router_says(front: Front) -> None:
    token = front.issuer.token("one")
    wrong = "wk-wrong-0123456789abcdef"
    for key in (ALICE, BOB, token, wrong):
        status(front, key)
    front.volume.put(alice=ALICE, **{"x.yaml": f"{SPARE}: 1", SPARE: "alice", "bob.yaml": ENTRIES["bob.yaml"]})
    eventually(lambda: stale(front) == 1)
    front.volume.put(**ENTRIES)
    eventually(lambda: stale(front) == 0)
    said = [front.router.log()]
    for path in ("/metrics", "/readyz", "/openapi.json", "/v1/models", "/internal/replicas", "/internal/usage"):
        for key in (ALICE, TOKEN):
            response = httpx.get(front.router.url + path, headers=bearer(key))
            said.append(response.text + str(response.headers))
    for secret in (ALICE, BOB, SPARE, wrong, token, token.split(".")[2], TOKEN):
        assert not [text for text in said if secret in text], secret


def test_a_router_without_its_keys_is_not_ready_and_lets_nobody_in(tmp_path: Path, front: Front) -> None:
    with router(
        front.mock.url, args=("--api-keys", str(tmp_path / "keys")), env={"WHERRY_WORKER_TOKEN": TOKEN}
    ) as bare:
        ready = httpx.get(bare.url + "/readyz")
        assert (ready.status_code, ready.json()["error"]["code"]) == (503, "not_ready")
        assert "API keys" in ready.json()["error"]["message"]
        assert httpx.get(bare.url + "/v1/models", headers=bearer(ALICE)).status_code == 401
        Volume(tmp_path / "keys", alice=ALICE)
        eventually(lambda: httpx.get(bare.url + "/readyz").status_code == 200)
        assert httpx.get(bare.url + "/v1/models", headers=bearer(ALICE)).status_code == 200


def test_an_issuer_needs_an_audience() -> None:
    args = ["--endpoints", "http://127.0.0.1:1", "--model", "m", "--oidc-issuer", "https://issuer.example"]
    result = subprocess.run([sys.executable, "-m", "wherry_router", *args], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "--oidc-audience" in result.stderr


def cached(url: str, key: str, content: str) -> int:
    body = chat(content, max_tokens=1)
    usage = post(url, body, headers=bearer(key)).json()["usage"]
    return int((usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0))


def test_no_tenant_hits_what_another_has_cached(tmp_path: Path, tiny_worker: Process) -> None:
    """With the real engine: the second tenant's first time is as slow as if nobody had ever sent the prompt."""
    volume = Volume(tmp_path / "keys", **ENTRIES, **{"carol.yaml": f"key: {SPARE}\ntenant: blue"})
    prompt = f"{time.time_ns()} " + "A prompt that is long enough to fill several blocks of the cache. " * 4
    with router(tiny_worker.url, args=("--api-keys", str(volume.path))) as front:
        assert cached(front.url, ALICE, prompt) == 0
        assert cached(front.url, BOB, prompt) == 0
        assert cached(front.url, ALICE, prompt) > 0
        # Another key of the same tenant.
        assert cached(front.url, SPARE, prompt) > 0
