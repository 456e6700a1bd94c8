"""Compiles every kernel for GPUs that need not be there, through the model's own launches, and prints what came out.

    python -m tests.runtime.cuda_compile 80 [0 1 …]     # for compute capability 8.0, through these of MODELS, or all

Prints a line of JSON for each kernel: its name, the architecture, bytes of shared memory, registers of a thread, and
bytes of its stack, which is where registers are spilled to. To be run without TRITON_INTERPRET. Nothing is computed:
each launch ends when the kernel is compiled, and PyTorch goes on with whatever is in memory.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import triton
from tests.runtime.native_attention import model_config
from tests.runtime.passed_before import tell
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from wherry_protocol.engine_config import Quantization
from wherry_runtime.engine.prepared import Prepared
from wherry_runtime.kernels.cuda.model import CudaModel
from wherry_runtime.kernels.cuda.noise import perturb
from wherry_runtime.kvcache.formats import FORMATS
from wherry_runtime.kvcache.paged import PagedKVCache
from wherry_runtime.models.decoder import Decoder
from wherry_runtime.quantization.storage import Storage
from wherry_runtime.scheduling.plan import SequenceStep

# dtype, weights, KV cache, heads, key heads, head_dim, window
MODELS: list[tuple[torch.dtype, Quantization, str, int, int, int, int | None]] = [
    (torch.bfloat16, "none", "bfloat16", 8, 1, 128, None),
    (torch.float16, "int4", "fp8", 4, 4, 80, 100),
    (torch.bfloat16, "int8", "int8", 7, 1, 256, None),
    (torch.bfloat16, "int4", "int8", 32, 4, 64, None),
    (torch.float32, "int8", "float32", 4, 1, 128, None),
]
ROWS = (1, 20, 130)  # decodes of few and many rows, and a prompt


class Driver:
    """Stands for the driver of a GPU of one architecture."""

    def __init__(self, architecture: int) -> None:
        self._target = GPUTarget("cuda", architecture, 32)

    def get_current_device(self) -> int:
        return self._target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


class Compiled:
    """Every kernel that is launched, once."""

    def __init__(self) -> None:
        self.kernels: dict[str, Any] = {}
        self._run = JITFunction.run

    def install(self) -> None:
        run, kernels = self._run, self.kernels

        def compile_only(function: Any, *args: Any, grid: Any, warmup: bool, **settings: Any) -> Any:
            kernel = run(function, *args, grid=grid, warmup=True, **settings)
            kernels[kernel.hash] = kernel
            return kernel

        JITFunction.run = compile_only


def launch_all(models: list[int]) -> None:
    """Steps of every kind through some of MODELS."""
    cpu = torch.device("cpu")
    for dtype, quantization, stored, heads, kv_heads, dim, window in map(MODELS.__getitem__, models):
        config = msgspec.structs.replace(model_config(heads, kv_heads, dim, 512), windows=(window,))
        model = Decoder(config, 512, Storage(dtype, cpu, quantization))
        for tensor in model.state().values():
            tensor.zero_()
        cuda = CudaModel(model, PagedKVCache(config, 40, 16, dtype=FORMATS[stored], device=cpu), max_decodes=32)
        for rows in ROWS:
            blocks = np.zeros(rows, dtype=np.int32)
            sequences = [SequenceStep("r", [0], 0, blocks, True)] * rows
            if rows > 32:
                sequences = [SequenceStep("r", [0] * rows, 0, blocks, True)]
            numbers = [0] * rows
            list(cuda.logits(Prepared(sequences, numbers, numbers, list(range(len(sequences))), [])))
    perturb(torch.zeros(1, 64), [0], [1], [2], [1.0])


def resources(kernel: Any) -> dict[str, Any]:
    """What the assembler says of a compiled kernel."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        shown = subprocess.run([tool, "--dump-resource-usage", str(path)], capture_output=True, text=True, check=True)
    used = re.search(r"REG:(\d+) STACK:(\d+)", shown.stdout)
    if used is None:
        raise RuntimeError(shown.stdout)
    return {
        "name": kernel.metadata.name,
        "architecture": kernel.metadata.target.arch,
        "shared": kernel.metadata.shared,
        "registers": int(used[1]),
        "stack": int(used[2]),
    }


def main() -> None:
    compiled = Compiled()
    compiled.install()
    architecture, *models = map(int, sys.argv[1:])
    triton.runtime.driver.set_active(Driver(architecture))
    launch_all(models or list(range(len(MODELS))))
    for kernel in compiled.kernels.values():
        print(json.dumps(resources(kernel)))
    tell()


if __name__ == "__main__":
    main()
