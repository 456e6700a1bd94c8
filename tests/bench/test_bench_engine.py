"""`wherry bench engine`: what it measures, shows and writes, and what it says when it cannot."""

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import numpy as np
import pytest
import torch

from wherry_cli import bench_machine
from wherry_cli.bench import NOT_FLAGS, Failure, numbers
from wherry_cli.bench_chart import Chart, Line, page, ticks
from wherry_cli.bench_engine import Spread
from wherry_cli.bench_times import Stream, percentiles, steady, step_times
from wherry_cli.main import load_command
from wherry_protocol.engine_config import EngineConfig

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "models" / "tiny"


def bench(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "wherry_cli.main", "bench", "engine", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)


def options(*path: str) -> set[str]:
    command = load_command(path[0])
    for name in path[1:]:
        command = command.commands[name]
    return {p.name for p in command.params}


# `wherry serve` is engine and OpenAI API in one process: nobody speaks the worker API there, or asks for /health.
OF_WORKERS = {"worker_tls", "worker_tls_name", "probe_port", "measure_quality"}


@pytest.mark.parametrize(
    "path, without",
    [(("bench", "engine"), set(NOT_FLAGS)), (("serve",), {"model_uri"} | OF_WORKERS)],
    ids=["bench", "serve"],
)
def test_every_engine_setting_is_a_flag(path: tuple[str, ...], without: set[str]) -> None:
    assert {f.name for f in msgspec.structs.fields(EngineConfig)} - options(*path) == without


@pytest.mark.parametrize("text, expected", [("1", [1]), ("8,1,8", [1, 8]), (" 2 , 4,", [2, 4])])
def test_numbers(text: str, expected: list[int]) -> None:
    assert numbers(text) == expected


@pytest.mark.parametrize("text", ["", ",", "0", "1,-2", "one", "1.5"])
def test_numbers_that_are_none(text: str) -> None:
    with pytest.raises(Failure, match="list of positive numbers"):
        numbers(text)


def test_steady_counts_tokens_while_all_run() -> None:
    first = Stream(0.0, [float(t) for t in range(1, 11)])  # 1 … 10
    second = Stream(0.0, [t + 2.5 for t in range(1, 11)])  # 3.5 … 12.5
    rate, gaps = steady([first, second])
    # From the second's fourth token (6.5) to the first's last (10): 7, 8, 9, 10 and 7.5, 8.5, 9.5.
    assert rate == pytest.approx(7 / 3.5)
    assert gaps == [1.0] * 6


def test_steady_needs_requests_that_run_together() -> None:
    early, late = Stream(0.0, [0.1 * i for i in range(8)]), Stream(0.0, [5 + 0.1 * i for i in range(8)])
    with pytest.raises(Failure, match="did not run at the same time"):
        steady([early, late])


def test_step_times_end_with_the_last_stream() -> None:
    assert step_times([Stream(0, [1.0, 2.0, 3.0]), Stream(0, [1.5, 2.0, 4.0])]) == [0.5, 2.0]


@pytest.mark.parametrize("values, p50, p99", [([3.0], 3.0, 3.0), ([1.0, 2.0, 3.0], 2.0, 2.98)])
def test_percentiles(values: list[float], p50: float, p99: float) -> None:
    found = percentiles(values)
    assert (found["p50"], found["p99"]) == pytest.approx((p50, p99))


class Holder:
    """Stands for an object of the engine."""

    __module__ = "wherry_test"
    __slots__ = ("slotted",)

    def __init__(self, value: object) -> None:
        self.slotted = value


@pytest.mark.parametrize(
    "build, expected",
    [
        (lambda: torch.zeros(10), 40),
        (lambda: (lambda t: [t, t[:5], {"view": t.view(2, 5)}])(torch.zeros(10)), 40),
        (lambda: (lambda a: [a, a[3:]])(np.zeros(8, np.int64)), 64),
        (lambda: Holder(Holder((torch.zeros(4, dtype=torch.int8), np.zeros(4, np.int8)))), 8),
        (lambda: (lambda t: [t, t.numpy()])(torch.zeros(10)), 40),
        (lambda: (lambda h: [h, setattr(h, "slotted", h)])(Holder(None)), 0),
    ],
)
def test_tensors_in_objects_are_found(build: object, expected: int) -> None:
    held = build()  # type: ignore[operator]
    assert bench_machine.covered(bench_machine.tensor_spans(held)) == expected


@pytest.mark.parametrize(
    "spans, but, expected",
    [
        ([], [], 0),
        ([(0, 10), (5, 20), (20, 30)], [], 30),
        ([(0, 10), (2, 4)], [(3, 6)], 7),
        ([(0, 10)], [(0, 10)], 0),
        ([(0, 10)], [(20, 30)], 10),
    ],
)
def test_memory_is_counted_once(spans: list[tuple[int, int]], but: list[tuple[int, int]], expected: int) -> None:
    assert bench_machine.covered(spans, but) == expected


def test_bandwidth_is_positive() -> None:
    assert bench_machine.read_bandwidth(1, torch.device("cpu")) > 1e8


@pytest.mark.parametrize("highest", [0.0, 0.004, 1, 3, 7.2, 10, 99, 100, 1234, 5e6])
def test_ticks_are_few_and_reach_the_top(highest: float) -> None:
    marks = ticks(highest)
    assert marks[0] == 0
    assert 2 <= len(marks) <= 7
    assert marks[-1] >= highest * 0.999


def test_a_picture_is_xml_whatever_names_it_shows() -> None:
    line = Line("a<b & 'c'", [(1, 1.0, 2.0, 3.0), (8, 2.0, 3.0, 4.0)])
    root = ElementTree.fromstring(page([Chart("x & y", "<", ">", [line]), Chart("empty", "", "", [Line("", [])])]))
    assert "a<b & 'c'" in [t.text for t in root.iter("{http://www.w3.org/2000/svg}text")]


def test_spread() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(1.0, 2.0, 3.0)


def test_measures_the_sample_model(tmp_path: Path) -> None:
    out, plot = tmp_path / "out.json", tmp_path / "out.svg"
    sizes = ("--batch", "1,3", "--prompt-tokens", "16,4096", "--context", "8", "--new-tokens", "12", "--runs", "2")
    done = bench(str(TINY), *sizes, "--threads", "1", "--json", str(out), "--plot", str(plot))
    assert done.returncode == 0, done.stderr
    assert "Decode" in done.stdout
    assert "prompts of 4096 tokens" in done.stdout
    report = json.loads(out.read_text())
    assert [d["batch"] for d in report["decode"]] == [1, 3]
    assert [p["prompt_tokens"] for p in report["prefill"]] == [16]
    for row in report["decode"]:
        assert 0 < row["rate"]["low"] <= row["rate"]["median"] <= row["rate"]["high"]
        assert 0 <= row["gap_s"]["p50"] <= row["gap_s"]["p99"]  # a starved reader finds all tokens at once
    memory = report["memory"]
    assert memory["weights"] >= 8e6
    assert memory["process"]["total"] == memory["weights"] + memory["kv_cache"] + memory["beyond"]
    ElementTree.fromstring(plot.read_text())


@pytest.mark.parametrize(
    "args, message",
    [
        (["/no/such/dir"], "there is no directory /no/such/dir"),
        ([str(TINY), "--batch", "two"], "is not a list of positive numbers"),
        ([str(TINY), "--plot", "x.png"], "name it x.svg"),
        ([str(TINY), "--context", "4000"], "more than the model's context"),
    ],
)
def test_mistakes_are_told_without_traceback(args: list[str], message: str) -> None:
    done = bench(*args)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
