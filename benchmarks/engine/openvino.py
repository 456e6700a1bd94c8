"""OpenVINO GenAI, in its environment: `cb` is its continuous-batching pipeline (paged attention), `plain` its
LLMPipeline over a stateful model (a static batch).

Greedy, no end of sequence. The comparison runs both and takes the better one for each figure.
"""

import itertools
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import openvino
import openvino_genai
from benchmarks.engine.workload import Job, Peer, main

CACHE_GIB = 2  # room for the comparison's batches; the pipeline takes it as it needs it


def properties(job: Job) -> dict[str, Any]:
    """Device settings: threads, latency before throughput, and what the job asks for beside."""
    return {"INFERENCE_NUM_THREADS": job.threads, "PERFORMANCE_HINT": "LATENCY", **job.options.get("properties", {})}


def generation(new_tokens: int) -> Any:
    settings = openvino_genai.GenerationConfig()
    settings.max_new_tokens, settings.ignore_eos, settings.do_sample = new_tokens, True, False
    return settings


class ContinuousBatching:
    """A scheduler and a paged cache; each `step` gives every running sequence a token."""

    def __init__(self, job: Job) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = CACHE_GIB
        scheduler.max_num_batched_tokens = 4096
        scheduler.enable_prefix_caching = False
        self.settings = {"pipeline": "cb", "version": openvino_genai.__version__, **properties(job)}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(job.weights, scheduler, "CPU", properties(job))
        self._requests = 0

    def _start(self, prompts: list[list[int]], new_tokens: int) -> list[Any]:
        handles = []
        for prompt in prompts:
            self._requests += 1
            ids = openvino.Tensor(np.array([prompt], dtype=np.int64))
            handles.append(self._pipeline.add_request(self._requests, ids, generation(new_tokens)))
        return handles

    def _step(self, handles: list[Any]) -> int:
        """Tokens that a step made."""
        self._pipeline.step()
        return sum(len(o.generated_ids) for h in handles if h.can_read() for o in h.read().values())

    def prefill(self, prompt: list[int]) -> float:
        began = time.perf_counter()
        handles = self._start([prompt], 1)
        while self._pipeline.has_non_finished_requests():
            self._step(handles)
        return time.perf_counter() - began

    def decode(self, prompts: list[list[int]], new_tokens: int) -> list[float]:
        handles = self._start(prompts, new_tokens)
        made = 0
        while made < len(prompts):  # until each has its first token
            made += self._step(handles)
        times, before = [], time.perf_counter()
        while self._pipeline.has_non_finished_requests():
            self._step(handles)
            now = time.perf_counter()
            times.append(now - before)
            before = now
        return times


class Plain:
    """One call for a whole batch; times of tokens come from the pipeline's own record."""

    def __init__(self, job: Job) -> None:
        self.settings = {"pipeline": "plain", "version": openvino_genai.__version__, **properties(job)}
        self._pipeline = openvino_genai.LLMPipeline(
            job.weights, "CPU", {"ATTENTION_BACKEND": "SDPA", **properties(job)}
        )

    def _generate(self, prompts: list[list[int]], new_tokens: int) -> Any:
        ids = np.array(prompts, dtype=np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        return self._pipeline.generate(inputs, generation(new_tokens)).perf_metrics

    def prefill(self, prompt: list[int]) -> float:
        began = time.perf_counter()
        self._generate([prompt], 1)
        return time.perf_counter() - began

    def decode(self, prompts: list[list[int]], new_tokens: int) -> list[float]:
        stamps = self._generate(prompts, new_tokens).raw_metrics.m_new_token_times
        return [float(b - a) / 1e3 for a, b in itertools.pairwise(stamps)]


class Logits:
    """The model without a pipeline, which shows no logits. Same device, same settings."""

    def __init__(self, job: Job) -> None:
        self.settings = {"version": openvino.__version__, **properties(job)}
        core = openvino.Core()
        model = core.read_model(f"{job.weights}/openvino_model.xml")
        self._request = core.compile_model(model, "CPU", properties(job)).create_infer_request()

    def logits(self, windows: list[list[int]]) -> Iterator[np.ndarray]:
        for window in windows:
            self._request.reset_state()
            ids = np.array([window], dtype=np.int64)
            positions = np.arange(len(window), dtype=np.int64)[None]
            inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": positions}
            out = self._request.infer({**inputs, "beam_idx": np.zeros(1, dtype=np.int32)})
            yield out["logits"][0]


def load(job: Job) -> Peer | Logits:
    if job.windows:
        return Logits(job)
    return Plain(job) if job.variant.split(",")[0].endswith("plain") else ContinuousBatching(job)


if __name__ == "__main__":
    main(load)
