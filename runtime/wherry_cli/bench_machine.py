"""What the machine is and can: the ground that an engine's figures stand on."""

import mmap
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

_PASSES = 7
_CPU_BYTES, _CUDA_BYTES = 1 << 29, 1 << 30


def processor() -> str:
    """The processor's name and what it has for low-precision arithmetic."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    values = {key.strip(): value.strip() for key, value in fields.items()}
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16", "amx_int8")
    have = [name for name in wanted if name in values.get("flags", "").split()]
    return f"{values.get('model name', platform.machine())} ({', '.join(have)})"


def read_bandwidth(threads: int, device: torch.device) -> float:
    """Bytes per second that can be read from memory, in huge pages where the system gives them; median of passes."""
    if device.type == "cuda":
        return _median_rate(_cuda_reader(device), _CUDA_BYTES)
    try:
        from wherry_runtime.kernels.cpu import library
    except ImportError:
        return _median_rate(_torch_reader(), _CPU_BYTES)
    if not library.available():
        return _median_rate(_torch_reader(), _CPU_BYTES)
    return library.read_bandwidth(library.Pool(threads))


def _median_rate(read: Callable[[], object], num_bytes: int) -> float:
    times = []
    for _ in range(_PASSES):
        began = time.perf_counter()
        read()
        times.append(time.perf_counter() - began)
    return num_bytes / statistics.median(times)


def _torch_reader() -> Callable[[], object]:
    """A sum over memory in huge pages, as fast as PyTorch's threads read it: a lower bound of what kernels could."""
    pages = mmap.mmap(-1, _CPU_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    words = torch.from_numpy(np.frombuffer(pages, dtype=np.float32))
    words.fill_(1.0)
    return words.sum


def _cuda_reader(device: torch.device) -> Callable[[], object]:
    words = torch.ones(_CUDA_BYTES // 4, device=device)

    def read() -> None:
        words.sum()
        torch.cuda.synchronize(device)

    return read


def resident() -> dict[str, int]:
    """Bytes of this process in memory: all, anonymous, of files (code, mapped weights), in huge pages, and the peak."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    sizes = {k: int(lines[v].split()[0]) * 1024 for k, v in _STATUS.items()}
    rollup = Path("/proc/self/smaps_rollup").read_text().splitlines()
    huge = next((line for line in rollup if line.startswith("AnonHugePages")), "AnonHugePages: 0 kB")
    return {**sizes, "huge_pages": int(huge.split()[1]) * 1024}


def forget_peak() -> None:
    """The peak counts from now on, where the system allows it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


_STATUS = {"total": "VmRSS", "anonymous": "RssAnon", "files": "RssFile", "peak": "VmHWM"}


Spans = list[tuple[int, int]]
_RESERVES = ("_arena",)  # what tensors are cut from; the rest of it takes no room until it is written to


def tensor_spans(root: object) -> Spans:
    """Memory (first address, end) of all tensors and arrays that `root` holds, itself or in objects of the engine."""
    seen: set[int] = set()
    spans: Spans = []
    stack: list[Any] = [root]
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            spans.append((item.data_ptr(), item.data_ptr() + item.nbytes))
        elif isinstance(item, np.ndarray):
            spans.append((item.ctypes.data, item.ctypes.data + item.nbytes))
        elif isinstance(item, dict):
            stack += item.values()
        elif isinstance(item, (list, tuple, set)):
            stack += item
        elif type(item).__module__.startswith("wherry_"):
            slots = [s for c in type(item).__mro__ for s in getattr(c, "__slots__", ())]
            names = [*getattr(item, "__dict__", {}), *slots]
            stack += [getattr(item, name) for name in names if hasattr(item, name) and name not in _RESERVES]
    return spans


def covered(spans: Spans, but: Sequence[tuple[int, int]] = ()) -> int:
    """Bytes under `spans`, each counted once, that are not under `but`."""
    return _union([*spans, *but]) - _union(but)


def _union(spans: Sequence[tuple[int, int]]) -> int:
    total, reached = 0, 0
    for first, end in sorted(spans):
        total += max(0, end - max(first, reached))
        reached = max(reached, end)
    return total


def describe(device: torch.device, threads: int) -> dict[str, Any]:
    """What a reader has to know to place the figures."""
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return {
        "processor": processor(),
        "cpus": os.cpu_count(),
        "threads": threads,
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **gpu,
    }
