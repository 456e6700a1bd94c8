"""Sampling on the native kernels; kernels/cpu/src/sample*.cpp describe their operands.

The head's program ends with argmax: its tokens are the answer where every row is greedy and no logit was changed, and
it finds what is not finite while it is at it. Other steps replay one or two short programs more.
"""

import struct
from collections.abc import Sequence

import torch

from wherry_runtime.engine.sampling import Place
from wherry_runtime.kernels.cpu.library import Program, Step

PARAMS = struct.Struct("<dqddQq")  # `Params` of sample.h: temperature, top_k, top_p, min_p, seed, position
COLUMNS_PER_ITEM = 4096
SEED = (1 << 64) - 1


class NativeSampler:
    """Draws from the logits that a model's head left in its buffer.

    Args:
        head: computes the logits; gets one call more.
        buffer: [most rows, stride] float32: where it leaves them. Columns beyond `vocab_size` are not looked at.
    """

    def __init__(self, head: Program, buffer: torch.Tensor, vocab_size: int) -> None:
        rows, stride = buffer.shape
        threads = head.pool.threads
        pieces = -(-vocab_size // COLUMNS_PER_ITEM)
        padded = -(-vocab_size // 64) * 64
        scratch = torch.zeros(rows * 16 * (1 + pieces), dtype=torch.uint8)
        work = torch.empty(threads, padded, dtype=torch.float32)  # candidates of each thread's row
        params = torch.zeros(rows * PARAMS.size, dtype=torch.uint8)
        tokens = torch.zeros(rows, dtype=torch.int64)
        finite, unused = (torch.zeros(rows, dtype=torch.uint8) for _ in range(2))
        sizes = [vocab_size, stride]
        head.add("argmax", [buffer, scratch, tokens, finite], sizes)
        self._again = Program(head.pool)
        self._again.add("argmax", [buffer, scratch, tokens, unused], sizes)
        self._drawing = Program(head.pool)
        self._drawing.add("sample_filter", [buffer, params, scratch, work], [*sizes, padded])
        self._drawing.add("sample_draw", [buffer, params, scratch, tokens], sizes)
        # Memory, not arrays: between two steps every line of Python code comes from far away, and NumPy has many.
        self._params, self._tokens, self._finite = (array.numpy().data for array in (params, tokens, finite))
        self.num_bytes = scratch.nbytes + work.nbytes + params.nbytes

    def finite(self, logits: torch.Tensor) -> list[bool]:
        return list(map(bool, self._finite[: len(logits)]))

    def draw(self, logits: torch.Tensor, places: Sequence[Place], *, changed: bool) -> list[int]:
        count = len(logits)
        greedy = all(place.live.greedy for place in places)
        if not changed and greedy:
            return list(self._tokens[:count])
        step = Step(count, sampled_rows=range(count))
        if changed:
            self._again.run(step)
        if not greedy:
            for index, place in enumerate(places):
                live, params = place.live, place.live.params
                temperature = 0.0 if live.greedy else params.temperature
                position = live.num_tokens + len(place.ahead)
                settings = (temperature, params.top_k, params.top_p, params.min_p, live.seed & SEED, position)
                PARAMS.pack_into(self._params, index * PARAMS.size, *settings)
            self._drawing.run(step)
        return list(self._tokens[:count])
