"""Engines that are all resident take turns of a second or so, one figure after another.

A machine's memory and cores are not the same from one minute to the next. So what is to be compared is measured within
seconds: for each figure some rounds, in each of which every engine has one turn, and ratios are taken within a round.
Read bandwidth, what decoding at batch 1 is bound by, is measured before and after each of those turns.
"""

import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from benchmarks.engine.process import EngineFailed, EngineProcess
from benchmarks.engine.workload import Job

from wherry_cli import bench_machine

Run = dict[str, Any]  # one engine and format, one round
SINGLE = ("decode", 1)
SINGLE_ROUNDS = 4  # of batch 1, for one of anything else: it takes the least time, and varies most with the memory


class Company:
    """Engines, one for each job, loaded one after another.

    `failed` is told what could not load or died; the others go on.
    """

    def __init__(self, jobs: list[Job], failed: Callable[[Job, str], None], loading: Callable[[Job], None]) -> None:
        self._stack = ExitStack()
        self._failed = failed
        self._engines: list[tuple[Job, EngineProcess]] = []
        self._runs: dict[tuple[str, str, int], Run] = {}
        for job in jobs:
            loading(job)
            try:
                self._engines.append((job, self._stack.enter_context(EngineProcess(job))))
            except EngineFailed as error:
                failed(job, str(error))

    def __enter__(self) -> "Company":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def runs(self) -> list[Run]:
        return [self._runs[key] for key in sorted(self._runs, key=lambda key: key[2])]

    def turns(self, kind: str, size: int, rounds: int) -> Iterator[Job]:
        """Measures a figure; yields before each turn. Rounds start with another engine each."""
        for number in range(rounds):
            shift = number % max(len(self._engines), 1)
            for job, engine in self._engines[shift:] + self._engines[:shift]:
                yield job
                try:
                    self._turn(job, engine, kind, size, number)
                except EngineFailed as error:
                    self._failed(job, str(error))
                    self._engines = [e for e in self._engines if e[1] is not engine]

    def _turn(self, job: Job, engine: EngineProcess, kind: str, size: int, number: int) -> None:
        before = bandwidth(job) if (kind, size) == SINGLE else 0.0
        answer = engine.ask(kind=kind, size=size, number=number)
        run = self._runs.setdefault(
            (job.engine, job.variant, number),
            {"round": number, "engine": job.engine, "variant": job.variant, **engine.loaded},
        )
        run["memory"] = answer.pop("memory")
        run.setdefault(kind, {})[str(size)] = answer
        if before:
            run["bandwidth"] = statistics.fmean((before, bandwidth(job)))


def bandwidth(job: Job) -> float:
    """Bytes per second that can be read."""
    return bench_machine.read_bandwidth(job.threads, torch.device("cpu"))


def rounds_for(kind: str, size: int, rounds: int) -> int:
    return rounds * SINGLE_ROUNDS if (kind, size) == SINGLE else rounds
