"""What this process may use: device, threads and memory, as the cgroup and the machine allow."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from wherry_protocol.naming import ENV_MEMORY_LIMIT
from wherry_runtime.loading.errors import ModelError

CGROUP = Path("/sys/fs/cgroup")
KV_FRACTION = 0.5  # of the memory that is left once the model is loaded; the rest is for activations and the process
GPU_FRACTION = 0.85


@dataclass(frozen=True, slots=True)
class Device:
    """Where the model runs. Everything that differs between CPU and CUDA goes through here."""

    torch: torch.device

    @staticmethod
    def choose(local_rank: int = 0) -> "Device":
        """CUDA where there is a usable one, each rank of a machine its own; else CPU.

        Raises:
            ModelError: bad_setting, for more ranks than GPUs.
        """
        if not torch.cuda.is_available():
            return Device(torch.device("cpu"))
        if local_rank >= (count := torch.cuda.device_count()):
            raise ModelError("bad_setting", f"rank {local_rank} of this pod has no GPU to itself: there are {count}")
        torch.cuda.set_device(local_rank)
        return Device(torch.device("cuda", local_rank) if local_rank else torch.device("cuda"))

    def memory_for_cache(self, workspace: int = 0) -> int:
        """Bytes that the KV cache may take, now that the model is loaded.

        `workspace`: what will be taken besides, where that is known: on a GPU by a step, on a CPU by weights that are
        packed later.
        """
        if self.torch.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.torch)
            return max(0, int((free - workspace) * GPU_FRACTION))
        return int(max(0, available_memory() - workspace) * KV_FRACTION)

    def release_memory(self) -> None:
        """Gives cached memory back after an allocation failed."""
        if self.torch.type == "cuda":
            torch.cuda.empty_cache()


def _read_number(path: Path) -> int | None:
    try:
        text = path.read_text().split()[0]
    except (OSError, IndexError):
        return None
    return int(text) if text.lstrip("-").isdigit() else None


def available_memory(cgroup: Path = CGROUP, meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes that this process can still take: the machine's available memory, within the cgroup's limit (v2 or v1) and
    the one that the environment gives where pods have no cgroup."""
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    available = int(lines["MemAvailable"].split()[0]) * 1024
    files = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
    for limit_file, usage_file in files:
        limit, usage = _read_number(cgroup / limit_file), _read_number(cgroup / usage_file)
        if limit is not None and usage is not None and 0 < limit < 1 << 60:
            available = min(available, max(0, limit - usage))
    if limit_text := os.environ.get(ENV_MEMORY_LIMIT):
        available = min(available, max(0, int(limit_text) - _own_memory()))
    return available


def _own_memory() -> int:
    """Bytes of anonymous memory that this process holds."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024


def cpu_threads(cgroup: Path = CGROUP) -> int:
    """Threads that can run at once: the affinity mask, within the cgroup's quota (v2 or v1), rounded up."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota: int | None = None
    period: int | None = None
    try:
        first, second = (cgroup / "cpu.max").read_text().split()
        quota, period = (None if first == "max" else int(first)), int(second)
    except (OSError, ValueError):
        quota = _read_number(cgroup / "cpu/cpu.cfs_quota_us")
        period = _read_number(cgroup / "cpu/cpu.cfs_period_us")
    if quota is not None and quota > 0 and period:
        threads = min(threads, math.ceil(quota / period))
    return max(1, threads)
