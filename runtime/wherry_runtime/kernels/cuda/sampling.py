"""Sampling on the GPU: one answer from it in a greedy step, and noise that is drawn where it is needed."""

from collections.abc import Sequence

import torch

from wherry_runtime.engine.sampling import Place, keep_likely
from wherry_runtime.kernels.cuda.noise import perturb

SEED = (1 << 64) - 1


class CudaSampler:
    """A `Sampler`. Rows without top-k, top-p and min-p are drawn together; each of the others is filtered by itself."""

    def __init__(self) -> None:
        self._likeliest: list[int] = []

    def finite(self, logits: torch.Tensor) -> list[bool]:
        top, tokens = logits.max(dim=-1)
        flags, self._likeliest = torch.stack((top.isfinite().long(), tokens)).tolist()
        return [bool(flag) for flag in flags]

    def draw(self, logits: torch.Tensor, places: Sequence[Place], *, changed: bool) -> list[int]:
        rows = [index for index, place in enumerate(places) if not place.live.greedy]
        if not rows and not changed:
            return self._likeliest
        temperatures = []
        for index in rows:
            live, params = places[index].live, places[index].live.params
            temperatures.append(1.0 if live.filtered else params.temperature)
            if live.filtered:
                scores = logits[index] / params.temperature
                logits[index] = keep_likely(scores, params.top_k, params.top_p, params.min_p)
        if rows:
            drawn = [places[index] for index in rows]
            seeds = [place.live.seed & SEED for place in drawn]
            positions = [place.live.num_tokens + len(place.ahead) for place in drawn]
            perturb(logits, rows, seeds, positions, temperatures)
        tokens: list[int] = logits.argmax(dim=-1).tolist()
        return tokens
