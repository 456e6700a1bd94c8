"""The memory of a recorded step, and what the engine's process loads beside it."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.runtime.engines import CHECKOUT, TINY

from wherry_runtime.kernels.cpu.recorder import Arena, Value

HEAVY = ("torch._dynamo", "torch._inductor", "sympy", "networkx", "transformers", "triton", "pandas", "scipy")
ANSWER = f"""
import asyncio, sys
import wherry_runtime.server.app
from tests.runtime.engines import ask, running
from pathlib import Path

async def main():
    async with running(Path({str(TINY)!r})) as engine:
        filtered = {{"temperature": 0.8, "top_p": 0.9, "presence_penalty": 0.5, "logprobs": 2}}
        for params in ({{"temperature": 0}}, filtered):
            await ask(engine, [1, 2, 3], max_tokens=4, **params)

asyncio.run(main())
print(*[name for name in {HEAVY!r} if name in sys.modules])
"""


class Used:
    """Buffers in use, each full of a number of its own."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.buffers: list[tuple[int, torch.Tensor]] = []
        self.count = 0

    def take(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        self.count += 1
        buffer = self.arena.take(dtype, rows, columns)
        assert buffer.shape == (rows, columns)
        assert buffer.data_ptr() % 64 == 0
        self.buffers.append((self.count % 100, buffer.fill_(self.count % 100)))

    def give_back(self, index: int) -> None:
        number, buffer = self.buffers.pop(index % len(self.buffers))
        assert bool((buffer == number).all())
        self.arena.give_back(buffer)


DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int8])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 600), st.integers(1, 500), DTYPES, st.integers(-3, 20)), max_size=60))
def test_no_two_buffers_in_use_overlap(steps: list[tuple[int, int, torch.dtype, int]]) -> None:
    used = Used(Arena())
    for rows, columns, dtype, back in steps:
        used.take(rows, columns, dtype)
        if back >= 0:
            used.give_back(back)
    while used.buffers:
        used.give_back(0)
    before = used.arena.num_bytes
    used.take(1, max(before, 1), torch.int8)  # what was given back is one piece again
    assert used.arena.num_bytes == max(before, 64)


def test_more_than_a_region() -> None:
    used = Used(Arena())
    for rows in (1000, 90_000, 3):
        used.take(rows, 1000, torch.int8)
    used.give_back(1)
    with pytest.raises(ValueError, match="another arena"):
        used.arena.give_back(torch.zeros(3, 5))
    used.take(90_000, 1000, torch.int8)
    assert used.arena.num_bytes < 92_000_000


def test_padding_and_logits_are_never_shared() -> None:
    arena = Arena()
    padded, logits = (Value(arena, 4, width, sampled=s) for width, s in ((100, False), (256, True)))
    kept = {padded.buffer.data_ptr(), logits.buffer.data_ptr()}
    assert padded.buffer.shape == (4, 128)
    assert not padded.buffer.any()
    del padded
    other = Value(arena, 4, 128, sampled=False)
    assert other.buffer.data_ptr() not in kept
    again = Value(arena, 4, 100, sampled=False)
    assert again.buffer.data_ptr() in kept
    shared = other.buffer.data_ptr()
    del other
    assert Value(arena, 2, 256, sampled=False).buffer.data_ptr() == shared
    assert Value(arena, 4, 256, sampled=True).buffer.data_ptr() != logits.buffer.data_ptr()


def test_nothing_heavy_is_loaded_beside_the_engine() -> None:
    """Compilers and other people's model libraries: hundreds of MiB, if an import pulls them in."""
    done = subprocess.run(
        [sys.executable, "-c", ANSWER], cwd=CHECKOUT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
