"""The processes of a local cluster and their command lines.

What differs from a cluster of machines, and why: addresses are loopback ones, which Kubernetes refuses inside
Endpoints, so the endpoint controllers are off and `forwarder` matches Services to pods itself. A lost node is noticed
after 8 s in place of 50 s, since nodes here renew their Lease every 2 s.
"""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from wherry_local.addresses import Addresses
from wherry_local.certs import Authority, signing_key
from wherry_local.files import write_atomic
from wherry_local.kubeconfig import kubeconfig
from wherry_local.paths import ENV_MARK_NODE, Home, executables, project_root

_DISABLED_CONTROLLERS = (
    "endpoints-controller",
    "endpointslice-controller",
    "endpointslice-mirroring-controller",
    "node-ipam-controller",
    "node-route-controller",
    "cloud-node-lifecycle-controller",
    "service-lb-controller",
    "persistentvolume-attach-detach-controller",
    "persistentvolume-expander-controller",
    "bootstrap-signer-controller",
    "token-cleaner-controller",
)

_OPERATOR_PORT = 8081


@dataclass(frozen=True)
class Component:
    """A supervised process. `ready_url` answers once it serves; `after` names what must be ready before it starts."""

    name: str
    argv: list[str]
    env: dict[str, str] = field(default_factory=dict)
    ready_url: str = ""
    after: list[str] = field(default_factory=list)
    stop_grace_s: float = 5.0
    run: bool = True  # False: it was ended on purpose and stays so

    def to_json(self) -> dict[str, Any]:
        """For desired.json."""
        return asdict(self)


@dataclass(frozen=True)
class Options:
    """What `wherry local up` was asked for."""

    nodes: int = 3
    operator: bool = True
    cpu: str = ""  # per node; empty: this machine's
    memory: str = ""
    backoff_scale: float = 1.0


def write_credentials(home: Home, addresses: Addresses, nodes: list[str]) -> None:
    """Make the keys, certificates and kubeconfigs that are missing."""
    pki = home.pki
    cluster, etcd = Authority(pki, "ca"), Authority(pki, "etcd-ca")
    local = [addresses.control_plane, "localhost"]
    etcd.issue("etcd", "etcd", hosts=local)
    etcd.issue("etcd-client", "kube-apiserver")
    names = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"]
    cluster.issue("apiserver", "kube-apiserver", hosts=[*local, addresses.api_service, *names])
    cluster.issue("apiserver-kubelet-client", "kube-apiserver-kubelet-client")
    signing_key(pki, "service-account")
    clients = {"admin": ("wherry-local-admin", ["system:masters"])}
    clients["forwarder"] = ("wherry-local-forwarder", ["system:masters"])
    for name in ("kube-controller-manager", "kube-scheduler"):
        clients[name] = (f"system:{name}", [])
    for name, (user, groups) in clients.items():
        cluster.issue(name, user, groups)
        write_atomic(home.root / f"{name}.kubeconfig", kubeconfig(addresses.api_url, pki, name))
    for number, name in enumerate(nodes, 1):
        cluster.issue(name, f"system:node:{name}", ["system:nodes"], hosts=[addresses.node(number), name])
        write_atomic(home.node(name) / "kubeconfig", kubeconfig(addresses.api_url, pki, name))
    write_atomic(home.kubeconfig, kubeconfig(addresses.api_url, pki, "admin"))


def _etcd(home: Home, addresses: Addresses, assets: Path) -> Component:
    host, pki = addresses.control_plane, home.pki
    client, peer = f"https://{host}:{addresses.etcd_port}", f"http://{host}:{addresses.etcd_peer_port}"
    argv = [
        f"{assets}/etcd",
        "--name=local",
        f"--data-dir={home.etcd}",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=local={peer}",
        f"--cert-file={pki}/etcd.crt",
        f"--key-file={pki}/etcd.key",
        f"--trusted-ca-file={pki}/etcd-ca.crt",
        "--client-cert-auth=true",
        "--auto-compaction-retention=1h",
        "--snapshot-count=5000",
        "--log-level=warn",
    ]
    return Component("etcd", argv, ready_url=f"tcp://{host}:{addresses.etcd_port}")


def _apiserver(home: Home, addresses: Addresses, assets: Path) -> Component:
    pki = home.pki
    argv = [
        f"{assets}/kube-apiserver",
        f"--bind-address={addresses.control_plane}",
        f"--advertise-address={addresses.control_plane}",
        f"--secure-port={addresses.api_port}",
        f"--etcd-servers=https://{addresses.control_plane}:{addresses.etcd_port}",
        f"--etcd-cafile={pki}/etcd-ca.crt",
        f"--etcd-certfile={pki}/etcd-client.crt",
        f"--etcd-keyfile={pki}/etcd-client.key",
        f"--tls-cert-file={pki}/apiserver.crt",
        f"--tls-private-key-file={pki}/apiserver.key",
        f"--client-ca-file={pki}/ca.crt",
        f"--kubelet-certificate-authority={pki}/ca.crt",
        f"--kubelet-client-certificate={pki}/apiserver-kubelet-client.crt",
        f"--kubelet-client-key={pki}/apiserver-kubelet-client.key",
        "--kubelet-preferred-address-types=InternalIP",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={pki}/service-account.pub",
        f"--service-account-signing-key-file={pki}/service-account.key",
        f"--service-cluster-ip-range={addresses.services}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--endpoint-reconciler-type=none",
        "--profiling=false",
        "--allow-privileged=true",
    ]
    return Component("kube-apiserver", argv, ready_url=f"{addresses.api_url}/readyz", after=["etcd"], stop_grace_s=10.0)


def _controller_manager(home: Home, addresses: Addresses, assets: Path) -> Component:
    pki, config = home.pki, home.root / "kube-controller-manager.kubeconfig"
    argv = [
        f"{assets}/kube-controller-manager",
        f"--bind-address={addresses.control_plane}",
        f"--secure-port={addresses.controller_manager_port}",
        f"--kubeconfig={config}",
        f"--authentication-kubeconfig={config}",
        f"--authorization-kubeconfig={config}",
        f"--root-ca-file={pki}/ca.crt",
        f"--service-account-private-key-file={pki}/service-account.key",
        "--use-service-account-credentials=true",
        "--leader-elect=false",
        "--controllers=*," + ",".join(f"-{name}" for name in _DISABLED_CONTROLLERS),
        "--node-monitor-period=1s",
        "--node-monitor-grace-period=8s",
        "--profiling=false",
    ]
    url = f"https://{addresses.control_plane}:{addresses.controller_manager_port}/healthz"
    return Component("kube-controller-manager", argv, ready_url=url, after=["kube-apiserver"])


def _scheduler(home: Home, addresses: Addresses, assets: Path) -> Component:
    config = home.root / "kube-scheduler.kubeconfig"
    argv = [
        f"{assets}/kube-scheduler",
        f"--bind-address={addresses.control_plane}",
        f"--secure-port={addresses.scheduler_port}",
        f"--kubeconfig={config}",
        f"--authentication-kubeconfig={config}",
        f"--authorization-kubeconfig={config}",
        "--leader-elect=false",
        "--profiling=false",
    ]
    url = f"https://{addresses.control_plane}:{addresses.scheduler_port}/healthz"
    return Component("kube-scheduler", argv, ready_url=url, after=["kube-apiserver"])


def node(home: Home, addresses: Addresses, number: int, options: Options) -> Component:
    """A process node; its name is `node-<number>`."""
    name = f"node-{number}"
    argv = [sys.executable, "-m", "wherry_local.node", f"--home={home.root}", f"--name={name}"]
    argv += [f"--address={addresses.node(number)}", f"--pod-network={addresses.pod_network(number)}"]
    argv += [f"--api-service={addresses.api_service}", f"--backoff-scale={options.backoff_scale}"]
    argv += [f"--cpu={options.cpu}"] if options.cpu else []
    argv += [f"--memory={options.memory}"] if options.memory else []
    env = {ENV_MARK_NODE: str(home.node(name))}
    return Component(name, argv, env=env, after=["kube-apiserver"])


def _operator(home: Home, addresses: Addresses) -> Component:
    """The operator; alone in its cluster, it needs no lease and so takes over at once when it is restarted."""
    host = addresses.control_plane
    argv = [str(executables() / "wherry-operator"), f"--kubeconfig={home.root}/admin.kubeconfig", "--service-url=ip"]
    argv += ["--no-leader-election", f"--health-host={host}", f"--health-port={_OPERATOR_PORT}"]
    url = f"http://{host}:{_OPERATOR_PORT}/readyz"
    return Component("wherry-operator", argv, ready_url=url, after=["kube-apiserver"], stop_grace_s=10.0)


def components(home: Home, addresses: Addresses, assets: Path, options: Options) -> list[Component]:
    """Everything that runs, in an order in which it can start."""
    forwarder = [
        sys.executable,
        "-m",
        "wherry_local.forwarder",
        f"--home={home.root}",
        f"--api-url={addresses.api_url}",
    ]
    result = [
        _etcd(home, addresses, assets),
        _apiserver(home, addresses, assets),
        _controller_manager(home, addresses, assets),
        _scheduler(home, addresses, assets),
        Component("service-forwarder", forwarder, after=["kube-apiserver"]),
    ]
    result += [node(home, addresses, number, options) for number in range(1, options.nodes + 1)]
    if options.operator:
        result.append(_operator(home, addresses))
    return result


def sample_models() -> Path:
    """The sample models of the checkout, for pods that name a `sample://` model."""
    return project_root() / "examples" / "models"
