"""How many prompt tokens may join a step while answers are running.

A step that carries a chunk of a prompt takes longer, and every running answer waits for it. The budget of such a step
is therefore one of time: a cost model, fitted to the durations of the steps so far, says how many prompt tokens may
come along so that the step takes at most `max_itl_ratio` times as long as one without any. The chunked prefill of
Agrawal et al., 2024 (https://arxiv.org/abs/2403.02310) with its token budget derived instead of set by hand: the right
number differs between a CPU and a GPU by a factor of a thousand.
"""

import math

from wherry_runtime.scheduling.plan import Work

AIM = 0.9  # share of the ratio that a step is planned for: durations scatter
MIN_CHUNK = 8  # prompt tokens that a step takes anyway, so that prompts always progress

# What a coefficient is the cost of: the step itself, then these many of each kind of work. Only for conditioning.
UNITS = Work(decodes=16, decode_context=8192, prefill_tokens=256, prefill_context=256 * 2048)
SPREAD_S = 1.0  # before anything was measured, coefficients may be anything of this order
NOISE = 0.05  # of a step's duration, relative
MIN_NOISE_S = 50e-6
DRIFT = 0.02  # by which a coefficient may change from step to step, relative
OUTLIER = 4.0  # standard deviations beyond which a duration counts as if it were there


class CostModel:
    """Seconds of a step ≈ a + b·decodes + c·their context + d·prefill tokens + e·their context, none negative.

    Fitted step by step with a Kalman filter whose coefficients drift (recursive least squares that forgets only what
    new steps speak about: thousands of steps without a prompt leave the cost of prompts as it was known).
    """

    def __init__(self) -> None:
        # Plain lists: for five numbers, calling NumPy costs more than the arithmetic.
        self._cost = [0.0] * 5
        self._covariance = [[SPREAD_S**2 * (i == j) for j in range(5)] for i in range(5)]

    def observe(self, work: Work, seconds: float) -> None:
        """Learns that a step with `work` took `seconds`."""
        x = _features(work)
        expected = _dot(self._cost, x)
        noise = max(NOISE * (expected or seconds), MIN_NOISE_S)
        projected = [_dot(row, x) for row in self._covariance]
        variance = _dot(projected, x) + noise * noise
        limit = OUTLIER * math.sqrt(variance)
        surprise = min(max(seconds - expected, -limit), limit)
        gain = [p / variance for p in projected]
        self._cost = [max(c + g * surprise, 0.0) for c, g in zip(self._cost, gain, strict=True)]
        for i, (row, g) in enumerate(zip(self._covariance, gain, strict=True)):
            row[:] = [value - g * p for value, p in zip(row, projected, strict=True)]
            # What is as uncertain as it is large gets no more so.
            if row[i] < max(self._cost[i], seconds * 0.1) ** 2:
                row[i] += (DRIFT * max(self._cost[i], seconds * 0.01)) ** 2

    def seconds(self, work: Work) -> float:
        """How long a step with `work` should take."""
        return _dot(self._cost, _features(work))

    def chunk(self, start: int, seconds: float) -> int:
        """The most tokens from position `start` on that cost no more than `seconds`; 0 if that is not known yet."""
        per_token = self._cost[3] / UNITS.prefill_tokens
        per_pair = self._cost[4] / UNITS.prefill_context
        # n tokens attend to n·start + n²/2 others: solve pair/2·n² + (token + pair·start)·n = seconds.
        linear = per_token + per_pair * start
        if linear <= 0.0 or seconds <= 0.0:
            return 0
        return int(2 * seconds / (linear + math.sqrt(linear * linear + 2 * per_pair * seconds)))


def _features(work: Work) -> list[float]:
    return [
        1.0,
        work.decodes / UNITS.decodes,
        work.decode_context / UNITS.decode_context,
        work.prefill_tokens / UNITS.prefill_tokens,
        work.prefill_context / UNITS.prefill_context,
    ]


def _dot(a: list[float], b: list[float]) -> float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3] + a[4] * b[4]


def prefill_context(start: int, count: int) -> int:
    """Tokens that `count` tokens from position `start` on attend to, added up, themselves included."""
    return count * start + count * (count + 1) // 2


class Allowance:
    """What prompts may take of one step: a number of tokens, and seconds if there are decodes to wait for it."""

    def __init__(self, tokens: int, model: CostModel | None = None, seconds: float = math.inf) -> None:
        self.tokens = tokens
        self._model = model
        self._seconds = seconds
        self._taken = 0

    @property
    def exhausted(self) -> bool:
        """Whether nothing more may be taken."""
        if self._model is None or self._taken < MIN_CHUNK:
            return self.tokens < 1
        return self.tokens < 1 or self._model.chunk(0, self._seconds) < 1

    def take(self, start: int, wanted: int) -> int:
        """How many of `wanted` tokens from position `start` on go into the step: at least 1, unless it is exhausted."""
        count = min(wanted, self.tokens)
        if self._model is not None:
            count = min(count, max(self._model.chunk(start, self._seconds), MIN_CHUNK - self._taken, 1))
            before = self._model.seconds(Work())
            work = Work(prefill_tokens=count, prefill_context=prefill_context(start, count))
            self._seconds -= self._model.seconds(work) - before
        self.tokens -= count
        self._taken += count
        return count


class Pacer:
    """Decides how much of a prompt goes into a step with decodes.

    `max_itl_ratio`: how many times as long as a step without prompts one with them may take; 0 for no limit.
    """

    def __init__(self, max_itl_ratio: float = 0.0) -> None:
        if max_itl_ratio and max_itl_ratio < 1:
            raise ValueError("max_itl_ratio is at least 1, or 0 for no limit")
        self.model = CostModel()
        self._ratio = max_itl_ratio
        self._knows_decodes = False

    def observe(self, work: Work, seconds: float) -> None:
        """Learns from a step that took `seconds`."""
        self.model.observe(work, seconds)
        self._knows_decodes = self._knows_decodes or not work.prefill_tokens

    def allowance(self, tokens: int, decodes: int, decode_context: int) -> Allowance:
        """For a step with these decodes and room for `tokens` more."""
        if not self._ratio or not decodes:
            return Allowance(tokens)
        alone = self.model.seconds(Work(decodes=decodes, decode_context=decode_context)) if self._knows_decodes else 0.0
        return Allowance(tokens, self.model, max(AIM * self._ratio - 1, 0.0) * alone)
