"""llama.cpp through its own C API (`llama-cpp-python`'s bindings), in its environment.

As its batched benchmark does it: one `llama_decode` a step with a token of each sequence, then the argmax of each row.
Settings that were tried and are the best of it: see `OPTIONS` and docs/performance/engine.md.
"""

import ctypes
import os
import time
from collections.abc import Iterator
from typing import Any

import llama_cpp
import numpy as np
from benchmarks.engine.workload import Job, main

OPTIONS = {
    "flash_attention": llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    "mmap": False,  # memory of its own: only that can lie in huge pages
    "repack": True,  # weights rearranged at load for the machine's vector units
    "unified_cache": False,  # a cache for each sequence: attention reads no other's
}


def check(code: int) -> None:
    if code != 0:
        raise SystemExit(f"llama_decode failed: {code}")


class LlamaCpp:
    """A model and a context. One sequence's cache holds the longest prompt or a prompt with its answer."""

    def __init__(self, job: Job) -> None:
        self.settings: dict[str, Any] = {**OPTIONS, **job.options, "version": llama_cpp.__version__}
        self._log = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._vocab_size = job.vocab_size
        wanted = llama_cpp.llama_model_default_params()
        wanted.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP if self.settings["mmap"] else llama_cpp.LLAMA_LOAD_MODE_NONE
        wanted.use_extra_bufts = self.settings["repack"]
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(job.weights), wanted)
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {job.weights}")
        self._job = job
        self._context: Any = None
        self._shape = (0, 0)
        self._batch = llama_cpp.llama_batch_init(4096, 0, 1)
        self.settings["system"] = llama_cpp.llama_print_system_info().decode()

    def context(self, sequences: int, length: int) -> Any:
        """An empty context for `sequences` of `length` tokens."""
        if self._shape != (sequences, length):
            if self._context:
                llama_cpp.llama_free(self._context)
            params = llama_cpp.llama_context_default_params()
            params.n_ctx, params.n_seq_max = sequences * (-(-length // 256) * 256), sequences
            params.n_batch = max(2048, sequences)
            params.n_threads = params.n_threads_batch = self._job.threads
            params.flash_attn_type = self.settings["flash_attention"]
            params.kv_unified = self.settings["unified_cache"]
            if ubatch := self.settings.get("ubatch"):
                params.n_ubatch = ubatch
            self._context, self._shape = llama_cpp.llama_init_from_model(self._model, params), (sequences, length)
            if not self._context:
                raise SystemExit("llama.cpp could not make a context")
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
        return self._context

    def feed(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """Puts (token, position, sequence, wants logits) into the batch."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = wanted

    def rows(self, context: Any, count: int) -> np.ndarray:
        """The step's logits, [count, vocab_size] float32, not copied."""
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape=(count, self._vocab_size))

    def prefill(self, prompt: list[int]) -> float:
        context = self.context(1, len(prompt))
        began = time.perf_counter()
        last = len(prompt) - 1
        self.feed([(token, i, 0, i == last) for i, token in enumerate(prompt)])
        check(llama_cpp.llama_decode(context, self._batch))
        self.rows(context, 1).argmax(axis=-1)
        return time.perf_counter() - began

    def logits(self, windows: list[list[int]]) -> Iterator[np.ndarray]:
        for window in windows:
            context = self.context(1, len(window))
            self.feed([(token, i, 0, True) for i, token in enumerate(window)])
            check(llama_cpp.llama_decode(context, self._batch))
            yield self.rows(context, len(window)).copy()

    def decode(self, prompts: list[list[int]], new_tokens: int) -> list[float]:
        count, length = len(prompts), len(prompts[0])
        context = self.context(count, length + new_tokens)
        self.feed([(t, i, s, i == length - 1) for s, prompt in enumerate(prompts) for i, t in enumerate(prompt)])
        check(llama_cpp.llama_decode(context, self._batch))
        tokens = self.rows(context, count).argmax(axis=-1).tolist()
        times = []
        for position in range(length, length + new_tokens - 1):
            began = time.perf_counter()
            self.feed([(token, position, s, True) for s, token in enumerate(tokens)])
            check(llama_cpp.llama_decode(context, self._batch))
            tokens = self.rows(context, count).argmax(axis=-1).tolist()
            times.append(time.perf_counter() - began)
        return times


if __name__ == "__main__":
    main(LlamaCpp)
