"""The noise of `engine.rng`, drawn where the logits are: Philox 4x64-10 and −log(−log(1 − v)) for each token id.

The random words are the same ones, bit for bit; the logarithms are the GPU's, so noise differs from a CPU's by its
rounding (about 1e-6).
"""

import torch
import triton
import triton.language as tl

from wherry_runtime.kernels.cuda.elements import FUSED

BLOCKS = 64  # of eight token ids, in a program


@triton.jit
def philox(seed, position, counter):
    """Block `counter` of the stream with key (seed, position): four uint64 of each element."""
    c0 = counter
    c1 = counter * 0
    c2 = c1
    c3 = c1
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, c0 * 0 + 0xD2E7470EE14C6C93)
        low0 = c0 * 0xD2E7470EE14C6C93
        high1 = tl.umulhi(c2, c2 * 0 + 0xCA5A826395121157)
        low1 = c2 * 0xCA5A826395121157
        c0 = high1 ^ c1 ^ seed
        c1 = low1
        c2 = high0 ^ c3 ^ position
        c3 = low0
        seed += 0x9E3779B97F4A7C15
        position += 0xBB67AE8584CAA73B
    return c0, c1, c2, c3


@triton.jit
def gumbel(word):
    """Uniform words below 2³² → Gumbel noise, in float32."""
    v = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    # A GPU's logarithm is coarse near 1, which is where the winners come from: there by its series.
    series = v * (1 + v * (0.5 + v * (0.33333334 + v * (0.25 + v * (0.2 + v * 0.16666667)))))
    return -tl.log(tl.where(v < 0.1, series, -tl.log(1.0 - v)))


@triton.jit
def add_noise(scores, column, word, temperature, num_columns):
    """Divides by the temperature and adds noise, in place."""
    inside = column < num_columns
    value = tl.load(scores + column, mask=inside, other=0.0)
    tl.store(scores + column, value / temperature + gumbel(word), mask=inside)


@triton.jit(do_not_specialize=["num_columns"])
def perturb_kernel(scores, stride, rows, keys, temperatures, num_columns, BLOCKS: tl.constexpr):
    """8 · BLOCKS token ids, from program_id(1) · 8 · BLOCKS on, of row rows[program_id(0)]."""
    index = tl.program_id(0)
    row = scores + tl.load(rows + index) * stride
    seed = tl.load(keys + 2 * index).to(tl.uint64)
    position = tl.load(keys + 2 * index + 1).to(tl.uint64)
    temperature = tl.load(temperatures + index)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    # NumPy's counter is raised before it is used.
    words = philox(seed, position, block.to(tl.uint64) + 1)
    for lane in tl.static_range(4):
        column = block * 8 + 2 * lane
        add_noise(row, column, words[lane] & 0xFFFFFFFF, temperature, num_columns)
        add_noise(row, column + 1, words[lane] >> 32, temperature, num_columns)


def perturb(
    scores: torch.Tensor, rows: list[int], seeds: list[int], positions: list[int], temperatures: list[float]
) -> None:
    """Divides rows of scores by temperatures and adds the noise of (seed, position), in place.

    Args:
        scores: [S, vocab_size] float32.
        rows: which of them; the other lists say something of each.
        seeds: of 64 bits, signed or not.
    """
    device = scores.device
    signed = [value - (1 << 64) if value >= 1 << 63 else value for value in seeds]
    keys = torch.tensor(list(zip(signed, positions, strict=True)), dtype=torch.int64).to(device, non_blocking=True)
    places = torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)
    by = torch.tensor(temperatures, dtype=torch.float32).to(device, non_blocking=True)
    grid = (len(rows), triton.cdiv(scores.shape[1], 8 * BLOCKS))
    perturb_kernel[grid](scores, scores.stride(0), places, keys, by, scores.shape[1], BLOCKS=BLOCKS, **FUSED)
