#!/usr/bin/env python3
"""fan_out.py ENGINE NODE…: copies stdin, an image archive, into the containerd of every node at the same time."""

import subprocess
import sys

CHUNK = 1 << 20
IMPORT = ["ctr", "--namespace=k8s.io", "images", "import", "--digests", "--snapshotter=overlayfs", "-"]


def main() -> int:
    engine, *nodes = sys.argv[1:]
    imports = {
        node: subprocess.Popen([engine, "exec", "-i", node, *IMPORT], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        for node in nodes
    }
    size = 0
    broken = set()
    while chunk := sys.stdin.buffer.read(CHUNK):
        size += len(chunk)
        for node, process in imports.items():
            try:
                if node not in broken:
                    process.stdin.write(chunk)  # type: ignore[union-attr]
            except BrokenPipeError:
                broken.add(node)
    failed = []
    for node, process in imports.items():
        if node not in broken:
            process.stdin.close()  # type: ignore[union-attr]
        if process.wait() != 0:
            failed.append(node)
    print(f"e2e: {size >> 20} MB to {', '.join(nodes)}", file=sys.stderr)
    if failed:
        print(f"e2e: the import failed on {', '.join(failed)}", file=sys.stderr)
    return 1 if failed or not size else 0


if __name__ == "__main__":
    raise SystemExit(main())
