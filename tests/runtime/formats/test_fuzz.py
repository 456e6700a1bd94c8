"""A slice of the fuzzing that `tests.runtime.formats.fuzz` does at length."""

import re
import subprocess
import sys
from pathlib import Path


def test_a_slice_finds_nothing() -> None:
    command = [sys.executable, "-m", "tests.runtime.formats.fuzz", "--executions", "8000"]
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    executed = re.search(r"number_of_executed_units:\s+(\d+)", done.stderr)
    assert executed is not None
    assert int(executed[1]) >= 8000
