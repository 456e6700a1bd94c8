"""Memory limits: what a cgroup would do, done by looking at the memory of processes once a second."""

import os
from collections.abc import Mapping
from pathlib import Path


def _own_kib(status: str) -> int:
    """Anonymous and shared memory in a /proc status file, in KiB: what a memory cgroup cannot reclaim."""
    total = 0
    for line in status.splitlines():
        if line.startswith(("RssAnon:", "RssShmem:", "VmSwap:")):
            total += int(line.split()[1])
    return total


def usage(sessions: Mapping[int, str]) -> dict[str, int]:
    """Bytes used by the processes of each session, by the name that `sessions` gives it."""
    used = dict.fromkeys(sessions.values(), 0)
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            session = os.getsid(int(entry.name))
            if session in sessions:
                used[sessions[session]] += _own_kib(Path(f"/proc/{entry.name}/status").read_text()) * 1024
        except OSError:  # it has just ended
            continue
    return used
