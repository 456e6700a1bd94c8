"""How many prompt tokens may join a step while answers are running.

A step that carries a chunk of a prompt takes longer, and every running answer waits for it. The budget of such a step
is therefore one of time: from the durations of the steps so far, how many prompt tokens may come along so that the step
takes at most `max_itl_ratio` times as long as one without any. The chunked prefill of Agrawal et al., 2024
(https://arxiv.org/abs/2403.02310) with its token budget derived instead of set by hand: the right number differs
between a CPU and a GPU by a factor of a thousand.
"""

import math

from wherry_runtime.scheduling.plan import Work

AIM = 0.9  # share of the ratio that a step is planned for: durations scatter
MIN_CHUNK = 4  # prompt tokens that a step takes anyway, so that prompts always progress
GROWTH = 1.5  # how much larger than those before a chunk may be: costs need not grow evenly
PROBE_EVERY = 64  # steps with prompts after which one goes without, to see anew how long that takes
MEMORY = 0.85  # weight of what was known of a prompt token's cost, against one more step

DECODES, CONTEXT = 16, 8192  # units of the decode costs' coefficients: only for conditioning
SPREAD = (0.5, 0.5, 0.1)  # what is thought possible of each coefficient at first, as a share of a step
NOISE = 0.05  # of a step's duration, relative
DRIFT = 0.03  # by which a coefficient may change from step to step, as a share of its spread
OUTLIER = 4.0  # standard deviations beyond which a duration counts as if it were there


class DecodeCost:
    """Seconds of a step without prompts ≈ a + b·decodes + c·their context.

    Fitted with a Kalman filter whose coefficients drift: recursive least squares that forgets only what new steps speak
    about. Plain lists, because for three numbers calling NumPy costs more than the arithmetic.
    """

    def __init__(self) -> None:
        self._cost = [0.0] * 3
        self._covariance = [[0.0] * 3 for _ in range(3)]
        self.known = False

    def observe(self, decodes: int, context: int, seconds: float) -> None:
        """Learns that such a step took `seconds`."""
        if not self.known:
            # A first guess: all of it is the step's own cost, and the others are of the same order.
            self._cost[0] = seconds
            for i, spread in enumerate(SPREAD):
                self._covariance[i][i] = (spread * seconds) ** 2
            self.known = True
        x = _features(decodes, context)
        expected = _dot(self._cost, x)
        noise = NOISE * max(expected, 0.2 * seconds)
        projected = [_dot(row, x) for row in self._covariance]
        variance = _dot(projected, x) + noise * noise
        limit = OUTLIER * math.sqrt(variance)
        surprise = min(max(seconds - expected, -limit), limit)
        gain = [p / variance for p in projected]
        self._cost = [c + g * surprise for c, g in zip(self._cost, gain, strict=True)]
        for i, (row, g) in enumerate(zip(self._covariance, gain, strict=True)):
            row[:] = [value - g * p for value, p in zip(row, projected, strict=True)]
            spread = SPREAD[i] * seconds
            if row[i] < spread * spread:  # what is as uncertain as at first gets no more so
                row[i] += (DRIFT * spread) ** 2

    def seconds(self, decodes: int, context: int) -> float:
        """How long such a step should take; 0 if none was seen yet."""
        return max(_dot(self._cost, _features(decodes, context)), 0.0)


def _features(decodes: int, context: int) -> list[float]:
    return [1.0, decodes / DECODES, context / CONTEXT]


def _dot(a: list[float], b: list[float]) -> float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


class PromptCost:
    """Seconds per prompt token: least squares through zero over the last few steps, so that it follows a prompt whose
    later tokens attend to more."""

    def __init__(self) -> None:
        self._squares = 0.0
        self._products = 0.0
        self.largest = 0.0  # chunk lately

    def observe(self, tokens: int, seconds: float) -> None:
        """Learns that `tokens` made a step longer by `seconds`."""
        self._squares = MEMORY * self._squares + tokens * tokens
        self._products = MEMORY * self._products + tokens * seconds
        self.largest = max(tokens, MEMORY * self.largest)

    def seconds(self, tokens: int) -> float:
        """What `tokens` cost; 0 if that is not known."""
        return tokens * max(self._products / self._squares, 0.0) if self._squares else 0.0

    def affordable(self, seconds: float) -> int:
        """How many tokens cost no more than `seconds`, not many more than were tried lately."""
        most = int(GROWTH * self.largest)
        cost = self.seconds(most)
        return int(most * seconds / cost) if cost > seconds else most


class Allowance:
    """What prompts may take of one step."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    @property
    def exhausted(self) -> bool:
        """Whether nothing more may be taken."""
        return self.tokens < 1

    def take(self, wanted: int) -> int:
        """How many of `wanted` tokens go into the step; they are booked."""
        count = min(wanted, self.tokens)
        self.tokens -= count
        return count


class Pacer:
    """Decides how much of prompts goes into a step with decodes.

    `max_itl_ratio`: how many times as long as a step without prompts one with them may take; 0 for no limit.
    """

    def __init__(self, max_itl_ratio: float = 0.0) -> None:
        if max_itl_ratio and not max_itl_ratio >= 1:
            raise ValueError("max_itl_ratio is at least 1, or 0 for no limit")
        self._ratio = max_itl_ratio
        self._decode = DecodeCost()
        self._beside_decodes = PromptCost()
        self._alone = PromptCost()
        self._since_probe = 0

    def observe(self, work: Work, seconds: float) -> None:
        """Learns from a step that took `seconds`."""
        if not work.prefill_tokens:
            self._decode.observe(work.decodes, work.decode_context, seconds)
        elif not work.decodes:
            self._alone.observe(work.prefill_tokens, seconds)
        elif self._decode.known:
            extra = seconds - self._decode.seconds(work.decodes, work.decode_context)
            self._beside_decodes.observe(work.prefill_tokens, extra)

    def seconds(self, work: Work) -> float:
        """How long a step with `work` should take; 0 if that is not known yet."""
        if not work.decodes:
            return self._alone.seconds(work.prefill_tokens)
        decode = self._decode.seconds(work.decodes, work.decode_context)
        return decode + self._beside_decodes.seconds(work.prefill_tokens)

    def allowance(self, tokens: int, decodes: int, decode_context: int) -> Allowance:
        """For a step with these decodes and room for `tokens` more."""
        if not self._ratio or not decodes:
            return Allowance(tokens)
        self._since_probe += 1
        if self._since_probe > PROBE_EVERY:
            self._since_probe = 0
            return Allowance(0)
        spare = max(AIM * self._ratio - 1, 0.0) * self._decode.seconds(decodes, decode_context)
        return Allowance(min(tokens, max(self._beside_decodes.affordable(spare), MIN_CHUNK)))
