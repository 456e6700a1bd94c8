"""Wherry's engine through `AsyncEngine`: scheduler, detokenization and events included, as `wherry serve` uses it.

`options` are fields of `EngineConfig`, such as {"quantization": "int8"}.
"""

import asyncio
from typing import Any

from benchmarks.engine.workload import Job, main

from wherry_cli.bench_engine import Meter, Plan, held, step_times
from wherry_protocol.engine_config import to_args
from wherry_runtime.engine.async_engine import AsyncEngine
from wherry_runtime.loading.locate import locate
from wherry_runtime.models.registry import read_config


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
        config = plan.config(read_config(locate(job.model)), job.model)
        self._runner = asyncio.Runner()
        self._engine = AsyncEngine(config)
        self._runner.run(self._engine.start())
        self._meter = Meter(self._engine, job.vocab_size)
        self.settings: dict[str, Any] = {
            "arguments": " ".join(a for a in to_args(config) if not a.startswith("--model")),
            "read_per_step": held(self._engine)[2],
        }

    def prefill(self, prompt: list[int]) -> float:
        stream = self._runner.run(self._meter.stream(prompt, 1))
        return stream.tokens[0] - stream.sent

    def decode(self, prompts: list[list[int]], new_tokens: int) -> list[float]:
        async def everyone() -> list[float]:
            return step_times(list(await asyncio.gather(*(self._meter.stream(p, new_tokens) for p in prompts))))

        return self._runner.run(everyone())


if __name__ == "__main__":
    main(Wherry)
