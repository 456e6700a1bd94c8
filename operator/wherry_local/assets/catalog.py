"""Which binaries there are, where their official releases lie, and how each is built from source."""

import platform
from dataclasses import dataclass

from wherry_local.errors import LocalError

KUBERNETES, ETCD, COREDNS, CONTAINERD, KIND, HELM = "1.36.3", "3.6.16", "1.14.2", "2.3.7", "0.33.0", "4.3.1"

_GITHUB = "https://github.com"
LOCAL = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl")
KIND_SET = (
    *LOCAL,
    "kubelet",
    "kubeadm",
    "kube-proxy",
    "coredns",
    "containerd",
    "containerd-shim-runc-v2",
    "ctr",
    "kind",
    "helm",
)


@dataclass(frozen=True)
class Asset:
    """One binary.

    `checksums` is a file of `<sha256>  <name>` lines, or of one bare sum, for what `url` gives. `member` is the path
    in the archive that `url` gives, empty when it gives the binary itself. `module` is the Go module, `package` the
    command in it. `replaces` is true where the module's own go.mod replaces others, which `go install` refuses.
    """

    name: str
    version: str
    url: str
    checksums: str
    member: str
    module: str
    package: str
    replaces: bool = False


def machine() -> str:
    """This machine's architecture as Go names it. Raises LocalError where no release exists for it."""
    names = {"x86_64": "amd64", "aarch64": "arm64"}
    if platform.system() != "Linux" or platform.machine() not in names:
        raise LocalError(
            f"local mode runs on Linux, x86_64 or aarch64; this is {platform.system()} {platform.machine()}"
        )
    return names[platform.machine()]


def _kubernetes(name: str, arch: str) -> Asset:
    url = f"https://dl.k8s.io/release/v{KUBERNETES}/bin/linux/{arch}/{name}"
    package = f"k8s.io/kubernetes/cmd/{name}"
    return Asset(name, KUBERNETES, url, f"{url}.sha256", "", "k8s.io/kubernetes", package, replaces=True)


def _containerd(name: str, arch: str) -> Asset:
    base = f"{_GITHUB}/containerd/containerd/releases/download/v{CONTAINERD}"
    url = f"{base}/containerd-static-{CONTAINERD}-linux-{arch}.tar.gz"
    module = "github.com/containerd/containerd/v2"
    return Asset(name, CONTAINERD, url, f"{url}.sha256sum", f"bin/{name}", module, f"{module}/cmd/{name}")


def catalog() -> dict[str, Asset]:
    """Every binary for this machine, by name."""
    arch = machine()
    etcd = f"{_GITHUB}/etcd-io/etcd/releases/download/v{ETCD}"
    coredns = f"{_GITHUB}/coredns/coredns/releases/download/v{COREDNS}/coredns_{COREDNS}_linux_{arch}.tgz"
    kind = f"{_GITHUB}/kubernetes-sigs/kind/releases/download/v{KIND}/kind-linux-{arch}"
    helm = f"https://get.helm.sh/helm-v{HELM}-linux-{arch}.tar.gz"
    archive = f"etcd-v{ETCD}-linux-{arch}"
    etcd_module, coredns_module = "go.etcd.io/etcd/server/v3", "github.com/coredns/coredns"
    assets = [_kubernetes(name, arch) for name in KIND_SET if name.startswith("kube")]
    assets += [_containerd(name, arch) for name in ("containerd", "containerd-shim-runc-v2", "ctr")]
    assets += [
        Asset(
            "etcd",
            ETCD,
            f"{etcd}/{archive}.tar.gz",
            f"{etcd}/SHA256SUMS",
            f"{archive}/etcd",
            etcd_module,
            etcd_module,
            replaces=True,
        ),
        Asset(
            "coredns", COREDNS, coredns, f"{coredns}.sha256", "coredns", coredns_module, coredns_module, replaces=True
        ),
        Asset("kind", KIND, kind, f"{kind}.sha256sum", "", "sigs.k8s.io/kind", "sigs.k8s.io/kind"),
        Asset(
            "helm", HELM, helm, f"{helm}.sha256sum", f"linux-{arch}/helm", "helm.sh/helm/v4", "helm.sh/helm/v4/cmd/helm"
        ),
    ]
    return {asset.name: asset for asset in assets}
