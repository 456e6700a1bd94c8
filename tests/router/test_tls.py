"""TLS on the router's socket: the certificate is exchanged while connections and streams go on."""

import socket
import ssl
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import httpx
import pytest
from cryptography import x509
from tests.router.certificates import Pair, pair
from tests.router.harness import Process, chat, eventually, mock_worker, router, script, sse
from tests.router.volume import Volume


class Front(NamedTuple):
    router: Process
    volume: Volume
    first: Pair


def entries(found: Pair) -> dict[str, str]:
    return {"tls.crt": found.cert, "tls.key": found.key}


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    with ExitStack() as stack:
        first = pair()
        volume = Volume(tmp_path_factory.mktemp("tls") / "tls", **entries(first))
        mock = stack.enter_context(mock_worker("a"))
        args = ("--tls-cert", str(volume.path / "tls.crt"), "--tls-key", str(volume.path / "tls.key"))
        yield Front(stack.enter_context(router(mock.url, args=args)), volume, first)


def trusting(*pairs: Pair) -> ssl.SSLContext:
    return ssl.create_default_context(cadata="".join(p.cert for p in pairs))


def serial(front: Front, name: str | None = None) -> int:
    """Of the certificate that a new connection gets."""
    address = urlsplit(front.router.url)
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    plain = socket.create_connection((address.hostname, address.port), timeout=10)
    with plain, context.wrap_socket(plain, server_hostname=name) as secure:
        return x509.load_der_x509_certificate(secure.getpeercert(True) or b"").serial_number


def metric(front: Front, name: str, context: ssl.SSLContext) -> float:
    text = httpx.get(front.router.url + "/metrics", verify=context).text
    return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


def test_whoever_trusts_the_certificate_is_answered(front: Front) -> None:
    assert front.router.url.startswith("https://")
    with httpx.Client(verify=trusting(front.first)) as client:
        response = client.post(front.router.url + "/v1/chat/completions", json=chat("hello"))
        assert response.status_code == 200
    with pytest.raises(httpx.ConnectError):
        httpx.get(front.router.url + "/healthz", verify=trusting(pair()))
    assert serial(front) == serial(front, "localhost") == front.first.serial
    assert metric(front, "wherry_router_tls_not_after_seconds", trusting(front.first)) == front.first.not_after


def test_what_is_no_tls_or_an_old_one_gets_nothing(front: Front) -> None:
    address = urlsplit(front.router.url)
    for data in (b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", b"\x00" * 100, b"\x16\x03\x01\xff\xff" + b"x" * 200):
        with socket.create_connection((address.hostname, address.port), timeout=10) as plain:
            plain.sendall(data)
            plain.shutdown(socket.SHUT_WR)
            assert b"HTTP/1.1 200" not in plain.recv(65536)
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.set_ciphers("DEFAULT@SECLEVEL=0")
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        old.maximum_version = ssl.TLSVersion.TLSv1_1
        old.minimum_version = ssl.TLSVersion.TLSv1
    plain = socket.create_connection((address.hostname, address.port), timeout=10)
    with plain, pytest.raises(ssl.SSLError, match=r"PROTOCOL_VERSION|EOF"):
        old.wrap_socket(plain)
    assert httpx.get(front.router.url + "/healthz", verify=trusting(front.first)).status_code == 200


def test_the_certificate_is_exchanged_under_a_running_stream(front: Front) -> None:
    second, third = pair(), pair()
    body = chat(script(tokens=400, pause_s=0.02, text="x"), stream=True)
    with httpx.Client(verify=trusting(front.first), timeout=60) as client:
        with client.stream("POST", front.router.url + "/v1/chat/completions", json=body) as response:
            chunks = sse(response)
            next(chunks)
            front.volume.put(**entries(second))
            eventually(lambda: serial(front) == second.serial)
            assert serial(front, "localhost") == second.serial
            # A pair that is none: what is in use stays.
            front.volume.put(**{"tls.crt": third.cert, "tls.key": second.key})
            eventually(lambda: metric(front, 'wherry_router_stale{what="tls"}', trusting(second)) == 1)
            assert serial(front) == second.serial
            front.volume.put(**entries(third))
            eventually(lambda: serial(front) == third.serial)
            assert metric(front, 'wherry_router_stale{what="tls"}', trusting(third)) == 0
            assert metric(front, "wherry_router_tls_not_after_seconds", trusting(third)) == third.not_after
            rest = list(chunks)
        assert rest[-1] == {}
        assert sum(bool(c["choices"][0]["delta"].get("content")) for c in rest if c) >= 398
        # And the connection from before any of it is still good.
        assert client.get(front.router.url + "/healthz").status_code == 200
    front.volume.put(**entries(front.first))
    eventually(lambda: serial(front) == front.first.serial)
    for secret in (front.first.key, second.key, third.key):
        assert secret.splitlines()[1] not in front.router.log()


UNUSABLE = {
    "no files": ({}, "No such file"),
    "a pair that is none": ({"tls.crt": pair().cert, "tls.key": pair().key}, "MISMATCH"),
    "no PEM": ({"tls.crt": "hello", "tls.key": "hello"}, "PEM"),
    "an encrypted key": (entries(pair(b"secret")), "encrypted"),
}


@pytest.mark.parametrize("files, message", UNUSABLE.values(), ids=UNUSABLE)
def test_a_router_that_cannot_listen_with_tls_does_not_listen(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    args = ["--endpoints", "http://127.0.0.1:1", "--model", "m", "--port", "0", "--tls-cert", str(tmp_path / "tls.crt")]
    command = [sys.executable, "-m", "wherry_router", *args, "--tls-key", str(tmp_path / "tls.key")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1]
    assert "PRIVATE KEY" not in result.stderr
