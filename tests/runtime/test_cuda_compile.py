"""The interpreter takes what the compiler refuses, so every kernel is compiled too, for GPUs that need not be here.

That it passed is kept: it is repeated when something that it reads has changed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.runtime.passed_before import Run, digest

pytest.importorskip("triton")

CHECKOUT = Path(__file__).resolve().parents[2]
SHARED = 99 << 10  # bytes that a program can have on GPUs with the least: compute capability 8.6 and 8.9
STACK = 128  # bytes: some registers
KERNELS = {
    "add_parts_kernel",
    "combine_kernel",
    "decode_kernel",
    "multiply_kernel",
    "perturb_kernel",
    "prefill_kernel",
    "rms_norm_kernel",
    "rope_cache_kernel",
    "silu_mul_kernel",
    "widen_kernel",
}


def test_kernels_compile_and_fit(tmp_path: Path) -> None:
    """For one architecture and one model, which has them all; `python -m tests.runtime.cuda_compile 90` does others."""
    architecture, model = 80, 3
    remembered = Run("cuda_compile", str(architecture), str(model), digest([Path(__file__).resolve()]))
    if remembered.passed_before():
        return
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(CHECKOUT / "runtime"), "OMP_NUM_THREADS": "1"}
    environment |= remembered.environment
    command = [sys.executable, "-W", "error", "-m", "tests.runtime.cuda_compile", str(architecture), str(model)]
    done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {k["name"] for k in kernels} == KERNELS
    assert all(k["architecture"] == architecture for k in kernels)
    assert not [k for k in kernels if k["shared"] > SHARED]
    assert not [k for k in kernels if k["stack"] > STACK], "registers are spilled"
    remembered.passed()
