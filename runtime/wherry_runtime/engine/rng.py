"""Random numbers that depend on nothing but (seed, position).

Philox 4x64-10 (Salmon et al., 2011, https://doi.org/10.1145/2063384.2063405), a counter-based generator: the key is
(seed, position) and the counter runs over the vocabulary, so every token id at every position has noise of its own,
with no state to carry through batching, preemption or a move to another worker. `random_raw` of NumPy's Philox is
pinned to stay as it is between versions (only distributions built on it may change, and we use none); tests pin values
here too.

A token is drawn by the Gumbel-max trick: argmax of log p + g is distributed as p. One noise value per token id makes
the draw stable: a rounding error of 1e-6 in a logit changes the winner with a probability of about 1e-6, where the
inverse of a cumulative sum over the vocabulary would collect the errors of all terms.
"""

from collections import OrderedDict

import numpy as np
import torch

MASK = (1 << 64) - 1
BELOW_ONE = np.float32(1 - 2.0**-24)  # the largest float32 under 1


def words(seed: int, position: int, count: int) -> "np.ndarray[tuple[int], np.dtype[np.uint32]]":
    """[count] uint32: Philox's output for the token drawn at `position`, low halves first."""
    key = np.array([seed & MASK, position & MASK], dtype=np.uint64)
    return np.random.Philox(key=key).random_raw((count + 1) // 2).astype("<u8", copy=False).view("<u4")[:count]


def gumbel(noise: "np.ndarray[tuple[int], np.dtype[np.uint32]]") -> torch.Tensor:
    """Uniform words → float32 samples of the standard Gumbel distribution, all finite: −log(−log(1 − v)).

    v is fine near 0, where the winners of a large vocabulary are: 2⁻³² apart, not float32's 2⁻²⁴ near 1, which would
    make ties among likely tokens.
    """
    v = noise.astype(np.float32)
    v += np.float32(0.5)
    v *= np.float32(2.0**-32)
    np.minimum(v, BELOW_ONE, out=v)
    np.log1p(np.negative(v, out=v), out=v)
    np.log(np.negative(v, out=v), out=v)
    return torch.from_numpy(np.negative(v, out=v))


def gumbel_noise(seed: int, position: int, count: int) -> torch.Tensor:
    """[count] float32: the noise of each token id at `position`."""
    return gumbel(words(seed, position, count))


class NoiseCache:
    """`gumbel_noise` that remembers: a guess and its check draw with the same noise. Not for several threads.

    Args:
        capacity: bytes of noise to keep.
    """

    def __init__(self, capacity: int = 32 << 20) -> None:
        self._left = capacity
        self._known: OrderedDict[tuple[int, int, int], torch.Tensor] = OrderedDict()

    def __call__(self, seed: int, position: int, count: int) -> torch.Tensor:
        """[count] float32, which the caller must not change."""
        key = (seed, position, count)
        noise = self._known.get(key)
        if noise is None:
            noise = self._known[key] = gumbel_noise(seed, position, count)
            self._left -= noise.nbytes
            while self._left < 0:
                self._left += self._known.popitem(last=False)[1].nbytes
        return noise
