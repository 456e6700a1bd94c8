"""llama.cpp on a GGUF file, in its own environment (see `benchmarks.gguf_agreement`): JSON in, JSON out.

stdin: {"file", "prompts": [[ids]], "new_tokens", "texts": [str]}; with "quantize": [to, file type] the file is first
quantized by llama.cpp, and what came of it is used; with "embed": true, vectors of the prompts are made instead.
stdout: {"answers": [[ids]], "ids": [[ids]]}, greedy continuations (or vectors) and how the texts are tokenized.
"""

import ctypes
import json
import os
import sys
from typing import Any

import llama_cpp
import numpy as np


def fill(batch: Any, tokens: list[int], start: int) -> None:
    """Puts tokens of one sequence into the batch, the first at a position."""
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, start + i, 1
        batch.seq_id[i][0], batch.logits[i] = 0, i == len(tokens) - 1


def decode(context: Any, batch: Any, tokens: list[int], start: int, vocab_size: int) -> int:
    """Feeds tokens and returns the likeliest next one."""
    fill(batch, tokens, start)
    if code := llama_cpp.llama_decode(context, batch):
        raise SystemExit(f"llama_decode failed: {code}")
    return int(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), shape=(vocab_size,)).argmax())


def embed(context: Any, batch: Any, tokens: list[int], width: int) -> list[float]:
    """The vector of a text, as the file's own pooling makes it."""
    fill(batch, tokens, 0)
    for i in range(len(tokens)):
        batch.logits[i] = True
    if code := llama_cpp.llama_encode(context, batch):
        raise SystemExit(f"llama_encode failed: {code}")
    return [float(x) for x in np.ctypeslib.as_array(llama_cpp.llama_get_embeddings_seq(context, 0), shape=(width,))]


def tokenize(vocab: Any, text: str) -> list[int]:
    data = text.encode()
    room = len(data) + 8
    ids = (ctypes.c_int32 * room)()
    count = llama_cpp.llama_tokenize(vocab, data, len(data), ids, room, False, True)
    if count < 0:
        raise SystemExit(f"llama_tokenize failed: {count}")
    return list(ids[:count])


def main() -> None:
    job = json.load(sys.stdin)
    log = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    if "quantize" in job:
        target, file_type = job["quantize"]
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.nthread = file_type, 1
        if llama_cpp.llama_model_quantize(os.fsencode(job["file"]), os.fsencode(target), ctypes.byref(params)):
            raise SystemExit(f"llama.cpp could not quantize {job['file']}")
        job["file"] = target
    wanted = llama_cpp.llama_model_default_params()
    wanted.vocab_only = not job["prompts"]
    model = llama_cpp.llama_model_load_from_file(os.fsencode(job["file"]), wanted)
    if not model:
        raise SystemExit(f"llama.cpp cannot load {job['file']}")
    vocab = llama_cpp.llama_model_get_vocab(model)
    size = llama_cpp.llama_vocab_n_tokens(vocab)
    batch = llama_cpp.llama_batch_init(2048, 0, 1)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch = 1024, 1, 1
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.embeddings = bool(job.get("embed"))
    answers: list[Any] = []
    for prompt in job["prompts"]:
        context = llama_cpp.llama_init_from_model(model, params)
        if params.embeddings:
            answers.append(embed(context, batch, prompt, llama_cpp.llama_model_n_embd(model)))
            llama_cpp.llama_free(context)
            continue
        tokens = [decode(context, batch, prompt, 0, size)]
        while len(tokens) < job["new_tokens"]:
            tokens.append(decode(context, batch, tokens[-1:], len(prompt) + len(tokens) - 1, size))
        llama_cpp.llama_free(context)
        answers.append(tokens)
    json.dump({"answers": answers, "ids": [tokenize(vocab, text) for text in job["texts"]]}, sys.stdout)


if __name__ == "__main__":
    main()
