"""What each GGUF type that Wherry writes costs on real weights: `python -m benchmarks.gguf_types [MODEL]`.

Error is the root mean square of what rounding changes, relative to the weights, over all matrices of MODEL (by default
examples/models/tiny) whose rows are whole blocks of 256. Where llama.cpp is installed (`python -m
benchmarks.engine.peers llamacpp`) its own quantizer (ggml_quantize_chunk, no importance matrix) rounds the same values.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
from benchmarks.engine.peers import installed, python

from wherry_runtime.formats.conversion.source import open_source
from wherry_runtime.formats.gguf.blocks import dequantize
from wherry_runtime.formats.gguf.blocks.encode import encode
from wherry_runtime.formats.gguf.types import type_named

ROOT = Path(__file__).resolve().parents[1]
TYPES = ["F32", "BF16", "F16", "Q8_0", "Q6_K", "Q5_K", "Q5_0", "Q4_K", "Q4_0"]
PEER = """
import ctypes, glob, os, sys
import llama_cpp, numpy as np
values = np.fromfile(sys.argv[1], np.float32)
library = ctypes.CDLL(glob.glob(os.path.dirname(llama_cpp.__file__) + "/lib/libggml-base.so")[0])
quantize = library.ggml_quantize_chunk
quantize.restype = ctypes.c_size_t
quantize.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
out = np.zeros(values.size * 4, np.uint8)
size = quantize(int(sys.argv[3]), values.ctypes.data, out.ctypes.data, 0, values.size // 256, 256, None)
out[:size].tofile(sys.argv[2])
"""


def matrices(model: Path) -> npt.NDArray[np.float32]:
    """All weights of matrices with rows of whole blocks, one after the other."""
    tensors = [t for t in open_source(model).tensors if len(t.shape) == 2 and t.shape[1] % 256 == 0]
    return np.concatenate([dequantize(t.read(), t.type) for t in tensors])


def error(values: npt.NDArray[np.float32], raw: npt.NDArray[np.uint8], name: str) -> float:
    back = dequantize(raw, type_named(name))
    return float(np.sqrt(np.mean((back - values) ** 2, dtype=np.float64) / np.mean(values**2, dtype=np.float64)))


def theirs(values: npt.NDArray[np.float32], name: str) -> str:
    with tempfile.TemporaryDirectory() as directory:
        source, target = Path(directory) / "in", Path(directory) / "out"
        values.tofile(source)
        command = [python("llamacpp"), "-c", PEER, source, target, str(type_named(name).id)]
        subprocess.run(command, check=True)
        return f"{error(values, np.fromfile(target, np.uint8), name):.3%}"


def main(model: Path) -> None:
    values = matrices(model)
    print("| type | bits per weight | error | llama.cpp's | million weights a second |")
    print("|---|---|---|---|---|")
    for name in TYPES:
        began = time.perf_counter()
        raw = encode(values, type_named(name))
        speed = values.size / 1e6 / (time.perf_counter() - began)
        peer = theirs(values, name) if installed("llamacpp") and name != "F32" else ""
        bits = type_named(name).bits
        print(f"| {name} | {bits:g} | {error(values, raw, name):.3%} | {peer} | {speed:.0f} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "examples" / "models" / "tiny")
