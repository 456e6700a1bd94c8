"""A router that follows its workers' load reports: what it does by them, and without them."""

import re
from collections.abc import Iterator

import httpx
import pytest
from tests.router.harness import MODEL, Mock, Process, chat, eventually, mock_worker, post, router

from wherry_protocol.prefix import prefix_keys, written_out
from wherry_protocol.worker import ChatMessage, Prompt

LONG = "The ferry goes across the river. " * 60


def keys(text: str) -> list[int]:
    return prefix_keys(written_out(Prompt(messages=[ChatMessage(role="user", content=text)])), MODEL)


def metric(process: Process, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", httpx.get(process.url + "/metrics", timeout=5).text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def answered_by(process: Process, text: str, **more: str) -> str:
    response = post(process.url, chat(text), headers=more)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])[0]


@pytest.fixture(scope="module")
def mocks() -> Iterator[list[Mock]]:
    with mock_worker("a") as a, mock_worker("b") as b, mock_worker("c") as c:
        yield [a, b, c]


@pytest.fixture(autouse=True)
def fresh(mocks: list[Mock]) -> None:
    for mock in mocks:
        mock.set(reports=True, prefixes=[], others=0)


def test_prompts_go_where_reports_say_they_are_cached_after_a_restart_too(mocks: list[Mock]) -> None:
    mocks[1].set(prefixes=keys(LONG))
    for _ in range(2):
        with router(*(mock.url for mock in mocks)) as front:
            eventually(lambda front=front: metric(front, "wherry_router_replicas_reporting") == 3)
            eventually(lambda front=front: metric(front, "wherry_router_known_prefixes") == len(keys(LONG)))
            assert [answered_by(front, LONG + tail) for tail in ("one", "two", "three")] == ["b"] * 3
            assert metric(front, 'wherry_router_policy_decisions_total{reason="prefix"}') == 3
    with router(*(mock.url for mock in mocks)) as front:
        eventually(lambda: metric(front, "wherry_router_known_prefixes") == len(keys(LONG)))
        mocks[1].set(prefixes=[])
        mocks[2].set(prefixes=keys(LONG))
        eventually(lambda: answered_by(front, LONG + "four") == "c")


def test_what_other_routers_sent_there_counts(mocks: list[Mock]) -> None:
    with router(*(mock.url for mock in mocks), args=("--policy", "least-tokens")) as front:
        eventually(lambda: metric(front, "wherry_router_replicas_reporting") == 3)
        mocks[0].set(others=9)
        mocks[1].set(others=9)
        eventually(lambda: metric(front, "wherry_router_load_max_over_mean") == 1.5)
        assert {answered_by(front, f"{n}") for n in range(6)} == {"c"}
        mocks[0].set(reports=False)
        eventually(lambda: metric(front, "wherry_router_replicas_reporting") == 2)
        assert "a" in {answered_by(front, f"{n}") for n in range(6)}, "nobody knows any more that it is busy"
        mocks[0].set(reports=True)
        eventually(lambda: metric(front, "wherry_router_replicas_reporting") == 3)
        assert {answered_by(front, f"{n}") for n in range(6)} == {"c"}


def test_two_routers_send_a_session_to_the_same_replica(mocks: list[Mock]) -> None:
    urls = [mock.url for mock in mocks]
    args = ("--policy", "session-affinity")
    with router(*urls, args=args) as one, router(*reversed(urls), args=args) as other:
        found = {}
        for session in ("s1", "s2", "s3", "s4", "s5", "s6", "s7", "s8"):
            found[session] = {
                answered_by(front, f"{n}", **{"x-session-id": session}) for front in (one, other) for n in range(3)
            }
        assert all(len(replicas) == 1 for replicas in found.values()), found
        assert len(set.union(*found.values())) > 1
        by_field = post(one.url, chat("x", user="s1"))
        assert by_field.json()["choices"][0]["message"]["content"][0] in found["s1"]


def test_two_routers_send_a_prompt_that_nobody_has_to_the_same_replica(mocks: list[Mock]) -> None:
    urls = [mock.url for mock in mocks]
    with router(*urls) as one, router(*reversed(urls)) as other:
        prompts = [f"{n} {LONG}" for n in range(8)]
        found = [(answered_by(one, text), answered_by(other, text)) for text in prompts]
        assert all(first == second for first, second in found), found
        assert len({first for first, _ in found}) > 1
        assert metric(one, 'wherry_router_policy_decisions_total{reason="cold"}') == 8


def test_a_worker_that_is_killed_stops_reporting(mocks: list[Mock]) -> None:
    with mock_worker("d") as d, router(mocks[0].url, d.url) as front:
        eventually(lambda: metric(front, "wherry_router_replicas_reporting") == 2)
        d.process.kill()
        eventually(lambda: metric(front, "wherry_router_replicas_reporting") == 1)
        assert answered_by(front, LONG) == "a"
