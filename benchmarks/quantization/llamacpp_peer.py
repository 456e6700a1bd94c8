"""llama.cpp's logits, in its own environment: a file with a job in, numbers out.

The job is JSON: {"file", "target", "type", "windows": [[ids]]}. `file` is quantized to `target` as `type` says
(`llama_ftype`), and the windows go through the result. stdout: the size of the vocabulary (4 bytes, little-endian),
then for each window logits [length - 1, vocabulary] float32 after each token but the last.
"""

import ctypes
import json
import os
import sys
from typing import Any

import llama_cpp
import numpy as np


def loaded(job: dict[str, Any]) -> Any:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = job["type"], 1
    file, target = os.fsencode(job["file"]), os.fsencode(job["target"])
    if llama_cpp.llama_model_quantize(file, target, ctypes.byref(params)):
        raise SystemExit(f"llama.cpp could not quantize {job['file']}")
    model = llama_cpp.llama_model_load_from_file(target, llama_cpp.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp cannot load {job['target']}")
    return model


def main() -> None:
    with open(sys.argv[1]) as file:
        job = json.load(file)
    log = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = loaded(job)
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    length = max(len(window) for window in job["windows"])
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = length, length, 512
    params.n_threads, params.n_threads_batch = 1, 1
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model, params)
    batch = llama_cpp.llama_batch_init(length, 0, 1)
    out = sys.stdout.buffer
    out.write(size.to_bytes(4, "little"))
    for window in job["windows"]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        batch.n_tokens = len(window)
        for i, token in enumerate(window):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, True
        if code := llama_cpp.llama_decode(context, batch):
            raise SystemExit(f"llama_decode failed: {code}")
        found = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape=(len(window), size))
        out.write(found[:-1].tobytes())
    out.flush()


if __name__ == "__main__":
    main()
