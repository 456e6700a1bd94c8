#!/usr/bin/env python3
"""fan_out.py ENGINE NODE…: puts the images in a docker archive on stdin into the containerd of every node at once.
A node is a container's name, or the socket of a containerd on this machine.

Layers that a node holds already are left out of what it is sent, so an edit of our code costs one small layer.
"""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from dataclasses import dataclass, field
from typing import Any, BinaryIO

CTR = ["ctr", "--namespace=k8s.io"]
IMPORT = ["images", "import", "--digests", "--snapshotter=overlayfs", "-"]
OCI = "application/vnd.oci.image"
CHUNK = 1 << 20


@dataclass
class Node:
    """An import that runs in a node, fed an OCI archive blob by blob."""

    name: str
    process: "subprocess.Popen[bytes]"
    held: set[str]
    sent: int = 0
    archive: tarfile.TarFile = field(init=False)

    def __post_init__(self) -> None:
        self.archive = tarfile.open(fileobj=self.process.stdin, mode="w|", bufsize=CHUNK)  # noqa: SIM115

    def add(self, path: str, data: bytes) -> None:
        self.archive.addfile(header(path, len(data)), io.BytesIO(data))
        self.sent += len(data)


def header(path: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(path)
    info.size = size
    return info


def ctr(engine: str, name: str) -> list[str]:
    """`ctr` for that node. Root enters it as it is: a pipe through the engine takes much of a processor."""
    if name.startswith("/"):
        return [CTR[0], f"--address={name}", *CTR[1:]]
    if os.geteuid() != 0:
        return [engine, "exec", "-i", name, *CTR]
    found = subprocess.run([engine, "inspect", "--format", "{{.State.Pid}}", name], capture_output=True, check=True)
    return ["nsenter", "--mount", "--target", found.stdout.decode().strip(), *CTR]


def start(engine: str, name: str) -> Node:
    present = subprocess.run([*ctr(engine, name), "content", "ls", "-q"], capture_output=True, check=True)
    command = [*ctr(engine, name), *IMPORT]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process: subprocess.Popen[bytes] = subprocess.Popen(command, **pipes)  # type: ignore[call-overload]
    return Node(name, process, set(present.stdout.decode().split()))


def copy(source: BinaryIO, digest: str, size: int, nodes: list[Node]) -> None:
    """One blob, to those of the nodes that lack it."""
    lacking = [node for node in nodes if digest not in node.held]
    for node in lacking:
        node.archive.fileobj.write(header(blob_path(digest), size).tobuf())  # type: ignore[union-attr]
        node.sent += size
    while lacking and (chunk := source.read(CHUNK)):
        for node in lacking:
            node.archive.fileobj.write(chunk)  # type: ignore[union-attr]
    for node in lacking:
        node.archive.fileobj.write(b"\0" * (-size % tarfile.BLOCKSIZE))  # type: ignore[union-attr]
        node.held.add(digest)


def blob_path(digest: str) -> str:
    return "blobs/" + digest.replace(":", "/")


def descriptor(kind: str, digest: str, size: int) -> dict[str, Any]:
    return {"mediaType": f"{OCI}.{kind}", "digest": digest, "size": size}


def index(images: list[dict[str, Any]], sizes: dict[str, int], nodes: list[Node]) -> None:
    """The manifests, which a docker archive lacks, and the index of them all."""
    entries = []
    for image in images:
        config, *layers = (digest_of(name) for name in (image["Config"], *image["Layers"]))
        manifest = {
            "schemaVersion": 2,
            "mediaType": f"{OCI}.manifest.v1+json",
            "config": descriptor("config.v1+json", config, sizes[config]),
            "layers": [descriptor("layer.v1.tar", layer, sizes[layer]) for layer in layers],
        }
        data = json.dumps(manifest).encode()
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        for node in nodes:
            node.add(blob_path(digest), data)
        entry = descriptor("manifest.v1+json", digest, len(data))
        for tag in image["RepoTags"]:
            names = {"io.containerd.image.name": tag, "org.opencontainers.image.ref.name": tag.rpartition(":")[2]}
            entries.append(entry | {"annotations": names})
    for node in nodes:
        node.add("index.json", json.dumps({"schemaVersion": 2, "manifests": entries}).encode())
        node.add("oci-layout", b'{"imageLayoutVersion": "1.0.0"}')


def digest_of(name: str) -> str:
    """podman names each file of an archive by the SHA-256 of its content."""
    found = re.fullmatch(r"([0-9a-f]{64})(\.tar|\.json)", name)
    if not found:
        raise SystemExit(f"fan_out: {name!r} in the archive is not named by its digest")
    return f"sha256:{found[1]}"


def main() -> int:
    engine, *names = sys.argv[1:]
    nodes = [start(engine, name) for name in names]
    sizes: dict[str, int] = {}
    images: list[dict[str, Any]] = []
    with tarfile.open(fileobj=sys.stdin.buffer, mode="r|", bufsize=CHUNK) as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isreg() else None
            if content is None:
                continue
            if member.name == "manifest.json":
                images = json.load(content)
            elif "/" not in member.name and member.name != "repositories":  # what is older than manifest.json
                digest = digest_of(member.name)
                if digest not in sizes:
                    sizes[digest] = member.size
                    copy(content, digest, member.size, nodes)
    index(images, sizes, nodes)
    failed = 0
    for node in nodes:
        node.archive.close()
        node.process.stdin.close()  # type: ignore[union-attr]
        errors = node.process.stderr.read().decode()  # type: ignore[union-attr]
        if node.process.wait():
            failed += 1
            print(f"e2e: the import into {node.name} failed: {errors}", file=sys.stderr)
        print(f"e2e: {node.sent >> 20} MB to {node.name}", file=sys.stderr)
    return min(failed, 1)


if __name__ == "__main__":
    raise SystemExit(main())
