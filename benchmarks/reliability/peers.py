"""Installs the other routers, each in an environment of its own: `python -m benchmarks.reliability.peers [NAME…]`."""

import subprocess
import sys
from pathlib import Path

from benchmarks.engine.models import CACHE

from wherry_cli.progress import step

PEERS = CACHE / "peers"
VERSIONS = {"vllm-router": "0.1.17", "sglang-router": "0.3.2"}


def python(name: str) -> Path:
    """The interpreter of a peer's environment."""
    return PEERS / name / "bin" / "python"


def installed(name: str) -> bool:
    """Whether the pinned version is there."""
    note = PEERS / name / "version"
    return note.exists() and note.read_text() == VERSIONS[name]


def install(name: str) -> None:
    """Makes the environment."""
    directory = PEERS / name
    subprocess.run([sys.executable, "-m", "venv", "--clear", directory], check=True)
    subprocess.run([python(name), "-m", "pip", "install", "--quiet", f"{name}=={VERSIONS[name]}"], check=True)
    (directory / "version").write_text(VERSIONS[name])


def main(names: list[str]) -> None:
    for name in names or list(VERSIONS):
        if not installed(name):
            with step(f"Installing {name}"):
                install(name)


if __name__ == "__main__":
    main(sys.argv[1:])
