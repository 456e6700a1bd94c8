"""Clients that mean harm, at the router's own socket. It runs under `python -O`: no guard of it is an `assert`."""

import itertools
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import msgspec
import psutil
import pytest
from tests.router.harness import Mock, Process, chat, eventually, mock_worker, post, router, script
from tests.router.test_bounds import HOSTS, is_openai_error, raw, request

KEY = {"Authorization": "Bearer key"}
TOKEN = "worker-token-0123456789"


class Front(NamedTuple):
    router: Process
    mock: Mock


@pytest.fixture(scope="module")
def front() -> Iterator[Front]:
    limits = ("--max-body-bytes", "100000", "--head-timeout-s", "1", "--body-timeout-s", "1", "--unread-timeout-s", "1")
    env = {"WHERRY_API_KEY": "key", "WHERRY_WORKER_TOKEN": TOKEN, "PYTHONOPTIMIZE": "1"}
    with mock_worker("a", "--token", TOKEN) as mock, router(mock.url, args=limits, env=env) as process:
        yield Front(process, mock)


def connect(front: Front) -> socket.socket:
    address = urlsplit(front.router.url)
    return socket.create_connection((address.hostname, address.port), timeout=20)


def until_closed(connection: socket.socket, more: Callable[[], bytes], pause_s: float = 0.0) -> tuple[bytes, int]:
    """Sends what `more` makes until the other side closes; returns what it said, and how much was sent."""
    said, sent, deadline = b"", 0, time.monotonic() + 20
    connection.settimeout(pause_s or 0.001)
    while time.monotonic() < deadline and sent < 10**9:
        data = more()
        try:
            if data:
                connection.sendall(data)
                sent += len(data)
            part = connection.recv(65536)
        except TimeoutError:
            continue
        except OSError:
            return said, sent
        if not part:
            return said, sent
        said += part
    raise AssertionError(f"still open after {sent} bytes: {said!r}")


def status(answer: bytes) -> int:
    return int(answer.split()[1]) if answer else 0


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=30, trust_env=False) as one:
        yield one


def ask(client: httpx.Client, front: Front, body: Any, headers: dict[str, str] | None = None) -> httpx.Response:
    return client.post(front.router.url + "/v1/chat/completions", json=body, headers=KEY | (headers or {}))


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
SLOW: list[tuple[str, bytes, bytes, int]] = [
    ("nothing", b"", b"", 0),
    ("a head that does not end", b"GET /healthz HTTP/1.1\r\nX-A: ", b"a", 408),
    ("the second head", b"GET /nope HTTP/1.1\r\nHost: x\r\n\r\nGET /nope HTTP/1.1\r\nX-A: ", b"a", 401),
    ("a body", HEAD + b"Authorization: Bearer key\r\nContent-Length: 1000\r\n\r\n", b"x", 408),
    ("a body of chunks", HEAD + b"Authorization: Bearer key\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n", 408),
    ("a body without a key", HEAD + b"Content-Length: 100000\r\n\r\n", b"x", 401),
    ("a body that nobody reads", b"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n", b"x", 200),
]


def test_who_sends_slowly_is_cut(front: Front) -> None:
    def play(first: bytes, drip: bytes) -> tuple[bytes, int]:
        with connect(front) as connection:
            connection.sendall(first)
            return until_closed(connection, lambda: drip, pause_s=0.05)

    with ThreadPoolExecutor(len(SLOW)) as threads:
        played = [threads.submit(play, first, drip) for _, first, drip, _ in SLOW]
    for (name, _, _, expected), future in zip(SLOW, played, strict=True):
        said, sent = future.result()
        assert status(said) == expected, name
        assert sent < 1000, name
        if expected in (401, 408):
            assert is_openai_error(said.partition(b"\r\n\r\n")[2].partition(b"HTTP/1.1")[0]), name


def test_who_does_not_read_its_answer_holds_no_place_for_ever(front: Front) -> None:
    body = msgspec.json.encode(chat(script(tokens=1_000_000, text="x" * 1000), stream=True))
    with connect(front) as connection:
        head = HEAD.replace(b"completions", b"chat/completions") + b"Authorization: Bearer key\r\n"
        connection.sendall(b"%sContent-Length: %d\r\n\r\n%s" % (head, len(body), body))
        eventually(lambda: front.mock.state()["running"] == 1)
        eventually(lambda: front.mock.state()["running"] == 0)
        with suppress(ConnectionResetError):
            while connection.recv(1 << 20):
                pass  # what was on its way; its end is that of the connection


def test_connections_over_their_bound_are_refused_and_the_others_go_on() -> None:
    with mock_worker("a") as mock, router(mock.url, args=("--max-connections", "8")) as process:
        front = Front(process, mock)
        with ExitStack() as held:
            for _ in range(8):
                held.enter_context(connect(front))
            connection = held.enter_context(connect(front))
            said = connection.recv(65536)
            assert status(said) == 503
            assert is_openai_error(said.partition(b"\r\n\r\n")[2])
        eventually(lambda: post(process.url, chat("hello")).status_code == 200)


def test_a_refused_request_whose_rest_comes_soon_keeps_its_connection(front: Front) -> None:
    with connect(front) as connection:
        for _ in range(2):
            connection.sendall(HEAD + b"Content-Length: 3\r\n\r\n")
            answer = b""
            while part := b"" if answer.endswith(b"}}") else connection.recv(65536):
                answer += part
            assert status(answer) == 401
            connection.sendall(b"xxx")


CHUNKED = b"Authorization: Bearer key\r\nTransfer-Encoding: chunked\r\n\r\n"
ENDLESS: list[tuple[str, bytes, bytes]] = [
    ("trailers", CHUNKED + b"0\r\n", b"".join(b"X-%d: %b\r\n" % (i, b"y" * 200) for i in range(300))),
    ("one trailer", CHUNKED + b"0\r\nX-A: ", b"y" * 65536),
    ("what a chunk says of itself", CHUNKED + b"1;a=", b"y" * 65536),
    ("trailers without a key", b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"X-A: y\r\n" * 8000),
    ("headers", b"", b"X-A: y\r\n" * 8000),
]


@pytest.mark.parametrize("_, first, block", ENDLESS, ids=[case[0] for case in ENDLESS])
def test_what_comes_beside_a_body_is_bounded(front: Front, _: str, first: bytes, block: bytes) -> None:
    before = memory(front)
    with connect(front) as connection:
        connection.sendall(HEAD + first)
        said, sent = until_closed(connection, lambda: block)
    assert status(said) in (0, 401, 431)
    assert sent < 20_000_000, "sockets hold a few megabytes"
    assert memory(front) - before < 10_000_000


def memory(front: Front) -> int:
    return int(psutil.Process(front.router.popen.pid).memory_info().rss)


@pytest.mark.parametrize("length", [b"Content-Length: 10", b"Content-Length: 10\r\nTransfer-Encoding: chunked"])
def test_a_length_that_lies_smuggles_nothing(front: Front, length: bytes) -> None:
    """What follows the ten bytes is a request of its own, and has no key."""
    inner = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    with connect(front) as connection:
        connection.sendall(HEAD + b"Authorization: Bearer key\r\n" + length + b"\r\n\r\n" + b"0123456789" + inner)
        said, _ = until_closed(connection, lambda: b"")
    statuses = [int(found) for found in re.findall(rb"^HTTP/1.1 (\d{3}) ", said, re.MULTILINE)]
    assert statuses in ([400, 401], [400])


def test_every_route_denies_by_default(front: Front) -> None:
    """Each path, as it is and bent, with each method: nothing without a key but the four open ones, as they are."""
    url = front.router.url
    described = httpx.get(url + "/openapi.json", headers=KEY).json()["paths"]
    routes = [
        *described,
        "/docs",
        "/openapi.json",
        "/docs/oauth2-redirect",
        "/internal/usage",
        "/internal/replicas",
        "/",
    ]
    open_paths = {"/health", "/healthz", "/readyz", "/metrics"}
    bends = [
        "{}",
        "{}/",
        "/{}",
        "{}?x=/healthz",
        "{}/../healthz",
        "/healthz/..{}",
        "/metrics;{}",
        "{}%00",
        "{}#/metrics",
    ]
    bends += ["{}%2f..%2fmetrics", "http://x{}", "/%2e{}", "{}\t/metrics", "{}\xa0"]
    hosts = itertools.cycle(HOSTS)
    for path, bend, method in itertools.product(routes, bends, ("GET", "POST", "PUT")):
        target = bend.format(path.replace("{model_id}", "chat"))
        if target.partition("#")[0].partition("?")[0].removeprefix("http://x") in open_paths:
            continue
        got, body = raw(url, request(method, target, next(hosts)))
        assert got in (400, 401), (method, target, got)
        assert is_openai_error(body)


# What proxies, gateways and frameworks read addresses from.
ADDRESS_HEADERS = [
    "Host", "Forwarded", "X-Forwarded-Host", "X-Forwarded-For", "X-Forwarded-Server", "X-Real-IP", "X-Original-URL",
    "X-Rewrite-URL", "X-Original-Host", "X-Host", "X-Target", "X-Backend", "X-Upstream", "X-Proxy-URL", "Proxy-Host",
    "Destination", "Location", "Referer", "Origin", "Via", "X-Gateway-Destination-Endpoint", "X-Prefiller-Host-Port",
    "X-Worker-URL", "X-Worker-ID", "X-Target-Worker", "X-Endpoint", "Target-URL", "X-SMG-Target-Worker",
    "Api-Base", "X-Api-Base", "X-Portkey-Custom-Host", "OpenAI-Base-URL", "X-Session-Id", "X-Correlation-Id",
    "X-Request-Id", "Callback-URL", "X-Callback-URL", "X-HTTP-Host-Override", "X-Wherry-Worker", "X-Wherry-Replica",
]  # fmt: skip


class Canary:
    """A port to which nobody is to connect."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._socket.setblocking(False)
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"

    def connections(self) -> int:
        count = 0
        with suppress(BlockingIOError):
            while True:
                self._socket.accept()[0].close()
                count += 1
        return count

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def canary() -> Iterator[Canary]:
    one = Canary()
    yield one
    one.close()


def test_no_header_becomes_an_address(front: Front, client: httpx.Client, canary: Canary) -> None:
    before = front.mock.state()["executed"]
    forms = [canary.address, f"http://{canary.address}/", f"for=1.1.1.1;host={canary.address};proto=http"]
    told = ""
    for name, form in itertools.product(ADDRESS_HEADERS, forms):
        response = ask(client, front, chat("hello"), {name: form})
        assert response.status_code == 200, (name, form)
        echoed = {"x-request-id", "x-correlation-id"}  # its own name for the request, of plain characters only
        told += "".join(v for k, v in response.headers.items() if k not in echoed) + response.text
    got, body = raw(front.router.url, request("GET", f"http://{canary.address}/v1/models", "Authorization: Bearer key"))
    assert (got, canary.address.encode() in body) == (200, False), "the path alone counts"
    assert raw(front.router.url, request("CONNECT", canary.address, "Authorization: Bearer key"))[0] in (400, 404, 405)
    assert canary.address not in told
    assert front.mock.state()["executed"] == before + len(ADDRESS_HEADERS) * len(forms), "all went to the worker"
    assert canary.connections() == 0


def test_no_url_of_a_client_is_fetched(front: Front, client: httpx.Client, canary: Canary) -> None:
    url = f"http://{canary.address}/x"
    parts: list[Any] = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "input_audio", "input_audio": {"data": url, "format": "wav"}},
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "file", "file": {"file_data": url}},
        {"type": "text", "text": "x", "url": url},
    ]
    changes: list[dict[str, Any]] = [{"messages": [{"role": "user", "content": [part]}]} for part in parts[:-1]]
    named = [
        "api_base",
        "base_url",
        "endpoint",
        "model_url",
        "lora_path",
        "callback_url",
        "webhook",
        "proxy",
        "kv_transfer_params",
    ]
    named += ["image", "images", "file", "tokenizer", "media_io_kwargs", "mm_processor_kwargs", "chat_template"]
    changes += [{name: url} for name in named]
    changes += [{"tools": [{"type": "mcp", "server_url": url}]}, {"web_search_options": {"url": url}}]
    changes += [{"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": url}}}}]
    for change in changes:
        response = ask(client, front, chat("hello") | change)
        assert response.status_code == 400, change
    assert ask(client, front, chat("hello") | {"model": url}).status_code == 404
    # Text is text, whatever it looks like.
    for change in ({"messages": [{"role": "user", "content": [parts[-1]]}]}, {"user": url}, {"metadata": {"url": url}}):
        assert ask(client, front, chat(url) | change).status_code == 200
    assert canary.connections() == 0


def pickles(path: Path) -> list[bytes]:
    """Whoever unpickles one of them makes a file: of protocol 0, 2 and 4."""
    line = b"touch " + bytes(path)
    counted = len(line).to_bytes(1, "little") + line
    last = b"\x8c\x02os\x8c\x06system\x93\x8c" + counted + b"\x85R."
    return [b"cos\nsystem\n(S'%b'\ntR." % line, b"\x80\x02cos\nsystem\nU" + counted + b"\x85R.", b"\x80\x04" + last]


def ports(process: Process) -> list[tuple[str, int]]:
    """Where it and its children listen."""
    whole = psutil.Process(process.popen.pid)
    found = set()
    for one in (whole, *whole.children(recursive=True)):
        listening = [c.laddr for c in one.net_connections(kind="tcp") if c.status == psutil.CONN_LISTEN]
        found |= {(address.ip, address.port) for address in listening}
    return sorted(found)


def test_a_pickle_sent_to_every_port_is_never_opened(
    front: Front, client: httpx.Client, tiny_worker: Process, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    for data in pickles(made):
        (tmp_path / "data").write_bytes(data)
        subprocess.run([sys.executable, "-m", "pickle", tmp_path / "data"], check=True, capture_output=True)
        assert made.exists(), "it would be seen"
        made.unlink()
    kinds = ("application/json", "application/octet-stream", "application/x-pickle", "application/python-pickle")
    paths = ("/v1/chat/completions", "/v1/completions", "/execute", "/cancel", "/internal/usage", "/metrics")
    for process in (front.router, tiny_worker):
        listening = ports(process)
        assert [port for _, port in listening] == [urlsplit(process.url).port], "no port but the one that is known"
        assert {host for host, _ in listening} == {"127.0.0.1"}
        for data in pickles(made):
            for framed in (data, len(data).to_bytes(4, "big") + data, len(data).to_bytes(8, "little") + data):
                with socket.create_connection(listening[0], timeout=20) as connection, suppress(OSError):
                    connection.sendall(framed)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(65536):
                        pass
            for path, kind in zip(paths * 4, kinds * 6, strict=True):
                headers = KEY | {"Content-Type": kind, "X-Pickle": data.hex()}
                assert client.post(process.url + path, content=data, headers=headers).status_code in (
                    400,
                    401,
                    404,
                    405,
                )
    assert not made.exists()
    assert post(front.router.url, chat("hello"), headers=KEY).status_code == 200
    assert httpx.get(tiny_worker.url + "/health").status_code == 200


def test_an_upgrade_is_no_way_around(front: Front) -> None:
    """There is one door, HTTP: neither WebSocket nor HTTP/2 is spoken, and asking for them needs a key too."""
    websocket = ("Host: x", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13")
    for head in (
        websocket,
        ("Host: x", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk"),
    ):
        lines = "\r\n".join(["GET /v1/models HTTP/1.1", *head, "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="])
        with connect(front) as connection:
            connection.sendall(lines.encode() + b"\r\n\r\n")
            assert status(connection.recv(65536)) == 401
    with connect(front) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        assert status(until_closed(connection, lambda: b"")[0]) in (400, 401)


def test_metrics_have_no_label_that_a_client_chose(front: Front, client: httpx.Client) -> None:
    """After all that was sent, and more: the series are as many as routes and statuses there are."""

    def series() -> set[str]:
        text = client.get(front.router.url + "/metrics").text
        return {line.rsplit(" ", 1)[0] for line in text.splitlines() if not line.startswith("#")}

    ask(client, front, chat("hello"))
    before = series()
    for number in range(50):
        word = f"canary{number}"
        client.get(front.router.url + "/" + word, headers=KEY)
        client.request(word.upper(), front.router.url + "/v1/models", headers=KEY)
        ask(client, front, chat(word) | {"model": word, "user": word})
        ask(client, front, chat(word) | {"user": word}, {"x-session-id": word, "x-request-id": word})
        ask(client, front, chat(word), {"Authorization": f"Bearer {word}"})
    after = series()
    assert len(after - before) <= 5, after - before
    assert not [name for name in after if "canary" in name or "key" in name.partition("{")[2]]
    routes = set(re.findall(r'route="([^"]*)"', "".join(after)))
    assert routes <= {"chat/completions", "completions", "embeddings", "other", "/internal/usage", "/internal/replicas"}


def test_after_all_that_it_serves_as_before(front: Front) -> None:
    assert post(front.router.url, chat("hello"), headers=KEY).status_code == 200
    assert not [line for line in front.router.lines() if line["level"] in ("error", "critical")]
    assert "Traceback" not in front.router.log()
    eventually(lambda: "wherry_router_requests_in_flight 0.0" in httpx.get(front.router.url + "/metrics").text)
    idle = psutil.Process(front.router.popen.pid)
    eventually(lambda: not [c for c in idle.net_connections("tcp") if c.status == psutil.CONN_CLOSE_WAIT])
