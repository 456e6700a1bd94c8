"""Routers replaced under continuous streams, as a Deployment's rolling update does it: real processes, none cut."""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import httpx
import pytest
from tests.router.harness import Process, chat, eventually, mock_worker, router, script, sse, text_of

pytestmark = pytest.mark.alone

TOKENS = 12
CLIENTS = 6


class Service:
    """What a Service's endpoints are to clients: the routers that are ready, seen a little late."""

    def __init__(self) -> None:
        self.routers: list[Process] = []
        self._ready: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def choose(self) -> str:
        return random.choice(eventually(lambda: self._ready))

    def names(self, process: Process) -> bool:
        return process.url in self._ready

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            self._ready = [process.url for process in list(self.routers) if self._asks(process)]

    @staticmethod
    def _asks(process: Process) -> bool:
        try:
            return httpx.get(process.url + "/readyz", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    @contextmanager
    def watched(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._stop.set()
            self._thread.join(20)


class Client(threading.Thread):
    """Streams one answer after the other over connections that it keeps, and notes whatever is not whole."""

    def __init__(self, service: Service) -> None:
        super().__init__()
        self.service = service
        self.stop = threading.Event()
        self.whole: dict[str, int] = {}
        self.broken: list[str] = []

    def run(self) -> None:
        with httpx.Client(timeout=20) as http:
            while not self.stop.is_set():
                url = self.service.choose()
                try:
                    problem = self._stream(http, url)
                except (httpx.HTTPError, OSError) as error:
                    problem = repr(error)
                if problem:
                    self.broken.append(f"{url}: {problem}")
                else:
                    self.whole[url] = self.whole.get(url, 0) + 1

    def _stream(self, http: httpx.Client, url: str) -> str:
        body = chat(script(tokens=TOKENS, pause_s=0.03, text="word "), stream=True)
        with http.stream("POST", url + "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                return f"{response.status_code} {response.read()!r}"
            chunks = list(sse(response))
        if not chunks or chunks[-1] != {}:
            return "no [DONE]"
        return "" if text_of(chunks[:-1]) == "word " * TOKENS else f"got {text_of(chunks[:-1])!r}"


def in_flight(process: Process) -> float:
    lines = httpx.get(process.url + "/metrics", timeout=5).text.splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("wherry_router_requests_in_flight ")))


def test_routers_are_replaced_under_streams_and_none_is_cut() -> None:
    with ExitStack() as stack:
        workers = [stack.enter_context(mock_worker(name)).url for name in "ab"]
        args = ("--drain-grace-s", "1.5", "--drain-timeout-s", "30")
        service = Service()
        service.routers = [stack.enter_context(router(*workers, args=args)) for _ in range(2)]
        stack.enter_context(service.watched())
        clients = [Client(service) for _ in range(CLIENTS)]
        for client in clients:
            client.start()
        try:
            for old in list(service.routers):
                # As with maxSurge 1, maxUnavailable 0: the new one first.
                new = stack.enter_context(router(*workers, args=args))
                service.routers.append(new)
                eventually(lambda new=new: service.names(new))
                eventually(lambda old=old: in_flight(old) > 0)
                old.signal(15)
                assert old.wait(30) == 0
                assert not service.names(old), "it stayed until nobody was sent to it"
                service.routers.remove(old)
                done = sum(client.whole.get(new.url, 0) for client in clients)
                eventually(lambda new=new, done=done: sum(c.whole.get(new.url, 0) for c in clients) > done)
        finally:
            for client in clients:
                client.stop.set()
            for client in clients:
                client.join(30)
    assert [problem for client in clients for problem in client.broken] == []
    assert sum(sum(client.whole.values()) for client in clients) > 4 * CLIENTS
    assert len({url for client in clients for url in client.whole}) == 4, "every router answered some"


def test_a_client_that_keeps_its_connection_is_told_to_close_it_before_it_is_closed() -> None:
    """Its next request, a moment after the last answer, comes down the old connection and is answered once more."""
    with ExitStack() as stack:
        front = stack.enter_context(router(stack.enter_context(mock_worker("a")).url, args=("--drain-grace-s", "2")))
        http = stack.enter_context(httpx.Client(timeout=20))
        url = front.url + "/v1/chat/completions"
        # Longer than the grace, so that nothing but this client keeps the router.
        with http.stream("POST", url, json=chat(script(tokens=30, pause_s=0.1), stream=True)) as response:
            assert "connection" not in response.headers
            connection = response.extensions["network_stream"].get_extra_info("client_addr")
            lines = response.iter_lines()
            next(lines)
            front.signal(15)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        time.sleep(0.4)
        with http.stream("POST", url, json=chat("hello", stream=True)) as response:
            assert response.extensions["network_stream"].get_extra_info("client_addr") == connection
            assert response.headers["connection"] == "close"
            assert list(sse(response))[-1] == {}
        assert front.wait() == 0
