"""Runs of tests that need no repetition: they passed, and nothing that they read has changed since.

Build tools keep results in this way. A run is known by its command, its machine's processor, the kernels' sources and
the versions of what it stands on; with it are kept the Python files that it read and their digest. As a plugin of the
run itself this module says which those were; a run that is not pytest's calls `tell`.

    pytest -p tests.runtime.passed_before
"""

import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENV_READ = "WHERRY_TEST_FILES_READ"  # where a run writes the names of what it read


def pytest_unconfigure() -> None:
    """Called by pytest at the run's end."""
    tell()


def tell() -> None:
    """Writes the names of what was read so far, where that was asked for."""
    if target := os.environ.get(ENV_READ):
        files = {Path(f).resolve() for m in list(sys.modules.values()) if (f := getattr(m, "__file__", None))}
        ours = sorted(str(f.relative_to(ROOT)) for f in files if f.suffix == ".py" and f.is_relative_to(ROOT))
        Path(target).write_text(json.dumps([f for f in ours if not f.startswith(".venv")]))


def digest(paths: Iterable[Path]) -> str:
    """Of names and contents. A file that is gone counts as empty."""
    found = hashlib.sha256()
    for path in paths:
        content = path.read_bytes() if path.exists() else b""
        found.update(f"{path.relative_to(ROOT)}\0{len(content)}\0".encode() + content)
    return found.hexdigest()


class Run:
    """One command, which is known again by `words` and by what the kernels are made of."""

    def __init__(self, *words: str) -> None:
        kernels = ROOT / "runtime/wherry_runtime/kernels/cpu"
        sources = [kernels / "build.py", *sorted((kernels / "src").iterdir())]
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = {line for line in lines if line.startswith(("model name", "flags"))}
        stands_on = [platform.python_version(), (ROOT / "constraints.txt").read_text(), *sorted(processor)]
        key = hashlib.sha256("\0".join([digest(sources), *stands_on, *words]).encode()).hexdigest()[:32]
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(os.environ.get("WHERRY_CACHE") or Path(base, "wherry")).expanduser() / "passed"
        folder.mkdir(parents=True, exist_ok=True)
        self._kept = folder / f"{key}.json"
        self.environment = {ENV_READ: str(folder / f"{key}.read")}

    def passed_before(self) -> bool:
        """Whether it did, with the files as they are now."""
        try:
            kept = json.loads(self._kept.read_text())
        except (FileNotFoundError, ValueError):
            return False
        return bool(kept["digest"] == digest(ROOT / name for name in kept["files"]))

    def passed(self) -> None:
        """Keeps that it did."""
        read = Path(self.environment[ENV_READ])
        files = json.loads(read.read_text())
        read.write_text(json.dumps({"files": files, "digest": digest(ROOT / name for name in files)}))
        read.replace(self._kept)
