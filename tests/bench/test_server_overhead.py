"""The comparison of server and engine: its arithmetic, and one small real run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.engine import models
from benchmarks.server_overhead import rate

from wherry_cli.bench_times import Stream


def test_rate_counts_from_the_first_request_to_the_last_token() -> None:
    found = rate([Stream(1.0, [2.0, 3.0, 4.0]), Stream(2.0, [4.0, 6.0, 8.0])])
    assert found == pytest.approx({"rate": 6 / 7, "gap_s": 1.5, "first_token_s": 1.5})


def compare(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.server_overhead", "--rounds", "1", "--runs", "1", *args]
    return subprocess.run(command, cwd=models.ROOT, capture_output=True, text=True, timeout=250)


def test_a_small_run(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    sizes = ("--clients", "3", "--new-tokens", "8", "--prompt-tokens", "8", "--threads", "1")
    done = compare(*sizes, "--json", str(out), "--", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["ratios"][0] > 0
    assert "| --dtype float32 | 3 |" in result["table"]
    assert "server / engine" in done.stdout


def test_a_server_that_does_not_start_is_told() -> None:
    done = compare("--clients", "2", "--new-tokens", "8", "--", "--dtype", "float8")
    assert done.returncode != 0
    assert "invalid choice: 'float8'" in done.stderr
