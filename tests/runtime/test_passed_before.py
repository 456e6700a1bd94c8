"""A run is repeated when, and only when, something that it reads has changed."""

import json
from pathlib import Path

import pytest
from tests.runtime import passed_before
from tests.runtime.passed_before import ENV_READ, Run

KERNEL, READ, OTHER = "runtime/wherry_runtime/kernels/cpu/src/a.cpp", "tests/read.py", "tests/other.py"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout in small, with one run that has passed."""
    for name in (KERNEL, "runtime/wherry_runtime/kernels/cpu/build.py", READ, OTHER, "constraints.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("as it was")
    monkeypatch.setattr(passed_before, "ROOT", tmp_path)
    monkeypatch.setenv("WHERRY_CACHE", str(tmp_path / "cache"))
    run = Run("test", "avx2")
    assert not run.passed_before()
    Path(run.environment[ENV_READ]).write_text(json.dumps([READ]))
    run.passed()
    return tmp_path


@pytest.mark.parametrize(
    "changed, passed_before",
    [
        (OTHER, True),
        (READ, False),
        (KERNEL, False),
        ("runtime/wherry_runtime/kernels/cpu/src/new.h", False),
        ("constraints.txt", False),
    ],
)
def test_it_is_repeated_when_what_it_reads_has_changed(root: Path, changed: str, passed_before: bool) -> None:
    assert Run("test", "avx2").passed_before()
    (root / changed).write_text("otherwise")
    assert Run("test", "avx2").passed_before() is passed_before


def test_a_file_that_is_gone_has_changed(root: Path) -> None:
    (root / READ).unlink()
    assert not Run("test", "avx2").passed_before()


@pytest.mark.usefixtures("root")
def test_another_command_is_another_run() -> None:
    assert not Run("test", "amx").passed_before()


def test_one_that_broke_off_has_not_passed(root: Path) -> None:
    run = Run("another")
    with pytest.raises(FileNotFoundError):
        run.passed()
    assert not run.passed_before()
