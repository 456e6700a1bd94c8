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

import numpy as np
import torch

MASK = (1 << 64) - 1


def uniforms(seed: int, position: int, count: int) -> torch.Tensor:
    """[count] float32 in (0, 1), multiples of 2⁻²⁴ plus 2⁻²⁵, for the token drawn at `position`."""
    key = np.array([seed & MASK, position & MASK], dtype=np.uint64)
    words = np.random.Philox(key=key).random_raw((count + 1) // 2).astype("<u8", copy=False).view("<u4")[:count]
    return torch.from_numpy((words >> np.uint32(8)).astype(np.float32)).add_(0.5).mul_(2.0**-24)


def gumbel_noise(seed: int, position: int, count: int) -> torch.Tensor:
    """[count] float32 samples of the standard Gumbel distribution: −log(−log u)."""
    return uniforms(seed, position, count).log_().neg_().log_().neg_()
