"""Kubeconfig files. Keys are named by path or, for pods, a bearer token by its file, so that none is copied."""

from pathlib import Path
from typing import Any

import yaml


def _document(server: str, authority: Path, user: dict[str, Any], namespace: str) -> str:
    context = {"cluster": "wherry-local", "user": "wherry-local", "namespace": namespace}
    return yaml.safe_dump(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {"name": "wherry-local", "cluster": {"server": server, "certificate-authority": str(authority)}}
            ],
            "users": [{"name": "wherry-local", "user": user}],
            "contexts": [{"name": "wherry-local", "context": context}],
            "current-context": "wherry-local",
        },
        sort_keys=False,
    )


def kubeconfig(server: str, pki: Path, name: str) -> str:
    """A kubeconfig that authenticates by the client certificate `<pki>/<name>.crt`."""
    user = {"client-certificate": str(pki / f"{name}.crt"), "client-key": str(pki / f"{name}.key")}
    return _document(server, pki / "ca.crt", user, "default")


def pod_kubeconfig(server: str, authority: Path, token_file: Path, namespace: str) -> str:
    """A kubeconfig for a pod: its bound token, read from a file that the node keeps fresh."""
    return _document(server, authority, {"tokenFile": str(token_file)}, namespace)
