"""Threads and memory as cgroups of both versions allow them."""

import os
from pathlib import Path
from typing import Any

import pytest
from tests.runtime.engines import TINY, engine_config

from wherry_runtime.engine import resources
from wherry_runtime.engine.resources import available_memory, cpu_threads
from wherry_runtime.engine.setup import Loaded, load
from wherry_runtime.kernels.cpu import library
from wherry_runtime.kernels.cpu.model import NativeModel

GIB = 1 << 30


def lay_out(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


@pytest.mark.parametrize(
    ("files", "threads"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "200000 100000"}, 2),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "1000 100000"}, 1),
        ({"cpu.max": "9900000 100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu.max": "garbage"}, 8),
    ],
)
def test_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], threads: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert cpu_threads(lay_out(tmp_path, files)) == threads


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({}, 16 * GIB),
        ({"memory.max": "max", "memory.current": f"{GIB}"}, 16 * GIB),
        ({"memory.max": f"{4 * GIB}", "memory.current": f"{GIB}"}, 3 * GIB),
        ({"memory.max": f"{64 * GIB}", "memory.current": f"{GIB}"}, 16 * GIB),
        ({"memory.max": f"{GIB}", "memory.current": f"{2 * GIB}"}, 0),
        ({"memory/memory.limit_in_bytes": f"{2 * GIB}", "memory/memory.usage_in_bytes": f"{GIB}"}, GIB),
        ({"memory/memory.limit_in_bytes": "9223372036854771712", "memory/memory.usage_in_bytes": "5"}, 16 * GIB),
    ],
)
def test_memory(tmp_path: Path, files: dict[str, str], available: int) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal: 99 kB\nMemAvailable:   {16 * GIB // 1024} kB\n")
    assert available_memory(lay_out(tmp_path / "cgroup", files), meminfo) == available


def test_the_cache_takes_what_is_free_but_no_more_than_a_full_batch_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(memory: int, **settings: Any) -> Loaded:
        monkeypatch.setattr(resources, "available_memory", lambda: memory)
        return load(engine_config(TINY, dtype="bfloat16", block_size=16, max_running=4, **settings))

    assert loaded(1 << 40).kv_tokens == 4 * 2048
    assert loaded(1 << 24, backend="pytorch").kv_tokens == (1 << 23) // 4096  # half of 16 MiB, 4 KiB a token


@pytest.mark.skipif(not library.available(), reason="there are no native kernels on this machine")
def test_the_cache_leaves_room_for_weights_that_are_packed_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "available_memory", lambda: 1 << 24)
    loaded = load(engine_config(TINY, dtype="bfloat16", block_size=16, max_running=4, backend="native"))
    model = loaded.runner.model
    assert isinstance(model, NativeModel)
    later = sum(matrix.data.nbytes for matrix in model.settling.matrices)
    assert later > 4 << 20
    assert loaded.kv_tokens == ((1 << 24) - later) // 2 // (16 * 4096) * 16


def test_environment_limits_memory_where_there_is_no_cgroup(monkeypatch: pytest.MonkeyPatch) -> None:
    free = available_memory()
    monkeypatch.setenv("WHERRY_MEMORY_LIMIT", str(100 * GIB))
    assert available_memory() > free - GIB
    monkeypatch.setenv("WHERRY_MEMORY_LIMIT", str(4 * GIB))
    assert available_memory() < 4 * GIB
    monkeypatch.setenv("WHERRY_MEMORY_LIMIT", "1")
    assert available_memory() == 0
