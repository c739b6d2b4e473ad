"""How long will the output be? Nobody knows, so each class's finished requests tell.

The estimate is the class's running mean, given that the request has come as far as it has; a prior holds
until enough have ended. Knowing exact lengths gained nothing over class means in our simulations.
"""

from __future__ import annotations

from dataclasses import dataclass

PRIOR_TOKENS = 128.0
PRIOR_WEIGHT = 4.0
MEMORY = 200.0  # requests over which the mean forgets


@dataclass(slots=True)
class ClassMean:
    """Running mean of output tokens for one class."""

    weight: float = PRIOR_WEIGHT
    total: float = PRIOR_TOKENS * PRIOR_WEIGHT

    @property
    def mean(self) -> float:
        return self.total / self.weight

    def observe(self, tokens: int) -> None:
        keep = 1.0 - 1.0 / MEMORY
        self.weight = self.weight * keep + 1.0
        self.total = self.total * keep + tokens

    def expect(self, emitted: int, most: int) -> float:
        """Expected tokens at the end for a request that has `emitted` and may produce `most`.

        Past the mean the remaining length is taken as half a mean: the tail of a long-tailed length.
        """
        mean = self.mean
        return min(float(most), max(mean, emitted + 0.5 * mean))
