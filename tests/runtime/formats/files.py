"""Small files of both formats, for tests and as the fuzzer's seeds."""

from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import save


def small_gguf(path: Path, version: int = 3) -> bytes:
    """A file with a value of every type, written by gguf-py."""
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_uint8, 255),
        (writer.add_int8, -1),
        (writer.add_uint16, 65535),
        (writer.add_int16, -2),
        (writer.add_uint32, 1 << 31),
        (writer.add_int32, -3),
        (writer.add_float32, 0.5),
        (writer.add_bool, True),
        (writer.add_string, "snow ☃ 雪"),
        (writer.add_uint64, 1 << 63),
        (writer.add_int64, -(1 << 40)),
        (writer.add_float64, 1e300),
    ):
        add(f"one.{add.__name__}", value)
    writer.add_array("many.strings", ["", "a", "☃"])
    writer.add_array("many.numbers", [1, 2, 3])
    writer.add_array("many.floats", [0.25, -1.5])
    writer.add_array("many.bools", [True, False])
    writer.add_tensor("plain", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("half", np.ones((1, 2, 4), np.float16))
    blocks = np.arange(4 * 34, dtype=np.uint8).reshape(2, 2 * 34)
    writer.add_tensor("blocks", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = bytearray(path.read_bytes())
    data[4] = version
    return bytes(data)


def small_safetensors() -> bytes:
    """A file written by safetensors itself."""
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.int8), "none": np.ones((0, 4))}
    return bytes(save(tensors, {"format": "np", "note": "☃"}))
