"""Sums over positions of a text, and what they say."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec


class Summary(msgspec.Struct, frozen=True):
    """A model beside a reference, both shown the same tokens (teacher-forced: one difference does not make all that
    follow differ).

    Attributes:
        perplexity: exp of the mean loss.
        change: perplexity / the reference's - 1.
        error: standard error of `change`, from the paired differences of losses.
        agreement: share of positions at which the likeliest next token is the reference's.
        divergence: mean Kullback-Leibler divergence from the reference, in nats per token.
    """

    perplexity: float
    change: float
    error: float
    agreement: float
    divergence: float
    positions: int


@dataclass
class Score:
    """What is summed, so that memory does not grow with the text."""

    positions: int = 0
    agreed: int = 0
    divergence: float = 0.0
    _loss: float = 0.0
    _difference: float = 0.0
    _squared: float = 0.0

    def add(
        self,
        losses: Sequence[float],
        likeliest: Sequence[int],
        reference_losses: Sequence[float],
        reference_likeliest: Sequence[int],
        divergence: float = 0.0,
    ) -> None:
        """Some positions: minus the log-probability of the token that came, and the likeliest one, of each model."""
        self.positions += len(losses)
        self.agreed += sum(a == b for a, b in zip(likeliest, reference_likeliest, strict=True))
        self.divergence += divergence
        self._loss += math.fsum(losses)
        differences = [a - b for a, b in zip(losses, reference_losses, strict=True)]
        self._difference += math.fsum(differences)
        self._squared += math.fsum(d * d for d in differences)

    def summary(self) -> Summary:
        """Of everything added so far; there is at least one position."""
        count = self.positions
        mean = self._difference / count
        variance = max(0.0, self._squared / count - mean * mean)
        return Summary(
            perplexity=math.exp(self._loss / count),
            change=math.expm1(mean),
            error=math.sqrt(variance / count),
            agreement=self.agreed / count,
            divergence=self.divergence / count,
            positions=count,
        )
