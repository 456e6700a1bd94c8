"""Mutual TLS between a router and its workers: processes, sockets and certificates are real."""

import signal
import socket
import ssl
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import pytest
from cryptography import x509
from tests.router.certificates import WORKERS, Authority
from tests.router.harness import (
    Mock,
    Process,
    chat,
    eventually,
    mock_worker,
    post,
    router,
    script,
    sse,
    stream,
    text_of,
    worker,
)
from tests.router.test_resume import Reader, expected, numbers
from tests.router.volume import Volume

from wherry_protocol.http.mutual_tls import ends_of
from wherry_router.fault import WorkerFault
from wherry_router.pool import Endpoint, Replica
from wherry_router.settings import Limits
from wherry_router.upstream import Upstream
from wherry_router.worker_tls import WorkerTls

OURS, OTHER, NOBODYS = Authority(), Authority("other"), Authority("nobody's")
TRUSTED = OURS.cert + OTHER.cert


class Both(NamedTuple):
    """A router in front of one mock worker, each with a volume of its own, as two pods have."""

    router: Process
    mock: Mock
    front: Volume
    back: Volume


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    path = tmp_path_factory.mktemp("tls")
    front, back = (Volume(path / name, **OURS.secret(ca=TRUSTED)) for name in ("front", "back"))
    with ExitStack() as stack:
        mock = stack.enter_context(mock_worker("a", "--tls", str(back.path), "--tls-name", WORKERS))
        args = ("--worker-tls", str(front.path), "--worker-tls-name", WORKERS, "--no-replica-wait-s", "0.5")
        yield Both(stack.enter_context(router(mock.url, args=args)), mock, front, back)


def replica(url: str) -> Replica:
    return Replica(Endpoint(url, url), Limits())


def client_of(authority: Authority, secret: dict[str, str] | None = None) -> ssl.SSLContext:
    """A client with a certificate of `authority`."""
    found = secret or authority.secret()
    return ends_of({entry: text.encode() for entry, text in found.items()}, WORKERS).router


def unchecked(versions: tuple[ssl.TLSVersion, ssl.TLSVersion] | None = None) -> ssl.SSLContext:
    """A client that takes any server, and shows no certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if versions:
        context.set_ciphers("DEFAULT@SECLEVEL=0")
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            context.minimum_version, context.maximum_version = versions
    return context


def answered(url: str, context: ssl.SSLContext | None) -> bool:
    """Whether a worker answers a client that comes with `context`; None: without TLS."""
    address = urlsplit(url)
    try:
        with socket.create_connection((address.hostname, address.port), timeout=10) as plain:
            connection = plain if context is None else context.wrap_socket(plain, server_hostname=WORKERS)
            with connection:
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                return b"HTTP/" in connection.recv(65536)
    except (ssl.SSLError, ConnectionError):
        return False


def serial(url: str) -> int:
    """Of the certificate that a new connection gets, whoever opens it."""
    address = urlsplit(url)
    plain = socket.create_connection((address.hostname, address.port), timeout=10)
    with plain, unchecked().wrap_socket(plain, server_hostname=WORKERS) as secure:
        return x509.load_der_x509_certificate(secure.getpeercert(True) or b"").serial_number


def metric(front: Both, name: str) -> float:
    text = httpx.get(front.router.url + "/metrics").text
    return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


def test_answers_and_streams_pass(both: Both) -> None:
    assert both.mock.url.startswith("https://")
    answer = post(both.router.url, chat("hello"))
    assert answer.status_code == 200
    assert "a|hello|" in answer.text
    assert text_of(stream(both.router.url, script(tokens=5, text="x"))) == "xxxxx"
    assert answered(both.mock.url, client_of(OURS))
    assert metric(both, "wherry_router_worker_tls_not_after_seconds") > 0


STRANGERS = {
    "without TLS": None,
    "without a certificate": unchecked(),
    "with one of another authority": client_of(NOBODYS, NOBODYS.secret(ca=NOBODYS.cert + OURS.cert)),
    "with TLS 1.2": unchecked((ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_2)),
    "with TLS 1.1": unchecked((ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1)),
}


@pytest.mark.parametrize("context", STRANGERS.values(), ids=STRANGERS)
def test_a_worker_answers_no_stranger(both: Both, context: ssl.SSLContext | None) -> None:
    assert not answered(both.mock.url, context)
    assert answered(both.mock.url, client_of(OURS)), "and it goes on"


def test_no_session_is_resumed(both: Both) -> None:
    """A resumed one would not be checked against the authorities of today."""
    context = client_of(OURS)
    address = urlsplit(both.mock.url)
    plain = socket.create_connection((address.hostname, address.port), timeout=10)
    with plain, context.wrap_socket(plain, server_hostname=WORKERS) as first:
        first.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        while first.recv(65536):
            pass
        assert first.session is None or not first.session.has_ticket


class Foreign(NamedTuple):
    """Two ends that do not accept one another: what each has, and what the router and the worker say of it."""

    front: Callable[[], dict[str, str]]
    back: Callable[[], dict[str, str]]
    fault: str
    said: str
    worker_said: str = ""


ELSE = "else-workers.default.svc"
FOREIGN = {
    "the worker is of another authority": Foreign(
        OURS.secret, OTHER.secret, "unreachable", "certificate is not accepted: self-signed certificate in"
    ),
    "the worker has another name": Foreign(
        OURS.secret, lambda: OURS.secret(ELSE), "unreachable", f"certificate is not valid for '{WORKERS}'"
    ),
    "the worker does not know the router's authority": Foreign(
        lambda: OTHER.secret(ca=TRUSTED),
        OURS.secret,
        "lost",
        "its log says whether it refused the certificate",
        "its certificate is not accepted: self-signed certificate in certificate chain",
    ),
}


@pytest.mark.parametrize("case", FOREIGN.values(), ids=FOREIGN)
async def test_ends_that_do_not_accept_one_another(
    tmp_path: Path, case: Foreign, caplog: pytest.LogCaptureFixture
) -> None:
    """The worker is out of reach, which opens its breaker at once, and the log says why. It is not held for frozen."""
    front, back = Volume(tmp_path / "front", **case.front()), Volume(tmp_path / "back", **case.back())
    name = ELSE if ELSE in dns_names(back) else WORKERS
    with mock_worker("a", "--tls", str(back.path), "--tls-name", name) as mock:
        upstream = Upstream(None, Limits(), WorkerTls(front.path, WORKERS))
        try:
            assert not await upstream.ask(mock.url, "/ready")
            with pytest.raises(WorkerFault) as caught:
                await anext(upstream.execute(replica(mock.url), b"{}", "id", 1e9))
        finally:
            await upstream.close()
        assert case.worker_said in mock.process.log()
    assert caught.value.reason == case.fault
    [said] = [vars(record)["fields"] for record in caplog.records if record.message == "no TLS with a worker"]
    assert said["worker"] == mock.url
    assert case.said in said["why"]


def dns_names(volume: Volume) -> list[str]:
    found = x509.load_pem_x509_certificate((volume.path / "tls.crt").read_bytes()).extensions
    return found.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.DNSName)


def test_certificates_are_exchanged_under_a_running_stream(both: Both) -> None:
    """Both ends get certificates of another authority, and then forget the one from before."""
    back, front = OTHER.secret(ca=TRUSTED), OTHER.secret(ca=TRUSTED)
    body = chat(script(tokens=5000, pause_s=0.01, text="x"), stream=True)
    with (
        httpx.Client(timeout=60) as client,
        client.stream("POST", both.router.url + "/v1/chat/completions", json=body) as response,
    ):
        chunks = sse(response)
        next(chunks)
        both.back.put(**back)
        both.front.put(**front)
        settled(both)
        assert post(both.router.url, chat("with the new ones")).status_code == 200
        # A pair that is none changes nothing, and is told.
        both.front.put(**front | {"tls.key": back["tls.key"]})
        eventually(lambda: metric(both, 'wherry_router_stale{what="worker_tls"}') == 1)
        assert post(both.router.url, chat("meanwhile")).status_code == 200
        both.back.put(**OTHER.secret())
        both.front.put(**OTHER.secret())
        settled(both)
        assert metric(both, 'wherry_router_stale{what="worker_tls"}') == 0
        assert post(both.router.url, chat("after")).status_code == 200
        state = tell(both.mock.url, client_of(OTHER))
        assert (state["running"], state["cancelled"], state["resumed_at"]) == (1, 0, [])
        seen = 0
        while seen <= state["tokens_sent"] - 12:  # three answers of four tokens besides
            seen += text_of([next(chunks)]).count("x")
    # Whoever has a certificate of the authority from before is a stranger now.
    assert not answered(both.mock.url, client_of(OURS, OURS.secret(ca=TRUSTED)))
    everything = both.router.log() + both.mock.process.log()
    for secret in (back, front):
        assert secret["tls.key"].splitlines()[1] not in everything
    both.back.put(**OURS.secret(ca=TRUSTED))
    both.front.put(**OURS.secret(ca=TRUSTED))
    settled(both)


def tell(url: str, context: ssl.SSLContext) -> dict[str, Any]:
    """The mock worker's state."""
    with httpx.Client(verify=context) as client:
        return dict(client.get(url + "/mock", extensions={"sni_hostname": WORKERS}).json())


def settled(both: Both) -> None:
    """Waits until each end uses what is in its volume."""
    here, there = (x509.load_pem_x509_certificate((v.path / "tls.crt").read_bytes()) for v in (both.front, both.back))
    eventually(lambda: serial(both.mock.url) == there.serial_number)
    name = "wherry_router_worker_tls_not_after_seconds"
    eventually(lambda: metric(both, name) == here.not_valid_after_utc.timestamp())


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_stream_goes_on_elsewhere(tmp_path: Path, how: int) -> None:
    """A frozen worker answers no goodbye of TLS either, and must not be waited for."""
    path = Volume(tmp_path / "tls", **OURS.secret()).path
    with ExitStack() as stack:
        own = ("--tls", str(path), "--tls-name", WORKERS)
        mocks = [stack.enter_context(mock_worker(name, *own)) for name in "ab"]
        args = ("--worker-tls", str(path), "--worker-tls-name", WORKERS)
        front = stack.enter_context(router(*(mock.url for mock in mocks), args=args))
        content = script(tokens=60, pause_s=0.03, named=False)
        reader = Reader(front, chat(content, stream=True))
        eventually(lambda: len(numbers(reader.text)) > 5)
        context = client_of(OURS)
        [victim] = [mock for mock in mocks if tell(mock.url, context)["running"]]
        victim.process.signal(how)
        reader.join(20)
        assert reader.text == expected(content, 60)
        assert reader.chunks[-1] == {}
        assert reader.gap() < 2.0
        reason = "lost" if how == signal.SIGKILL else "frozen"
        metrics = httpx.get(front.url + "/metrics").text
        assert f'wherry_router_streams_resumed_total{{reason="{reason}"}} 1.0' in metrics


def test_a_client_that_leaves_frees_the_worker(both: Both) -> None:
    context = client_of(OURS)
    before = tell(both.mock.url, context)["cancelled"]
    body = chat(script(tokens=5000, pause_s=0.02, text="x"), stream=True)
    with httpx.stream("POST", both.router.url + "/v1/chat/completions", json=body, timeout=30) as response:
        chunks = sse(response)
        next(chunks)
        assert tell(both.mock.url, context)["running"] == 1
    eventually(lambda: tell(both.mock.url, context)["running"] == 0, 5)
    assert tell(both.mock.url, context)["cancelled"] == before + 1


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Process, Process, str]]:
    """A router in front of a real worker with the sample model, and where that one answers probes."""
    path = Volume(tmp_path_factory.mktemp("tls") / "tls", **OURS.secret()).path
    args, token = ("--worker-tls", str(path), "--worker-tls-name", WORKERS), {"WHERRY_WORKER_TOKEN": "worker-secret"}
    with ExitStack() as stack:
        probes = free_port()
        process = stack.enter_context(worker(*args, "--probe-port", str(probes), env=token))
        front = stack.enter_context(router(process.url, args=args, env=token))
        yield front, process, f"http://127.0.0.1:{probes}"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def test_a_real_worker_answers_its_router_and_nobody_else(real: tuple[Process, Process, str]) -> None:
    front, process, _ = real
    assert process.url.startswith("https://")
    assert post(front.url, chat("Hello", max_tokens=4)).json()["usage"]["completion_tokens"] > 0
    assert stream(front.url, "Hello", max_tokens=4)[-1] == {}
    for stranger in STRANGERS.values():
        assert not answered(process.url, stranger)
    with httpx.Client(verify=client_of(OURS)) as client:
        # The token is asked for as before.
        for headers, status in (({}, 401), ({"Authorization": "Bearer worker-secret"}, 200)):
            answer = client.get(process.url + "/load", headers=headers, extensions={"sni_hostname": WORKERS})
            assert answer.status_code == status
        scraped = client.get(process.url + "/metrics", extensions={"sni_hostname": WORKERS}).text
    ends = next(line for line in scraped.splitlines() if line.startswith("wherry_worker_tls_not_after_seconds"))
    assert float(ends.split()[-1]) > 0
    eventually(lambda: 'wherry_router_replicas{state="routable"} 1.0' in httpx.get(front.url + "/metrics").text)


def test_probes_are_answered_without_tls_and_nothing_else_is(real: tuple[Process, Process, str]) -> None:
    front, process, probes = real
    assert httpx.get(probes + "/ready").json()["state"] == "ready"
    assert httpx.get(probes + "/health").status_code == 200
    token = {"Authorization": "Bearer worker-secret"}
    for path in ("/load", "/metrics", "/execute", "/cancel", "/shutdown", "/load/watch", "//health", "/health/", "/"):
        assert httpx.get(probes + path, headers=token).status_code == 404
        assert httpx.post(probes + path, headers=token).status_code == 404
    assert httpx.post(probes + "/health").status_code == 405
    assert process.popen.poll() is None
    assert post(front.url, chat("Hello", max_tokens=2)).status_code == 200


ENDS = {
    "wherry_runtime": ["--model-name", "m", "--model-uri", "sample://tiny", "--port", "0"],
    "wherry_router": ["--endpoints", "https://127.0.0.1:1", "--model", "m", "--port", "0"],
}


@pytest.mark.parametrize("module", ENDS)
def test_an_end_that_cannot_use_its_certificate_does_not_start(tmp_path: Path, module: str) -> None:
    """And does not go on without. test_mutual_tls.py has what else it does not take."""
    path = Volume(tmp_path / "tls", **OTHER.secret(ca=OURS.cert)).path
    why = exit_of(module, "--worker-tls", str(path), "--worker-tls-name", WORKERS)
    assert f"{path}: tls.crt cannot be a worker's certificate by ca.crt" in why
    assert "PRIVATE KEY" not in why


FLAGS = {
    "a worker needs a name": ("wherry_runtime", ["--worker-tls", "/x"], "go together"),
    "a router needs a name": ("wherry_router", ["--worker-tls", "/x"], "go together"),
    "a router without certificates": ("wherry_router", [], "--endpoints with https:// need --worker-tls"),
    "a router with plain endpoints": (
        "wherry_router",
        ["--endpoints", "https://a:1,http://a:1", "--worker-tls", "/x", "--worker-tls-name", "x"],
        "every one of --endpoints begins with https://",
    ),
}


@pytest.mark.parametrize("module, args, message", FLAGS.values(), ids=FLAGS)
def test_flags_that_do_not_fit_together(module: str, args: list[str], message: str) -> None:
    assert message in exit_of(module, *args)


def exit_of(module: str, *args: str) -> str:
    """The last line of a process that does not start."""
    command = [sys.executable, "-m", module, *ENDS[module], *args]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    return result.stderr.splitlines()[-1]
