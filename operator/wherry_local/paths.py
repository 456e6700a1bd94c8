"""Where local mode keeps things."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

ENV_HOME = "WHERRY_LOCAL_HOME"
# Markers in the environment of everything local mode starts: see processes.py.
ENV_MARK = "WHERRY_LOCAL_CLUSTER"
ENV_MARK_NODE = "WHERRY_LOCAL_NODE"
ENV_MARK_CONTAINER = "WHERRY_LOCAL_CONTAINER"


def cache_root() -> Path:
    """`$WHERRY_CACHE`, else `$XDG_CACHE_HOME/wherry`, else `~/.cache/wherry`."""
    if explicit := os.environ.get("WHERRY_CACHE"):
        return Path(explicit).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache").absolute() / "wherry"


def default_home() -> Path:
    """`$WHERRY_LOCAL_HOME`, else `<cache root>/local`."""
    explicit = os.environ.get(ENV_HOME)
    return Path(explicit).expanduser().absolute() if explicit else cache_root() / "local"


def project_root() -> Path:
    """The checkout that this package runs from; meaningful only where one exists."""
    return Path(__file__).resolve().parents[2]


def executables() -> Path:
    """The directory of this Python's console scripts (`wherry-runtime` and its peers)."""
    return Path(sys.executable).absolute().parent


@dataclass(frozen=True)
class Home:
    """The state directory of one local cluster; everything the cluster writes is in it."""

    root: Path

    @property
    def settings(self) -> Path:
        """Addresses and ports, chosen once."""
        return self.root / "settings.json"

    @property
    def desired(self) -> Path:
        """The processes that should run; the command line writes it, the supervisor reads it."""
        return self.root / "desired.json"

    @property
    def state(self) -> Path:
        """The processes that do run; the supervisor writes it."""
        return self.root / "state.json"

    @property
    def lock(self) -> Path:
        """Held while a command changes the cluster."""
        return self.root / ".lock"

    @property
    def kubeconfig(self) -> Path:
        """For the user: cluster-admin."""
        return self.root / "kubeconfig"

    @property
    def pki(self) -> Path:
        """Keys and certificates."""
        return self.root / "pki"

    @property
    def etcd(self) -> Path:
        """The cluster's data."""
        return self.root / "etcd"

    def log(self, component: str) -> Path:
        """The log file of a supervised process."""
        return self.root / "logs" / f"{component}.log"

    def node(self, name: str) -> Path:
        """The directory of one process node: its pods, their volumes and logs."""
        return self.root / "nodes" / name
