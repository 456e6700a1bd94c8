"""How large a step may be after one has run out of memory.

The KV cache is allocated once; what a step needs beside it grows with its tokens. So a step that ran out is made again
half as large, and the limit doubles again after a while without another failure: multiplicative decrease as in
congestion control, with a longer wait after each failure, since the memory is probably somebody else's for good.
"""

FIRST_WAIT = 16  # good steps before the limit doubles
LONGEST_WAIT = 4096


class StepLimit:
    """Tokens in a step: `full` unless memory ran out lately."""

    def __init__(self, full: int) -> None:
        self.full = full
        self.tokens = full
        self._wait = FIRST_WAIT
        self._good = 0

    def failed(self, num_tokens: int) -> bool:
        """A step of `num_tokens` ran out of memory. False: it cannot be made smaller."""
        self._good = 0
        self._wait = min(2 * self._wait, LONGEST_WAIT)
        self.tokens = min(self.tokens, max(num_tokens // 2, 1))
        return num_tokens > 1

    def succeeded(self) -> None:
        """A step was computed."""
        if self.tokens == self.full and self._wait == FIRST_WAIT:
            return
        self._good += 1
        if self._good < self._wait:
            return
        self._good = 0
        if self.tokens == self.full:
            self._wait = FIRST_WAIT
        self.tokens = min(2 * self.tokens, self.full)
