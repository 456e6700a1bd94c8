"""transformers' model, called as its `generate` calls it, with less around it: a static batch and a dynamic cache."""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import transformers
from benchmarks.engine.workload import Job, main


class Transformers:
    """PyTorch, eager, in the checkpoint's type."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        transformers.logging.set_verbosity_error()
        dtype = getattr(torch, job.options.get("dtype", "bfloat16"))
        self._model = transformers.AutoModelForCausalLM.from_pretrained(job.weights, dtype=dtype).eval()
        self.settings: dict[str, Any] = {
            "version": transformers.__version__,
            "torch": torch.__version__,
            "attention": self._model.config._attn_implementation,
        }
        self.settings = {key: str(value) for key, value in self.settings.items()}

    @torch.inference_mode()
    def _step(self, ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        out = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1:].argmax(dim=-1), out.past_key_values

    def prefill(self, prompt: list[int]) -> float:
        began = time.perf_counter()
        self._step(torch.tensor([prompt]), transformers.DynamicCache())
        return time.perf_counter() - began

    @torch.inference_mode()
    def logits(self, windows: list[list[int]]) -> Iterator[np.ndarray]:
        for window in windows:
            yield self._model(torch.tensor([window])).logits[0].float().numpy()

    def decode(self, prompts: list[list[int]], new_tokens: int) -> list[float]:
        ids, cache = self._step(torch.tensor(prompts), transformers.DynamicCache())
        times = []
        for _ in range(new_tokens - 1):
            began = time.perf_counter()
            ids, cache = self._step(ids, cache)
            ids.tolist()
            times.append(time.perf_counter() - began)
        return times


if __name__ == "__main__":
    main(Transformers)
