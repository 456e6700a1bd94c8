"""The operator's command line."""

import argparse
import os
import socket
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from wherry_operator.desired.common import RenderSettings
from wherry_operator.planning.types import Settings

NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


@dataclass(frozen=True)
class OperatorSettings:
    """What the operator was started with. No namespaces: all of them."""

    namespaces: tuple[str, ...]
    runtime_image: str
    router_image: str
    service_url: Literal["dns", "ip"]
    leader_election: bool
    leader_election_namespace: str
    leader_election_name: str
    identity: str
    health_host: str
    health_port: int
    resync_s: float
    kubeconfig: str | None
    log_format: Literal["text", "json"]
    log_level: str

    def planning(self) -> Settings:
        """The part that plans depend on."""
        return Settings(RenderSettings(self.runtime_image, self.router_image), self.service_url, wherry_version())


def wherry_version() -> str:
    """The installed version of Wherry."""
    try:
        return version("wherry")
    except PackageNotFoundError:
        return "unknown"


def own_namespace() -> str:
    """The namespace that this process runs in; `default` outside of a cluster."""
    if name := os.environ.get("POD_NAMESPACE"):
        return name
    return NAMESPACE_FILE.read_text().strip() if NAMESPACE_FILE.exists() else "default"


def argument_parser() -> argparse.ArgumentParser:
    """The flags; each has its default in its help."""
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(prog="wherry-operator", allow_abbrev=False, formatter_class=form)
    add = parser.add_argument
    add("--namespace", action="append", default=[], metavar="NAME", help="serve this namespace only; repeatable")
    add("--runtime-image", default="wherry-runtime:latest", help="image of runtime pods without spec.image")
    add("--router-image", default="wherry-router:latest", help="image of router pods without spec.router.image")
    add("--service-url", choices=("dns", "ip"), default="dns", help="whether status.url has a name or an address")
    add("--leader-election", action=argparse.BooleanOptionalAction, default=True, help="act only while leading")
    add("--leader-election-namespace", default=own_namespace(), metavar="NAME", help="where the lease is")
    add("--leader-election-name", default="wherry-operator", metavar="NAME", help="name of the lease")
    add("--health-host", default="0.0.0.0", help="address of /healthz, /readyz and /metrics")
    add("--health-port", type=int, default=8081, help="their port; 0 picks a free one")
    add("--resync", type=float, default=60.0, metavar="SECONDS", help="look at everything this often")
    add("--kubeconfig", default=None, metavar="FILE", help="else $KUBECONFIG, the service account, ~/.kube/config")
    add("--log-format", choices=("text", "json"), default="text", help="one line of text or of JSON per entry")
    add("--log-level", choices=("debug", "info", "warning", "error"), default="info", help="least severe level shown")
    return parser


def from_args(argv: Sequence[str]) -> OperatorSettings:
    """The settings that `argv` names; argparse exits with status 2 when it cannot be read."""
    given = argument_parser().parse_args(argv)
    identity = f"{os.environ.get('POD_NAME') or socket.gethostname()}_{uuid.uuid4().hex[:8]}"
    return OperatorSettings(
        namespaces=tuple(dict.fromkeys(given.namespace)),
        runtime_image=given.runtime_image,
        router_image=given.router_image,
        service_url=given.service_url,
        leader_election=given.leader_election,
        leader_election_namespace=given.leader_election_namespace,
        leader_election_name=given.leader_election_name,
        identity=identity,
        health_host=given.health_host,
        health_port=given.health_port,
        resync_s=given.resync,
        kubeconfig=given.kubeconfig,
        log_format=given.log_format,
        log_level=given.log_level,
    )
