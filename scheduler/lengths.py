"""How long will the output be? Nobody knows, so each class's finished requests tell.

`CLASS_MEAN` expects the class's running mean, given that the request has come as far as it has; `QUANTILE`
the length that a share of the class's requests does not exceed; `NONE` nothing beyond what is there. A
caller's own estimate goes before all but `NONE`. A prior holds until enough have ended.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .jit import compiled

MODES: Final = ("class_mean", "quantile", "none")
CLASS_MEAN: Final = 0
QUANTILE: Final = 1
NONE: Final = 2

PRIOR_TOKENS: Final = 128.0
PRIOR_WEIGHT: Final = 4.0
MEMORY: Final = 200.0  # requests over which the statistics forget
SHARE: Final = 0.9  # of a class's requests that the quantile covers

# A row of statistics for each class: weight, tokens, acceptance of guesses, then a histogram of lengths.
WEIGHT: Final = 0
TOTAL: Final = 1
ACCEPTANCE: Final = 2
FIRST_BIN: Final = 3
BINS: Final = 68  # four to a doubling: lengths up to 2^17
COLUMNS: Final = FIRST_BIN + BINS


def new_class(acceptance: float) -> NDArray[np.float64]:
    """The statistics of a class nothing is known of, shape [COLUMNS]."""
    row = np.zeros(COLUMNS)
    row[WEIGHT], row[TOTAL], row[ACCEPTANCE] = PRIOR_WEIGHT, PRIOR_TOKENS * PRIOR_WEIGHT, acceptance
    row[FIRST_BIN + int(4 * math.log2(PRIOR_TOKENS))] = PRIOR_WEIGHT
    return row


@compiled
def observe_length(row: Any, tokens: float) -> None:
    """A request of the class ended after `tokens` output tokens."""
    keep = 1.0 - 1.0 / MEMORY
    row[WEIGHT] = row[WEIGHT] * keep + 1.0
    row[TOTAL] = row[TOTAL] * keep + tokens
    for i in range(FIRST_BIN, COLUMNS):
        row[i] *= keep
    row[FIRST_BIN + min(int(4.0 * np.log2(max(tokens, 1.0))), BINS - 1)] += 1.0


@compiled
def expected_length(row: Any, mode: int, emitted: float, most: float, asked: float) -> float:
    """Output tokens at the end of a request that has `emitted` and may produce `most`; `asked` NaN: no estimate.

    Past the mean the remaining length is taken as half a mean: the tail of a long-tailed length.
    """
    if mode == NONE:
        return emitted
    if asked == asked:
        return max(emitted, min(asked, most))
    if mode == QUANTILE:
        return min(most, max(quantile(row, emitted), emitted))
    mean = row[TOTAL] / row[WEIGHT]
    return float(min(most, max(mean, emitted + 0.5 * mean)))


@compiled
def quantile(row: Any, emitted: float) -> float:
    """The length that `SHARE` of the requests that have come as far as `emitted` do not exceed."""
    first = FIRST_BIN + min(int(4.0 * np.log2(max(emitted, 1.0))), BINS - 1)
    total = 0.0
    for i in range(first, COLUMNS):
        total += row[i]
    passed = 0.0
    for i in range(first, COLUMNS):
        passed += row[i]
        if passed >= SHARE * total:
            return float(2.0 ** ((i - FIRST_BIN + 1) / 4.0))
    return emitted
