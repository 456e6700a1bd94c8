"""Whatever is malformed or over a bound gets an answer that says so."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from urllib.parse import urlsplit

import httpx
import pytest
from tests.router.harness import Mock, Process, chat, eventually, mock_worker, post, router, script


@pytest.fixture(scope="module")
def front() -> Iterator[Process]:
    with ExitStack() as stack:
        mock = stack.enter_context(mock_worker("a"))
        yield stack.enter_context(
            router(
                mock.url, args=("--max-body-bytes", "100000", "--max-concurrent", "4"), env={"WHERRY_API_KEY": "key"}
            )
        )


KEY = {"Authorization": "Bearer key"}


def raw(url: str, data: bytes) -> tuple[int, bytes]:
    """Status and body of what a server answers to raw bytes."""
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        connection.sendall(data)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def request(method: str, path: str, *headers: str, body: bytes = b"") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Connection: close", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def is_openai_error(body: bytes) -> bool:
    error = json.loads(body)["error"]
    return set(error) == {"message", "type", "param", "code"} and bool(error["message"])


HOSTS = [
    "Host: x",
    "Host: [::1",
    "Host: a b c",
    "Host: \xff\xfe",
    "Host: http://evil/@",
    "Host: x\r\nHost: y",
    "X-No: host",
]
PATHS = [
    "/v1/models",
    "/v1/chat/completions",
    "//v1/models",
    "/v1//models",
    "/v1/models/../models",
    "/V1/MODELS",
    "/v1/models/",
    "/v1/%6dodels",
    "/v1/models%2f..%2f..%2fhealthz",
    "/healthz/../v1/models",
    "/v1/models;x=/healthz",
    "/v1/models?/healthz",
    "/v1/models#/healthz",
    "/%00",
    "/%ff%fe",
    "http://evil/v1/models",
    "*",
]


@pytest.mark.parametrize("host", HOSTS)
def test_no_path_and_no_host_gets_past_the_key(front: Process, host: str) -> None:
    for path in PATHS:
        for method in ("GET", "POST"):
            status, body = raw(front.url, request(method, path, host))
            assert status in (400, 401), (method, path, host, status)
            assert is_openai_error(body)


@pytest.mark.parametrize("host", HOSTS)
def test_malformed_paths_and_hosts_never_give_a_5xx(front: Process, host: str) -> None:
    for path in PATHS:
        status, body = raw(front.url, request("GET", path, host, "Authorization: Bearer key"))
        assert status in (200, 400, 404, 405), (path, host, status)
        assert status == 200 or is_openai_error(body)


@pytest.mark.parametrize("path", ["/health", "/healthz", "/readyz", "/metrics"])
def test_health_and_metrics_need_no_key(front: Process, path: str) -> None:
    assert httpx.get(front.url + path).status_code == 200


@pytest.mark.parametrize("key", ["", "Bearer", "Bearer wrong", "key", "Basic key", "Bearer key2", "Bearer ke"])
def test_wrong_keys(front: Process, key: str) -> None:
    response = httpx.get(front.url + "/v1/models", headers={"Authorization": key})
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"


def test_unknown_paths_and_wrong_methods(front: Process) -> None:
    for method, path, status in [
        ("GET", "/nope", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/completions", 405),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/chat/completions/", 404),
        ("OPTIONS", "/v1/models", 405),
    ]:
        response = httpx.request(method, front.url + path, headers=KEY)
        assert response.status_code == status, (method, path)
        assert is_openai_error(response.content)
        assert response.headers["x-request-id"]
        expected = {"/v1/models": "GET", "/v1/completions": "POST", "/v1/chat/completions": "POST"}
        assert response.headers.get("allow") == (expected[path] if status == 405 else None)


def test_what_is_not_http_gets_400(front: Process) -> None:
    for data in (
        b"\x80\x04\x95 pickle.\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\r\n",
    ):
        status, body = raw(front.url, data)
        assert status == 400
        assert is_openai_error(body)


@pytest.mark.parametrize("head", [b"X-A: " + b"a" * 500_000, b"\r\n".join(b"X-%d: y" % i for i in range(50_000))])
def test_a_request_head_over_the_cap(front: Process, head: bytes) -> None:
    address = urlsplit(front.url)
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        # It never ends, so that only the cap can end it; what is sent after the answer may be cut.
        try:
            connection.sendall(b"GET /v1/models HTTP/1.1\r\n" + head)
            assert b" 431 " in connection.recv(1000)
        except (BrokenPipeError, ConnectionResetError):
            pass
    assert httpx.get(front.url + "/healthz").status_code == 200


@pytest.mark.parametrize("length", [b"Content-Length: 10000000000", b"Transfer-Encoding: chunked"])
def test_a_10_gb_body_is_cut_at_the_cap(front: Process, length: bytes) -> None:
    address = urlsplit(front.url)
    sent = 0
    block = b"x" * 65_536
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key\r\n" + length + b"\r\n\r\n"
        )
        connection.settimeout(0.2)
        answer = b""
        try:
            while sent < 10**10:
                connection.sendall(b"%x\r\n%b\r\n" % (len(block), block) if length.startswith(b"T") else block)
                sent += len(block)
        except OSError:
            pass
        with suppress(OSError):
            answer = connection.recv(1000)
    assert sent < 20_000_000, "sockets hold a few megabytes, the router 100 kB"
    assert not answer or b" 413 " in answer


def test_a_body_over_the_cap_is_told(front: Process) -> None:
    response = post(front.url, chat("x" * 150_000), headers=KEY)
    assert response.status_code == 413
    assert is_openai_error(response.content)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff", b'"x"', b"{}", b"[" * 50_000, b'{"model":"chat"}']
)
def test_bodies_that_are_no_request(front: Process, body: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        response = httpx.post(front.url + path, content=body, headers=KEY)
        assert response.status_code == 400
        assert is_openai_error(response.content)


def test_over_the_concurrency_bound_is_429(front: Process) -> None:
    address = urlsplit(front.url)
    data = json.dumps(chat(script(hold=True))).encode()
    with ExitStack() as stack:
        for _ in range(4):
            connection = stack.enter_context(socket.create_connection((address.hostname, address.port)))
            connection.sendall(request("POST", "/v1/chat/completions", "Authorization: Bearer key", body=data))
        eventually(lambda: "wherry_router_requests_in_flight 4.0" in httpx.get(front.url + "/metrics").text)
        response = post(front.url, chat("hello"), headers=KEY)
        assert response.status_code == 429
        assert response.headers["retry-after"]
    eventually(lambda: post(front.url, chat("hello"), headers=KEY).status_code == 200)


def test_a_request_waits_a_little_for_a_replica() -> None:
    with mock_worker("a") as mock:
        mock.set(ready=False)
        with router(mock.url, args=("--no-replica-wait-s", "15"), wait=0) as front:
            answers: list[httpx.Response] = []
            asking = threading.Thread(target=lambda: answers.append(post(front.url, chat("hello"))))
            asking.start()
            eventually(lambda: "wherry_router_requests_in_flight 1.0" in httpx.get(front.url + "/metrics").text)
            mock.set(ready=True)
            asking.join(20)
            assert answers[0].status_code == 200


def test_the_first_token_has_a_deadline() -> None:
    with mock_worker("a") as mock, router(mock.url, args=("--first-token-timeout-s", "0.5")) as front:
        response = post(front.url, chat(script(hold=True)))
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "first_token_timeout"
        eventually(lambda: mock.state()["running"] == 0)


def test_openapi_describes_the_hot_routes(front: Process) -> None:
    schema = httpx.get(front.url + "/openapi.json", headers=KEY).json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/metrics"} <= set(schema["paths"])
    fields = schema["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    assert {"messages", "max_completion_tokens", "stream_options", "tools", "min_p"} <= set(fields)
    assert httpx.get(front.url + "/docs", headers=KEY).status_code == 200


def test_drain_lets_streams_finish_and_then_ends() -> None:
    with ExitStack() as stack:
        mock: Mock = stack.enter_context(mock_worker("a"))
        front = stack.enter_context(router(mock.url))
        body = chat(script(tokens=20, pause_s=0.05), stream=True)
        response = stack.enter_context(httpx.stream("POST", front.url + "/v1/chat/completions", json=body, timeout=20))
        lines = response.iter_lines()
        assert next(lines).startswith("data:")
        front.signal(15)
        eventually(lambda: httpx.get(front.url + "/readyz").status_code == 503)
        assert httpx.get(front.url + "/healthz").status_code == 200
        late = post(front.url, chat("hello"))
        assert (late.status_code, late.headers["connection"]) == (200, "close"), "still taken while it drains"
        assert [line for line in lines if line][-1] == "data: [DONE]"
        assert front.wait() == 0


def test_drain_is_bounded_and_tells_the_stream() -> None:
    with ExitStack() as stack:
        mock = stack.enter_context(mock_worker("a"))
        front = stack.enter_context(router(mock.url, args=("--drain-timeout-s", "0.3")))
        body = chat(script(tokens=20, hold_after=1), stream=True)
        response = stack.enter_context(httpx.stream("POST", front.url + "/v1/chat/completions", json=body, timeout=20))
        lines = response.iter_lines()
        assert next(lines).startswith("data:")
        front.signal(15)
        assert '"cancelled"' in [line for line in lines if line][-1]
        assert front.wait() == 0


def test_a_taken_port_is_told(front: Process) -> None:
    port = str(urlsplit(front.url).port)
    second = Process("wherry_router", ["--endpoints", "http://127.0.0.1:9", "--model", "chat", "--port", port])
    assert second.wait() == 2
    assert "choose another with --port" in second.log()
    second.stop()
