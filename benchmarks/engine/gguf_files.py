"""A checkpoint as GGUF files for llama.cpp: `python -m benchmarks.engine.gguf_files CHECKPOINT OUT`, in llama.cpp's
environment.

The bfloat16 file is written from the safetensors file as it is, bit for bit; the others are made from it by llama.cpp's
own quantizer with its defaults (so Q4_0 and Q4_K_M keep an output matrix of their own in Q6_K). llama.cpp rotates
neighbouring dimensions of a Llama head where the checkpoint rotates halves, so the rows of q and k change places.
The files have no vocabulary: token ids go in and out.
"""

import ctypes
import json
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

FORMATS = {
    "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "q4_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def bfloat16_tensors(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Name and bits (uint16) of each tensor of a safetensors file that holds bfloat16 alone.

    Format: https://huggingface.co/docs/safetensors/index
    """
    with file.open("rb") as f:
        size = struct.unpack("<Q", f.read(8))[0]
        header = json.loads(f.read(size))
    data = np.memmap(file, dtype=np.uint8, mode="r", offset=8 + size)
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "BF16":
            raise SystemExit(f"{file}: {name} is {entry['dtype']}; only BF16 is converted")
        first, last = entry["data_offsets"]
        yield name, data[first:last].view(np.uint16).reshape(entry["shape"])


def gguf_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` → `blk.3.ffn_up.weight`."""
    stem, kind = name.rsplit(".", 1)
    if stem in OUTSIDE:
        return f"{OUTSIDE[stem]}.{kind}"
    _, _, layer, inner = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[inner]}.{kind}"


def neighbours(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k [heads * head_dim, …], each head's dimensions i and i + head_dim / 2 brought side by side."""
    split = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(rows.shape)


def write_bfloat16(checkpoint: Path, out: Path) -> None:
    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())
    arch, heads, kv_heads = config["model_type"], config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(out, arch)
    writer.add_file_type(llama_cpp.LLAMA_FTYPE_MOSTLY_BF16)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    rope = config.get("rope_parameters") or {}
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("none")
    for name, bits in bfloat16_tensors(checkpoint / "model.safetensors"):
        values = bits
        if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
            values = neighbours(bits, heads if ".q_proj." in name else kv_heads)
        if values.ndim == 1:  # norms and biases, which llama.cpp wants in float32
            writer.add_tensor(gguf_name(name), (values.astype(np.uint32) << 16).view(np.float32))
        else:
            raw = np.ascontiguousarray(values).view(np.uint8)
            writer.add_tensor(gguf_name(name), raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, out: Path, ftype: int) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = ftype, 2
    if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(params)):
        raise SystemExit(f"llama.cpp could not quantize {source}")


def main(checkpoint: Path, out: Path) -> None:
    """Every format that is not there yet; a file has its name once it is whole."""
    out.mkdir(parents=True, exist_ok=True)
    source, part = out / "bf16.gguf", out / "part.gguf"
    if not source.exists():
        write_bfloat16(checkpoint, part)
        part.rename(source)
    for name, ftype in FORMATS.items():
        if not (target := out / f"{name}.gguf").exists():
            quantize(source, part, ftype)
            part.rename(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
