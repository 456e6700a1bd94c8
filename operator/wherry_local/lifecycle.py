"""What the commands do: up, down, and what harms and heals nodes. Progress goes to a callback; nothing is printed."""

import asyncio
import contextlib
import datetime
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from wherry_local import addresses as ranges
from wherry_local.addresses import Addresses
from wherry_local.components import Component, Options, components, write_credentials
from wherry_local.errors import LocalError
from wherry_local.files import locked, read_json, write_json
from wherry_local.kube import UNREACHABLE, ApiError, Kube, Object
from wherry_local.node.logs import parse_time
from wherry_local.paths import ENV_MARK, ENV_MARK_NODE, Home
from wherry_local.processes import Identity, kill_marked, marked, signal_marked, wait_gone

Report = Callable[[str], None]
Progress = Callable[[str], contextlib.AbstractContextManager[Report]]

_READY_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 45.0
_PODS_GRACE_S = 10.0


@contextlib.contextmanager
def quiet(_: str) -> Iterator[Report]:
    """Progress that nobody sees."""
    yield lambda _: None


class Cluster:
    """One local cluster, by its state directory."""

    def __init__(self, root: Path) -> None:
        self.home = Home(root.absolute())

    # What is there

    def state(self) -> dict[str, Any]:
        """The supervisor's state; empty when there has been none."""
        return dict(read_json(self.home.state) or {})

    def supervisor(self) -> Identity | None:
        """The live supervisor, or None."""
        identity = Identity.from_json(self.state().get("supervisor"))
        return identity if identity is not None and identity.alive() else None

    def running(self) -> bool:
        """True between `up` and `down`."""
        return self.supervisor() is not None

    def desired(self) -> list[Component]:
        """What the supervisor keeps running."""
        return [Component(**item) for item in read_json(self.home.desired) or []]

    def node_names(self) -> list[str]:
        """Names of the process nodes."""
        return [component.name for component in self.desired() if component.name.startswith("node-")]

    def kube(self) -> Kube:
        """A client with the admin's certificate. Raises LocalError when the cluster was never started."""
        if not self.home.kubeconfig.exists():
            raise LocalError("there is no local cluster: start one with `wherry local up`")
        return Kube(self.home.kubeconfig)

    # Up

    def up(self, options: Options, assets: Path, crds: list[Path], progress: Progress = quiet) -> None:
        """Start what is not running and wait until it serves; run again, it changes only what differs.

        Raises LocalError, with the end of the log of the component that is at fault, when it does not get ready.
        """
        with locked(self.home.lock):
            addresses = self._addresses()
            began = datetime.datetime.now(datetime.UTC)
            since = None if self.running() else began  # nodes of a stopped cluster still look Ready in its data
            old = {component.name: component for component in self.desired()}
            names = [f"node-{number}" for number in range(1, options.nodes + 1)]
            with progress("keys, certificates and kubeconfig"):
                write_credentials(self.home, addresses, names)
            wanted = components(self.home, addresses, assets, options)
            removed = [name for name in old if name.startswith("node-") and name not in names]
            base = [component for component in wanted if component.name != "wherry-operator"]
            keep = [item for item in wanted if item.name == "wherry-operator" and item.name in old]
            self._write_desired(base + keep)
            self._ensure_supervisor()
            for component in base:
                if not component.name.startswith("node-"):
                    with progress(component.name):
                        self._wait_component(component.name)
            with progress("custom resource definitions"):
                asyncio.run(self._apply_crds(crds))
            self._write_desired(wanted)
            self._reload()
            with progress(f"{len(names)} nodes Ready"):
                asyncio.run(self._wait_nodes(names, removed, since))
            for name in removed:
                kill_marked(ENV_MARK_NODE, str(self.home.node(name)))
                shutil.rmtree(self.home.node(name), ignore_errors=True)
            if options.operator:
                with progress("wherry-operator"):
                    self._wait_component("wherry-operator")

    def _addresses(self) -> Addresses:
        saved = read_json(self.home.settings)
        if saved is None:
            chosen = ranges.choose(self.home.root)
            write_json(self.home.settings, chosen.to_json())
            return chosen
        if not self.running():
            ranges.hold(saved["slot"]).close()
        return Addresses(**saved)

    def _write_desired(self, wanted: list[Component]) -> None:
        write_json(self.home.desired, [component.to_json() for component in wanted])

    def _reload(self) -> None:
        if (supervisor := self.supervisor()) is not None:
            supervisor.send(signal.SIGHUP)

    def _ensure_supervisor(self) -> None:
        if self.running():
            self._reload()
            return
        log = self.home.log("supervisor")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "wherry_local.supervisor", str(self.home.root)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=os.environ | {ENV_MARK: str(self.home.root)},
                cwd=self.home.root,
                start_new_session=True,
            )
        deadline = time.monotonic() + 20
        while self.supervisor() is None:
            if process.poll() is not None or time.monotonic() > deadline:
                raise LocalError(f"the supervisor did not start:\n{self.log_tail('supervisor')}")
            time.sleep(0.05)
        process.returncode = 0  # it lives on by itself; keeps Popen from warning that nobody waited for it

    def log_tail(self, component: str, lines: int = 15) -> str:
        """The end of a component's log."""
        path = self.home.log(component)
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else "(no log)"

    def _wait_component(self, name: str) -> None:
        deadline = time.monotonic() + _READY_TIMEOUT_S
        while True:
            entry = (self.state().get("components") or {}).get(name) or {}
            if entry.get("ready"):
                return
            if not self.running():
                raise LocalError(f"the supervisor ended:\n{self.log_tail('supervisor')}")
            if entry.get("restarts", 0) >= 3 or time.monotonic() > deadline:
                raise LocalError(f"{name} does not start; the end of {self.home.log(name)}:\n{self.log_tail(name)}")
            time.sleep(0.05)

    async def _apply_crds(self, files: list[Path]) -> None:
        async with self.kube() as kube:
            paths = []
            for file in files:
                for crd in yaml.safe_load_all(file.read_text()):
                    path = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{crd['metadata']['name']}"
                    await kube.apply(path, crd, "wherry-local")
                    paths.append(path)
            for path in paths:
                await _until(lambda path=path: _established(kube, path), f"{path} to be Established")  # type: ignore[misc]

    async def _wait_nodes(self, names: list[str], removed: list[str], since: datetime.datetime | None) -> None:
        async with self.kube() as kube:
            for name in removed:
                await kube.delete(f"/api/v1/nodes/{name}")
            stopped = {component.name for component in self.desired() if not component.run}
            for name in names:
                if name not in stopped:
                    await _until(lambda name=name: _node_ready(kube, name, since), f"{name} to be Ready")  # type: ignore[misc]

    # Down

    def down(self, *, purge: bool = False, progress: Progress = quiet) -> None:
        """End every process of the cluster; with `purge`, delete its data too. It is no error if nothing runs."""
        if not self.home.root.exists():
            return
        with locked(self.home.lock):
            with progress("pods"):
                self._stop_pods()
            with progress("control plane"):
                supervisor = self.supervisor()
                if supervisor is not None:
                    supervisor.send(signal.SIGTERM)
                    if wait_gone([supervisor], _STOP_TIMEOUT_S):
                        supervisor.send(signal.SIGKILL)
                kill_marked(ENV_MARK, str(self.home.root))
            if purge:
                with progress("data"):
                    shutil.rmtree(self.home.root, ignore_errors=True)

    def _stop_pods(self) -> None:
        """End the nodes, then their pods' processes: politely first."""
        stopped = [replace(item, run=False) if item.name in self.node_names() else item for item in self.desired()]
        self._write_desired(stopped)
        nodes = self._identities(self.node_names())
        markers = [str(self.home.node(name)) for name in self.node_names()]
        for identity in nodes:
            identity.send(signal.SIGKILL)  # nothing is lost: a node keeps all it knows in files
        wait_gone(nodes, 5)
        for marker in markers:
            signal_marked(ENV_MARK_NODE, marker, signal.SIGTERM)
            signal_marked(ENV_MARK_NODE, marker, signal.SIGCONT)  # a frozen process sees SIGTERM only then
        deadline = time.monotonic() + _PODS_GRACE_S
        while any(marked(ENV_MARK_NODE, marker) for marker in markers) and time.monotonic() < deadline:
            time.sleep(0.1)
        for marker in markers:
            kill_marked(ENV_MARK_NODE, marker)

    def _identities(self, names: list[str]) -> list[Identity]:
        entries = self.state().get("components") or {}
        return [identity for name in names if (identity := Identity.from_json(entries.get(name))) is not None]

    # Trouble

    def _node(self, name: str) -> str:
        name = f"node-{name}" if name.isdigit() else name
        if name not in self.node_names():
            raise LocalError(f"there is no node {name!r}; there are {', '.join(self.node_names()) or 'none'}")
        if not self.running():
            raise LocalError("the local cluster does not run: start it with `wherry local up`")
        return name

    def _set_run(self, name: str, run: bool) -> None:
        desired = [replace(item, run=run) if item.name == name else item for item in self.desired()]
        self._write_desired(desired)
        self._reload()

    def kill_node(self, node: str) -> str:
        """SIGKILL the node and all processes of its pods, as a power failure would; returns the node's name."""
        with locked(self.home.lock):
            name = self._node(node)
            self._set_run(name, False)
            kill_marked(ENV_MARK_NODE, str(self.home.node(name)))
        return name

    def freeze_node(self, node: str) -> str:
        """SIGSTOP the node and all processes of its pods; returns the node's name."""
        with locked(self.home.lock):
            name = self._node(node)
            signal_marked(ENV_MARK_NODE, str(self.home.node(name)), signal.SIGSTOP)
        return name

    def start_node(self, node: str) -> str:
        """Bring a killed or frozen node back; returns the node's name."""
        with locked(self.home.lock):
            name = self._node(node)
            signal_marked(ENV_MARK_NODE, str(self.home.node(name)), signal.SIGCONT)
            self._set_run(name, True)
        return name


async def _until(check: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while True:
        with contextlib.suppress(ApiError, *UNREACHABLE):
            if await check():
                return
        if time.monotonic() > deadline:
            raise LocalError(
                f"waited {_READY_TIMEOUT_S:g} s for {what}; see `wherry local status` and `wherry local logs`"
            )
        await asyncio.sleep(0.1)


def _condition(item: Object | None, kind: str) -> bool:
    conditions = ((item or {}).get("status") or {}).get("conditions") or []
    return any(condition["type"] == kind and condition["status"] == "True" for condition in conditions)


async def _established(kube: Kube, path: str) -> bool:
    return _condition(await kube.find(path), "Established")


async def _node_ready(kube: Kube, name: str, since: datetime.datetime | None) -> bool:
    if since is not None:
        lease = await kube.get(f"/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/{name}")
        if parse_time(lease["spec"]["renewTime"]) < since.replace(microsecond=0):
            return False
    node = await kube.find(f"/api/v1/nodes/{name}")
    return _condition(node, "Ready") and not (node or {}).get("spec", {}).get("taints")
