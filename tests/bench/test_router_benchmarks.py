"""The comparison of routers: what it makes of figures, and a real run of each part on Wherry's."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmarks.router import latency, soak, throughput
from benchmarks.router.report import DIRECT, percentile
from benchmarks.router.routers import ROUTERS, Running, mocks, router, workspace
from benchmarks.router.wire import Answer, Lost, chat, connect


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with workspace() as found:
        yield found


@pytest.fixture(scope="module")
def workers(folder: Path) -> Iterator[list[str]]:
    with mocks(folder, 2, interval=0.01) as urls:
        yield urls


@pytest.fixture(scope="module")
def front(folder: Path, workers: list[str]) -> Iterator[Running]:
    with router("Wherry", workers, folder) as running:
        yield running


@pytest.mark.parametrize(
    "points, expected",
    [
        ([(0, 50), (3600, 50)], 0),
        ([(0, 50), (1800, 51), (3600, 52)], 2),
        ([(0, 10), (1, 12), (2, 10), (3, 12)], 1440),
        ([(5, 10)], 0),
    ],
)
def test_the_slope_is_in_mb_an_hour(points: list[tuple[float, float]], expected: float) -> None:
    assert soak.slope(points) == pytest.approx(expected)


def test_percentiles() -> None:
    assert [percentile([3, 1, 2], share) for share in (0, 50, 99)] == [1, 2, 3]


def test_what_a_router_adds_is_the_difference_to_the_direct_call() -> None:
    taken = {
        DIRECT: {"whole": [0.001] * 10, "first": [0.001] * 10},
        "Wherry": {"whole": [0.0015] * 9 + [0.004], "first": [0.002] * 10},
        "Envoy": {"whole": [0.00125] * 10, "first": [0.001] * 10},
    }
    rows = latency.summary(taken)
    assert rows["Wherry"]["whole_added_p50_ms"] == pytest.approx(0.5)
    assert rows["Wherry"]["whole_added_p99_ms"] == pytest.approx(3.0)
    assert rows["Wherry"]["first_p50_ms"] == pytest.approx(2.0)
    assert latency.verdict(rows) == ["Wherry adds 0.50 ms at p50, 3.00 ms at p99", "2.0 times what Envoy adds"]


@pytest.mark.parametrize(
    "answer, kind, good",
    [
        (Answer(200, 0, 0, 32, done=True), "streams", True),
        (Answer(200, 0, 0, 31, done=True), "streams", False),
        (Answer(200, 0, 0, 32, done=False), "streams", False),
        (Answer(429, 0, 0, 0, done=False), "whole", False),
        (Answer(200, 0, 0, 1, done=False), "whole", True),
    ],
)
def test_an_answer_counts_if_nothing_is_missing(answer: Answer, kind: str, good: bool) -> None:
    assert throughput.whole(answer, kind) is good


async def test_direct_and_routed_answers_are_alike(front: Running, workers: list[str]) -> None:
    for url in (front.url, workers[0]):
        connection = await connect(url)
        for tokens in (1, 3):  # on one connection
            streamed = await connection.ask(chat(tokens, stream=True))
            assert (streamed.status, streamed.pieces, streamed.done) == (200, tokens, True)
            whole = await connection.ask(chat(tokens, stream=False))
            assert (whole.status, whole.done) == (200, False)
            assert 0 < whole.first_s <= whole.whole_s
        connection.close()


async def test_a_lost_connection_is_told(folder: Path) -> None:
    with mocks(folder, 1, interval=10) as (url,):
        connection = await connect(url)
        asking = asyncio.create_task(connection.ask(chat(5, stream=True)))
        await asyncio.sleep(0)
    with pytest.raises(Lost):
        await asking


async def test_each_measurement_runs(front: Running, workers: list[str]) -> None:
    taken = await latency.measure({DIRECT: workers[0], "Wherry": front.url}, rounds=2, turn=3)
    assert {name: {kind: len(values) for kind, values in kinds.items()} for name, kinds in taken.items()} == {
        name: {"whole": 6, "first": 6} for name in (DIRECT, "Wherry")
    }
    row = await throughput.load(front.url, "streams", at_once=4, seconds=1.0)
    assert row["streams_per_s"] > 0
    assert row["streams_failed"] == 0


async def test_a_soak_loses_nothing_and_counts_those_who_leave(front: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "INTERVAL_S", 0.01)
    counts, memory = await soak.churn(front, streams=40, seconds=4)
    assert counts["complete"] > 40
    assert counts["left"] > 0
    assert (counts["lost"], counts["refused"]) == (0, 0)
    assert 20 < counts["most"] <= 40
    assert len(memory) == 2
    assert memory[0][1] > 10


def test_every_router_has_a_command(folder: Path) -> None:
    for name, command in ROUTERS.items():
        words = command(["http://127.0.0.1:1", "http://127.0.0.1:2"], 3, folder)
        configured = " ".join(words) + "".join(file.read_text() for file in folder.glob("*.json"))
        assert "127.0.0.1:2" in configured or '"port_value": 2' in configured, name
