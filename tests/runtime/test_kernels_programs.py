"""Programs as a whole: their calls wait for one another, whatever the number of threads."""

import pytest
import torch

from wherry_runtime.kernels.cpu import library
from wherry_runtime.kernels.cpu.library import Pool, Program, Replay, Step

pytestmark = pytest.mark.skipif(not library.available(), reason="the native library is not built")

ROWS, WIDTH, CALLS, REPLAYS = 24, 192, 40, 4


def chain(pool: Pool, buffers: list[torch.Tensor]) -> Program:
    """Each call reads what all threads wrote in the one before: row r of its input is row r + 1 of the last output."""
    program = Program(pool)
    weight = torch.linspace(0.5, 1.5, WIDTH)
    for i in range(CALLS):
        source, out = buffers[i % 2], buffers[(i + 1) % 2]
        numbers = [WIDTH, WIDTH, WIDTH, 0]
        # The weight is streamed: threads that wait read ahead of a share of it.
        program.add("rms_norm", [source[1:], weight, out], numbers, [1e-6], streams=(weight, 3))
    return program


def chained(threads: int, programs: int) -> torch.Tensor:
    torch.manual_seed(0)
    start = torch.randn(ROWS + 1, WIDTH)
    buffers = [start.clone(), start.clone()]
    pool = Pool(threads)
    replay = Replay([(chain(pool, buffers), Step(ROWS)) for _ in range(programs)])
    for _ in range(REPLAYS):
        replay.run()
    return buffers[0]


@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize("threads", [2, 3, 4, 7])
def test_calls_wait_for_all_threads_of_the_last(threads: int, programs: int) -> None:
    """More threads than cores, too: one that is put off its core holds up the others, and nothing else."""
    assert torch.equal(chained(threads, programs), chained(1, programs))


def test_programs_run_in_their_order() -> None:
    pool = Pool(2)
    first, last = Program(pool), Program(pool)
    a, b, c = torch.full((1, 128), 2.0), torch.zeros(1, 64), torch.zeros(1, 64)
    first.add("activation", [a, b], [64, 128, 64, 0, 1])
    last.add("rms_norm", [b, torch.ones(64), c], [64, 64, 64, 0], [0.0])
    Replay([(first, Step(1)), (last, Step(1))]).run()
    torch.testing.assert_close(c, torch.ones(1, 64))


def test_a_profile_names_every_call() -> None:
    pool = Pool(2)
    program = chain(pool, [torch.ones(ROWS + 1, WIDTH), torch.ones(ROWS + 1, WIDTH)])
    names, seconds = zip(*program.profile(Step(ROWS)), strict=True)
    assert names == ("rms_norm",) * CALLS
    assert min(seconds) > 0
