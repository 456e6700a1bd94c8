"""A model on the native kernels: recorded once, replayed for every step."""

import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

import numpy as np
import torch

from wherry_runtime.attention.native import AttentionKernels, NativeKVCache
from wherry_runtime.engine.prepared import Prepared
from wherry_runtime.kernels.cpu.library import Pool, Replay, Step
from wherry_runtime.kernels.cpu.recorder import Capacity, Ranks, Recorder, Stage
from wherry_runtime.kernels.cpu.sampling import NativeSampler
from wherry_runtime.kernels.cpu.settling import Settling
from wherry_runtime.models.decoder import Decoder

# Rows computed at once. More would read the weights less often, which at this many no longer matters, and take memory.
CAPACITY = Capacity(rows=512, sampled=64)


def pinned_cores(threads: int) -> list[int]:
    """Where to pin the threads: to the cores that this process may use if each thread can have one to itself, or
    nowhere: among more cores than threads, another process with the same idea would choose the same ones."""
    cores = sorted(os.sched_getaffinity(0))
    return cores if len(cores) == threads else []


class NativeModel:
    """Two programs: the layers over all rows of a step, and the head over the rows that draw a token.

    Between ranks on several machines each is in stages, as their sums leave the kernels.

    Args:
        ranks: None where there is one.
    """

    def __init__(self, model: Decoder, cache: NativeKVCache, threads: int, ranks: Ranks | None = None) -> None:
        self.cache = cache
        self.pool = Pool(threads, pinned_cores(threads))
        self.settling = Settling(model.unsettled())
        ropes = [model.rope] if model.local_rope is None else [model.rope, model.local_rope]
        attention = AttentionKernels(model.config, cache, ropes, CAPACITY.rows, threads)
        recorder = Recorder(self.pool, CAPACITY, attention, ranks, model.storage.dtype)
        hidden = model.hidden(recorder)
        self.layers = recorder.take_stages()
        self._logits = model.logits(recorder, hidden)
        self.head = recorder.take_stages()
        self._views = [self._logits.buffer[:rows, : model.config.vocab_size] for rows in range(CAPACITY.sampled + 1)]
        self.sampler: NativeSampler | None = None
        self.workspace_bytes = recorder.arena.num_bytes + attention.num_bytes
        if model.shard.first:  # which draws
            self.sampler = NativeSampler(self.head[-1].program, self._logits.buffer, model.config.vocab_size)
            self.workspace_bytes += self.sampler.num_bytes

    def prepare(self, prepared: Prepared) -> list["Piece"]:
        """The step's pieces, to be replayed once their tokens are known."""
        return [Piece(self.layers, self.head, step) for step in steps(prepared, CAPACITY.rows)]

    def logits(self, prepared: Prepared) -> Iterator[torch.Tensor]:
        """Computes a step.

        Yields:
            [S, vocab_size] float32, at most `CAPACITY.sampled` rows at a time, all in the same memory.
        """
        pieces: list[Piece] = prepared.work
        tokens = [token for s in prepared.sequences for token in s.tokens]
        for piece, start in zip(pieces, range(0, len(tokens), CAPACITY.rows), strict=True):
            piece.layers.put_tokens(tokens[start : start + CAPACITY.rows])
            for section in piece.sections:
                for replay, exchange in section:
                    replay.run()
                    if exchange is not None:
                        exchange(replay.last)
                self.settling.stepped.set()
                if rows := len(section[-1][0].last.sampled_rows):
                    yield self._views[rows]
        if not prepared.sampled_rows:
            yield self._views[0]


class Piece:
    """Rows of a step that are computed at once: the layers, and the head as often as rows that draw have no room."""

    def __init__(self, layers: list[Stage], head: list[Stage], step: Step) -> None:
        self.layers = step
        sampled = step.sampled_rows
        parts = [
            step if len(sampled) <= CAPACITY.sampled else Step(sampled_rows=sampled[start : start + CAPACITY.sampled])
            for start in range(0, len(sampled), CAPACITY.sampled)
        ]
        whole = [(stage, step) for stage in layers]
        whole += [(stage, part) for part in parts[:1] for stage in head]
        # Each ends where tokens are drawn.
        self.sections = [_section(whole), *(_section((stage, part) for stage in head) for part in parts[1:])]


def _section(stages: Iterable[tuple[Stage, Step]]) -> list[tuple[Replay, Callable[[Step], None] | None]]:
    """As few replays as the exchanges between them leave."""
    section: list[tuple[Replay, Callable[[Step], None] | None]] = []
    programs = []
    for stage, step in stages:
        programs.append((stage.program, step))
        if stage.exchange is not None:
            section.append((Replay(programs), stage.exchange))
            programs = []
    return [*section, (Replay(programs), None)] if programs else section


def steps(prepared: Prepared, rows: int) -> Iterator[Step]:
    """The step in pieces of at most `rows` rows, tokens left out. A sequence that is cut goes on in the next piece."""
    sequences = prepared.sequences
    ends = list(accumulate(len(s.tokens) for s in sequences))
    total = len(prepared.positions)
    for begin in range(0, total, rows):
        end = min(begin + rows, total)
        # Sequences with a row in begin … end - 1.
        first, last = bisect_right(ends, begin), bisect_right(ends, end - 1)
        tables = [s.blocks for s in sequences[first : last + 1]]
        yield Step(
            end - begin,
            token_ids=[0] * (end - begin),
            positions=prepared.positions[begin:end],
            slots=prepared.slots[begin:end],
            sampled_rows=[row - begin for row in prepared.sampled_rows if begin <= row < end],
            first_rows=[0, *(row - begin for row in ends[first:last]), end - begin],
            table_starts=list(accumulate(map(len, tables[:-1]), initial=0)),
            block_tables=tables[0] if len(tables) == 1 else np.concatenate(tables),
        )
