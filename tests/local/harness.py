"""A local cluster for tests: real control plane, real process nodes, everything under one temporary directory."""

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml

from wherry_local.assets import catalog
from wherry_local.assets.provide import provide
from wherry_local.components import Options
from wherry_local.lifecycle import Cluster, quiet
from wherry_local.paths import ENV_MARK, project_root
from wherry_local.processes import marked

T = TypeVar("T")


def eventually(check: Callable[[], T], what: str, timeout_s: float = 30.0) -> T:
    """The first true value that `check` gives; fails after `timeout_s` saying what was waited for."""
    deadline = time.monotonic() + timeout_s
    while not (value := check()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s:g} s for {what}; last seen: {value!r}")
        time.sleep(0.05)
    return value


class TestCluster:
    """A running local cluster and kubectl for it."""

    __test__ = False

    def __init__(self, root: Path, assets: Path, options: Options) -> None:
        self.cluster = Cluster(root)
        self.home = self.cluster.home
        self.assets = assets
        self.options = options

    def up(self) -> None:
        """Start it, or wait until it is whole."""
        self.cluster.up(self.options, self.assets, sorted((project_root() / "crds").glob("*.yaml")))

    def processes(self) -> list[int]:
        """Every live process that the cluster started."""
        return marked(ENV_MARK, str(self.home.root))

    def command(self, *arguments: str) -> list[str]:
        """kubectl's command line."""
        return [str(self.assets / "kubectl"), f"--kubeconfig={self.home.kubeconfig}", *arguments]

    def kubectl(self, *arguments: str, stdin: str = "", check: bool = True) -> str:
        """Run kubectl and return what it prints, with what it says on stderr where it fails and `check` is off."""
        done = subprocess.run(
            self.command(*arguments), input=stdin, capture_output=True, text=True, timeout=120, check=False
        )
        if check and done.returncode != 0:
            raise AssertionError(f"kubectl {' '.join(arguments)}: {done.stderr}")
        return done.stdout if done.returncode == 0 else done.stdout + done.stderr

    def get(self, *arguments: str) -> dict[str, Any]:
        """`kubectl get … -o json`; empty where there is no such object."""
        text = self.kubectl("get", *arguments, "-o", "json", "--ignore-not-found")
        return dict(json.loads(text)) if text else {}

    def apply(self, *objects: dict[str, Any]) -> None:
        """`kubectl apply` of `objects`."""
        self.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(objects))

    def container(self, pod: str, key: str = "containerStatuses", index: int = 0) -> dict[str, Any]:
        """The status of one container of `pod`; empty where there is none yet."""
        statuses = self.get("pod", pod).get("status", {}).get(key) or [{}]
        return dict(statuses[index])

    def wait_ready(self, pod: str, timeout_s: int = 30) -> dict[str, Any]:
        """Wait until `pod` is Ready and return it."""
        self.kubectl("wait", "--for=condition=Ready", f"pod/{pod}", f"--timeout={timeout_s}s")
        return self.get("pod", pod)


@contextlib.contextmanager
def local_cluster(**options: Any) -> Iterator[TestCluster]:
    """A cluster that is gone, with all its processes, when the block ends. `options` are those of `Options`."""
    assets = provide(catalog.LOCAL, quiet)
    root = Path(tempfile.mkdtemp(prefix="wherry-test-"))
    cluster = TestCluster(root, assets, Options(**options))
    try:
        cluster.up()
        yield cluster
    except BaseException:
        if keep := os.environ.get("WHERRY_TEST_KEEP_LOGS"):
            shutil.copytree(root / "logs", Path(keep), dirs_exist_ok=True)
        raise
    finally:
        cluster.cluster.down(purge=True)
    left = cluster.processes()
    if left:
        raise AssertionError(f"processes survived `down`: {left}")


def pod(name: str, *command: str, container: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    """A pod with one container `main` that runs `command`; `container` adds to it, `spec` to the pod's spec."""
    main = {"name": "main", "image": "none", "command": list(command)} | (container or {})
    spec = {"containers": [main], "terminationGracePeriodSeconds": 5} | spec
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "labels": {"app": name}},
        "spec": spec,
    }


def python(code: str) -> tuple[str, ...]:
    """A command that runs Python code."""
    return ("python3", "-u", "-c", code)


SERVE = """
import http.server, os, signal, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        good = not os.path.exists(os.environ.get("SICK", "/nonexistent"))
        body = os.environ["POD_NAME"].encode()
        self.send_response(200 if good else 503)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
print("serving", flush=True)
http.server.ThreadingHTTPServer((os.environ["POD_IP"], 8000), Handler).serve_forever()
"""


def server(name: str, **spec: Any) -> dict[str, Any]:
    """A pod that answers HTTP on port `http` with its name, 503 while the file $SICK exists."""
    extra = spec.pop("container", {})
    downward = [("POD_IP", "status.podIP"), ("POD_NAME", "metadata.name")]
    env = [{"name": key, "valueFrom": {"fieldRef": {"fieldPath": path}}} for key, path in downward]
    container = {
        "env": env + extra.pop("env", []),
        "ports": [{"name": "http", "containerPort": 8000}],
        "readinessProbe": {"httpGet": {"path": "/", "port": "http"}, "periodSeconds": 1, "failureThreshold": 1},
    }
    return pod(name, *python(SERVE), container=container | extra, **spec)
