"""The time model as one array that compiled loops read, and what running teaches about it.

`pack` lays a `PerfModel` out; `observe` corrects it: observed = offset + scale * predicted, by exponentially
weighted least squares over about `MEMORY` iterations. An observation far outside what was seen before is
pulled in (Huber), so that one page fault or garbage collection does not move the line. The margin is the
relative upper error (about a 95 % quantile) that a promise has to allow for.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .jit import compiled
from .perf import PerfModel

# Layout of the array.
PIECES: Final = 0  # how many
CONTEXT: Final = 1  # seconds per token of decode context
AREA: Final = 2  # seconds per token squared of prefill attention
SCALE: Final = 3
OFFSET: Final = 4
MARGIN: Final = 5
FIXED: Final = 6  # 1 when the margin is not learnt
DEVIATION: Final = 7  # running mean of the relative error
SUMS: Final = 8  # five weighted sums: w, wx, wy, wxx, wxy
FIRST_PIECE: Final = 13  # base, per_token, per_step of each

MEMORY: Final = 200.0  # iterations
MIN_MARGIN: Final = 0.02
MAX_MARGIN: Final = 0.5
START_MARGIN: Final = 0.1
START_DEVIATION: Final = 0.05
LOW_RATIO: Final = 0.2
HIGH_RATIO: Final = 5.0


def pack(model: PerfModel, margin: float | None = None) -> NDArray[np.float64]:
    """The model as an array, uncorrected; `margin` fixes the planning margin, None learns it."""
    flat = [value for piece in model.pieces for value in (piece.base, piece.per_token, piece.per_step)]
    packed = np.zeros(FIRST_PIECE + len(flat))
    packed[PIECES] = len(model.pieces)
    packed[CONTEXT] = model.per_context
    packed[AREA] = model.per_area
    packed[SCALE] = 1.0
    packed[MARGIN] = START_MARGIN if margin is None else margin
    packed[FIXED] = margin is not None
    packed[DEVIATION] = START_DEVIATION
    packed[FIRST_PIECE:] = flat
    return packed


@compiled
def apply(perf: Any, raw: float) -> float:
    """Corrected seconds for what the model says."""
    return float(max(perf[OFFSET] + perf[SCALE] * raw, LOW_RATIO * raw))


@compiled
def invert(perf: Any, corrected: float) -> float:
    """What the model said, from what `apply` made of it."""
    return float(min((corrected - perf[OFFSET]) / perf[SCALE], corrected / LOW_RATIO))


@compiled
def batch_seconds(perf: Any, tokens: float, context: float, area: float, steps: float) -> float:
    """Corrected seconds of a batch (`perf.BatchShape`'s fields, in order)."""
    line = 0.0
    for i in range(int(perf[PIECES])):
        at = FIRST_PIECE + 3 * i
        line = max(line, perf[at] + perf[at + 1] * tokens + perf[at + 2] * steps)
    return apply(perf, line + perf[CONTEXT] * context + perf[AREA] * area)


@compiled
def tokens_within(perf: Any, seconds: float, context: float, area: float, steps: float) -> float:
    """The most tokens (not rounded) whose batch takes at most `seconds`; negative when none fits."""
    raw = invert(perf, seconds)
    raw -= perf[CONTEXT] * context + perf[AREA] * area
    most = 1e12
    for i in range(int(perf[PIECES])):
        at = FIRST_PIECE + 3 * i
        left = raw - perf[at] - perf[at + 2] * steps
        if left < 0.0:
            return -1.0
        if perf[at + 1] > 0.0:
            most = min(most, left / perf[at + 1])
    return most


@compiled
def observe(perf: Any, predicted: float, observed: float) -> None:
    """Learn from one iteration: the uncorrected prediction and the observed time, in seconds."""
    if predicted <= 0.0 or observed <= 0.0:
        return
    expected = apply(perf, predicted)
    limit = 4.0 * max(perf[DEVIATION], 0.02)
    clipped = min(max(observed / expected - 1.0, -limit), limit)
    keep = 1.0 - 1.0 / MEMORY
    perf[DEVIATION] = keep * perf[DEVIATION] + (1.0 - keep) * abs(clipped)
    if perf[FIXED] < 0.5:
        perf[MARGIN] = min(max(2.0 * 1.25 * perf[DEVIATION], MIN_MARGIN), MAX_MARGIN)
    # Relative weights: a short iteration counts as much as a long one.
    target, weight = expected * (1.0 + clipped), 1.0 / (predicted * predicted)
    w = perf[SUMS] = keep * perf[SUMS] + weight
    wx = perf[SUMS + 1] = keep * perf[SUMS + 1] + weight * predicted
    wy = perf[SUMS + 2] = keep * perf[SUMS + 2] + weight * target
    wxx = perf[SUMS + 3] = keep * perf[SUMS + 3] + weight * predicted * predicted
    wxy = perf[SUMS + 4] = keep * perf[SUMS + 4] + weight * predicted * target
    spread = w * wxx - wx * wx
    if spread > 0.05 * wx * wx:
        scale = (w * wxy - wx * wy) / spread
        offset = (wy - scale * wx) / w
        if LOW_RATIO <= scale <= HIGH_RATIO and offset >= -0.5 * scale * wx / w:
            perf[SCALE], perf[OFFSET] = scale, offset
            return
    perf[SCALE], perf[OFFSET] = min(max(wxy / wxx, LOW_RATIO), HIGH_RATIO), 0.0
