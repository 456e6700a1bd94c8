"""`wherry bench serve` against simulated workers behind a real router."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.bench.test_simulate import FAST, _urls, simulated
from tests.router import harness
from tests.router.harness import MODEL, ROOT, Process


@pytest.fixture(scope="module")
def front() -> Iterator[Process]:
    with simulated(*FAST, replicas=2) as workers, harness.router(*_urls(workers)) as router:
        yield router


def bench(url: str, *args: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "wherry_cli.main", "bench", "serve", "--url", url, *args]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(url: str, folder: Path, *args: str) -> tuple[int, str, dict[str, Any]]:
    """Exit status, what it said, and what it wrote."""
    process = bench(url, *args, "--json", str(folder / "bench.json"))
    said, _ = process.communicate(timeout=100)
    file = folder / "bench.json"
    return process.returncode, said, json.loads(file.read_text()) if file.exists() else {}


def test_conversations_through_a_router(front: Process, tmp_path: Path) -> None:
    lengths = ["--input-tokens", "32", "--output-tokens", "8", "--prefix-tokens", "256", "--prefixes", "2"]
    turns = ["--workload", "multi-turn", "--turns", "3", "--think", "0.05", "--rate", "20", "--requests", "20"]
    plot = ["--plot", str(tmp_path / "bench.svg"), "--slo-ttft-ms", "60000"]
    status, said, report = run(front.url, tmp_path, *lengths, *turns, *plot)
    assert status == 0, said
    summary = report["summary"]
    assert (summary["sent"], summary["complete"], summary["good"], summary["failures"]) == (20, 20, 20, {})
    assert summary["output_tokens"] == 160
    assert summary["cached_tokens"] > 0.3 * summary["prompt_tokens"]
    assert report["settings"]["model"] == MODEL
    assert sorted(row["turn"] for row in report["requests"]) == [0] * 7 + [1] * 7 + [2] * 6
    assert all(row["first"] >= row["sent"] >= row["scheduled"] for row in report["requests"])
    assert "20 of 20 answers are whole" in " ".join(said.split())
    assert (tmp_path / "bench.svg").read_text().startswith("<svg")


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_a_trace_is_replayed_when_it_says(front: Process, tmp_path: Path, api: str) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("timestamp,input_tokens,output_tokens\n100,50,3\n101,60,4\n")
    status, said, report = run(front.url, tmp_path, "--workload", "trace", "--file", str(trace), "--api", api)
    assert status == 0, said
    assert [row["scheduled"] for row in report["requests"]] == [0.0, 1.0]
    assert [row["output_tokens"] for row in report["requests"]] == [3, 4]


def test_a_server_that_dies_is_counted_by_what_was_lost(tmp_path: Path) -> None:
    with simulated("--step-ms", "20", "--api", "openai") as server:
        process = bench(
            server.url, "--rate", "20", "--requests", "40", "--output-tokens", "100", "--json", str(tmp_path / "j.json")
        )
        harness.eventually(lambda: "wherry_num_requests_running" in httpx.get(server.url + "/metrics").text)
        harness.eventually(lambda: _running(server.url) >= 5)
        server.kill()
        said, _ = process.communicate(timeout=100)
    assert process.returncode == 0, said
    summary = json.loads((tmp_path / "j.json").read_text())["summary"]
    assert summary["sent"] == 40
    assert summary["failures"]["cut off"] >= 1  # these had begun
    assert summary["failures"]["no connection"] >= 1  # and these came later
    assert sum(summary["failures"].values()) == summary["failed"] == 40 - summary["complete"]
    assert "failed: cut off" in said


def _running(url: str) -> float:
    lines = httpx.get(url + "/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith("wherry_num_requests_running{"))


def test_refusals_are_counted_by_status(tmp_path: Path) -> None:
    with simulated("--step-ms", "50", "--max-running", "1", "--max-queued", "0", "--api", "openai") as server:
        limits = ["--arrival", "burst", "--burst", "5", "--requests", "5", "--output-tokens", "20"]
        status, said, report = run(server.url, tmp_path, *limits)
    assert status == 0, said
    assert report["summary"]["complete"] == 1
    assert report["summary"]["failures"] == {"HTTP 429": 4}


def test_interrupted_it_shows_what_it_has(tmp_path: Path) -> None:
    with simulated(*FAST, "--api", "openai") as server:
        process = bench(server.url, "--rate", "50", "--duration", "300", "--output-tokens", "4", "--input-tokens", "8")
        harness.eventually(lambda: _answered(server.url) > 10)
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        said, _ = process.communicate(timeout=30)
        assert time.monotonic() - began < 20
    assert process.returncode == 130
    assert "answers are whole" in " ".join(said.split())


def _answered(url: str) -> float:
    lines = httpx.get(url + "/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("wherry_generation_tokens_total{")) / 4


@pytest.mark.parametrize(
    "args, told",
    [
        (["--model", "other"], "serves chat, not other"),
        (["--plot", "x.png"], "--plot writes SVG"),
        (["--think", "inf"], "finite number"),
        (["--rate", "0"], "--rate"),
    ],
)
def test_wrong_options_are_told(front: Process, tmp_path: Path, args: list[str], told: str) -> None:
    status, said, _ = run(front.url, tmp_path, *args)
    assert status in (1, 2)
    assert told in " ".join(said.split())
