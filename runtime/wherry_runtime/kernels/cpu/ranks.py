"""Ranks on the native kernels: through memory that their processes share, or through torch.distributed."""

from collections.abc import Callable

import torch

from wherry_runtime.kernels.cpu.library import Step
from wherry_runtime.kernels.cpu.recorder import Capacity, Recorder, Rows, aligned
from wherry_runtime.loading.config import ModelConfig
from wherry_runtime.parallel.collective import Collective
from wherry_runtime.parallel.shard import Shard, Span
from wherry_runtime.quantization.formats import padded_inputs

COUNTER = 64  # bytes: one to a cache line
# Two for a layer's sums in turn, and one for the embedding's: a step's last sum must not be where the next one's first
# is, as a slow rank may still be reading.
SETS = 3


def shared_bytes(size: int, config: ModelConfig, capacity: Capacity) -> int:
    """How much memory `size` ranks share."""
    summands = SETS * size * capacity.rows * padded_inputs(config.hidden_size)
    return COUNTER * size + 4 * (summands + capacity.sampled * padded_inputs(config.vocab_size))


class SharedMemoryRanks:
    """Ranks on one machine.

    Args:
        memory: [`shared_bytes`] uint8, zeros at first, the same on all ranks.
        config: of the whole model.
        threads: of this rank.
    """

    def __init__(
        self, memory: torch.Tensor, shard: Shard, config: ModelConfig, capacity: Capacity, threads: int
    ) -> None:
        self._shard = shard
        self._width, self._vocabulary = config.hidden_size, config.vocab_size
        self._arrivals, floats = memory[: COUNTER * shard.size], memory[COUNTER * shard.size :].view(torch.float32)
        stride = padded_inputs(config.hidden_size)
        summands = SETS * shard.size * capacity.rows * stride
        self._summands = floats[:summands].view(SETS, shard.size, capacity.rows, stride)
        self._logits = floats[summands:].view(capacity.sampled, padded_inputs(config.vocab_size))
        self._turns = aligned(torch.uint8, threads, COUNTER)
        self._sums = 0

    def summand(self, width: int) -> Rows:
        if width != self._width:
            raise ValueError(f"sums are {self._width} columns wide, not {width}")
        index = (self._sums - 1) % 2 if self._sums else SETS - 1
        self._sums += 1
        own = self._summands[index, self._shard.rank]
        return Rows(width, own.shape[1], own)

    def record_sum(self, recorder: Recorder, summand: Rows, out: Rows, *, add: bool) -> None:
        index = (summand.buffer.storage_offset() - self._summands.storage_offset()) // self._summands.stride(0)
        slot = self._summands.stride(1)
        numbers = [out.width, summand.stride, out.stride, self._shard.size, self._shard.rank, slot, add]
        tensors = [self._arrivals, self._summands[index], out.buffer, self._turns]
        recorder.program.add("all_reduce", tensors, numbers)

    def record_logits(self, recorder: Recorder, tokens: Span, multiply: Callable[[Rows], None]) -> Rows:
        stride = self._logits.shape[1]
        self._meet(recorder)  # until then the first rank may still be drawing from what is there
        multiply(Rows(tokens.length, stride, self._logits[:, tokens.indices], sampled=True))
        self._meet(recorder)
        return Rows(self._vocabulary, stride, self._logits, sampled=True)

    def _meet(self, recorder: Recorder) -> None:
        numbers = [0, 0, 0, self._shard.size, self._shard.rank]
        recorder.program.add("meet", [self._arrivals, None, None, self._turns], numbers)


class DistributedRanks:
    """Ranks on several machines: between two programs, torch.distributed adds up and gathers."""

    def __init__(self, collective: Collective, config: ModelConfig, capacity: Capacity) -> None:
        self._collective = collective
        stride = padded_inputs(config.hidden_size)
        self._summand = Rows(config.hidden_size, stride, aligned(torch.float32, capacity.rows, stride))
        self._vocabulary = config.vocab_size

    def summand(self, width: int) -> Rows:
        if width != self._summand.width:
            raise ValueError(f"sums are {self._summand.width} columns wide, not {width}")
        return self._summand

    def record_sum(self, recorder: Recorder, summand: Rows, out: Rows, *, add: bool) -> None:
        def exchange(step: Step) -> None:
            self._collective.all_reduce(summand.buffer[: step.rows])

        recorder.exchange(exchange)
        numbers = [out.width, summand.stride, out.stride, 1, 0, 0, add]
        recorder.program.add("all_reduce", [None, summand.buffer, out.buffer], numbers)

    def record_logits(self, recorder: Recorder, tokens: Span, multiply: Callable[[Rows], None]) -> Rows:
        rows, stride = recorder.capacity.sampled, padded_inputs(tokens.length)
        own = Rows(tokens.length, stride, aligned(torch.float32, rows, stride), sampled=True)
        multiply(own)
        everything = aligned(torch.float32, rows, padded_inputs(self._vocabulary))

        def exchange(step: Step) -> None:
            count = len(step.sampled_rows)
            found = self._collective.gather(own.buffer[:count, : tokens.length], tokens)
            everything[:count, : found.shape[1]] = found

        recorder.exchange(exchange)
        return Rows(self._vocabulary, everything.shape[1], everything, sampled=True)
