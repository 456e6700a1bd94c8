"""Wherry's engine through `AsyncEngine`: scheduler, detokenization and events included, as `wherry serve` uses it.

`options` are fields of `EngineConfig`, such as {"quantization": "int8"}.
"""

import asyncio
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.engine.workload import Job, main

from wherry_cli.bench_engine import Meter, Plan, held, settled
from wherry_cli.bench_times import step_times
from wherry_protocol.engine_config import to_args
from wherry_runtime.engine.async_engine import AsyncEngine
from wherry_runtime.loading.locate import locate
from wherry_runtime.models.registry import read_config
from wherry_runtime.scheduling.plan import SequenceStep

TOGETHER = 16  # windows


class Wherry:
    """One engine on an event loop that runs while it is asked something."""

    def __init__(self, job: Job) -> None:
        plan = Plan(
            model=job.model,
            batches=list(job.batches),
            prompt_tokens=list(job.prefill),
            context=job.prompt_tokens,
            new_tokens=job.new_tokens,
            runs=1,
            settings={"threads": job.threads, "prefix_cache": False, **job.options},
        )
        if job.windows:  # room for as many windows as are scored together
            longest = max(map(len, json.loads(Path(job.windows).read_text())))
            plan = dataclasses.replace(plan, batches=[TOGETHER], context=longest, new_tokens=32)
        config = plan.config(read_config(locate(job.model)), job.model)
        self._runner = asyncio.Runner()
        self._engine = AsyncEngine(config)
        self._runner.run(self._engine.start())
        self._runner.run(settled(self._engine))
        self._meter = Meter(self._engine, job.vocab_size)
        self.settings: dict[str, Any] = {
            "arguments": " ".join(a for a in to_args(config) if not a.startswith("--model")),
            "read_per_step": held(self._engine)[2],
        }

    def prefill(self, prompt: list[int]) -> float:
        stream = self._runner.run(self._meter.stream(prompt, 1))
        return stream.tokens[0] - stream.sent

    def logits(self, windows: list[list[int]]) -> Iterator[np.ndarray]:
        """A token of each of some windows at a time, so that what is scored is decoding from the KV cache."""
        runner = self._engine._ready().runner
        size = runner.cache.block_size
        for first in range(0, len(windows), TOGETHER):
            group = windows[first : first + TOGETHER]
            blocks = -(-max(map(len, group)) // size)
            tables = np.arange(len(group) * blocks, dtype=np.int32).reshape(len(group), blocks)
            out: dict[str, list[np.ndarray]] = {str(i): [] for i in range(len(group))}
            for position in range(max(map(len, group))):
                steps = [
                    SequenceStep(str(i), [window[position]], position, tables[i], samples=True)
                    for i, window in enumerate(group)
                    if position < len(window)
                ]
                logits, ids = runner.logits(steps)
                for row, name in zip(logits.numpy(), ids, strict=True):
                    out[name].append(row.copy())
            yield from (np.stack(rows) for rows in out.values())

    def decode(self, prompts: list[list[int]], new_tokens: int) -> list[float]:
        async def everyone() -> list[float]:
            return step_times(list(await asyncio.gather(*(self._meter.stream(p, new_tokens) for p in prompts))))

        return self._runner.run(everyone())


if __name__ == "__main__":
    main(Wherry)
