"""Redis behind TLS and a password, as managed ones are: `rediss://`."""

import time
from collections.abc import Callable, Iterator

import httpx
import pytest
from tests.router.certificates import pair
from tests.router.harness import chat, eventually, mock_worker, post, router
from tests.router.redis_server import Server

PASSWORD = "a-password-of-redis"
FLAGS = ("--limit-total", "requests=4", "--limit-routers", "2", "--response-cache-bytes", "1048576")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server(pair(), PASSWORD)
    yield server
    server.stop()


def env(url: str) -> dict[str, str]:
    return {"WHERRY_WORKER_TOKEN": "t", "WHERRY_REDIS_URL": url, "WHERRY_RESPONSE_CACHE_REDIS_URL": url}


def test_two_routers_count_together_and_share_answers(server: Server) -> None:
    with (
        mock_worker("a", "--token", "t") as mock,
        router(mock.url, args=FLAGS, env=env(server.url)) as one,
        router(mock.url, args=FLAGS, env=env(server.url)) as two,
    ):
        first = post(one.url, chat("the same", temperature=0))
        assert first.headers["x-wherry-cache"] == "miss"
        eventually(lambda: server.client.dbsize() >= 2)  # of the answer and of the limit
        assert post(two.url, chat("the same", temperature=0)).headers["x-wherry-cache"] == "hit"
        codes = [post(front.url, chat(f"another {n}")).status_code for n in range(3) for front in (one, two)]
        assert sorted(codes) == [200] * 2 + [429] * 4, "the one from memory counts, too"


WRONG: dict[str, Callable[[str], str]] = {
    "a certificate that nobody vouches for": lambda url: url.partition("?")[0],
    "another password": lambda url: url.replace(PASSWORD, PASSWORD[::-1]),
    "no TLS": lambda url: url.partition("?")[0].replace("rediss:", "redis:"),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_a_redis_that_lets_nobody_in_is_a_lost_one_and_its_password_is_told_nowhere(
    server: Server, change: Callable[[str], str]
) -> None:
    url = change(server.url)
    with mock_worker("a", "--token", "t") as mock, router(mock.url, args=FLAGS, env=env(url)) as front:
        began = time.monotonic()
        codes = [post(front.url, chat(f"{n}", temperature=0)).status_code for n in range(4)]
        assert codes.count(200) == 2, "this router's part of the limit"
        assert time.monotonic() - began < 5
        told = front.log() + httpx.get(front.url + "/metrics").text
        assert "edis" in told
        assert PASSWORD not in told
        assert PASSWORD[::-1] not in told
