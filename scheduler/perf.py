"""How long a batch takes: the iteration-time model and its fit; `timemodel` corrects it while running.

    seconds = max over pieces (base + per_token * tokens + per_step * draft_steps)
              + per_context * (sum of decode contexts) + per_area * (sum of chunk * (past + chunk / 2))

The pieces are the memory and compute lines of a roofline (SLOs-Serve, arXiv 2504.08784, section 5, has
only these); the two attention terms follow the context, without which a typical batch is missed by 13 %.
Pure arithmetic on numbers: nothing here measures.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

ROUNDS: Final = 3  # of weighing anew in a fit


@dataclass(frozen=True, slots=True)
class BatchShape:
    """What the time of a batch depends on. `prefill_area` is in tokens squared, the others count tokens."""

    tokens: int
    decode_context: int = 0
    prefill_area: float = 0.0
    draft_steps: int = 0


@dataclass(frozen=True, slots=True)
class Piece:
    """One line of the roofline, in seconds."""

    base: float
    per_token: float
    per_step: float = 0.0


@dataclass(frozen=True, slots=True)
class PerfModel:
    """Seconds of one iteration as a function of its shape, and the inverse."""

    pieces: tuple[Piece, ...]
    per_context: float = 0.0
    per_area: float = 0.0

    def __post_init__(self) -> None:
        if not self.pieces:
            raise ValueError("a time model needs at least one piece, got none")
        if not any(piece.per_token > 0 for piece in self.pieces):
            raise ValueError("a time model needs a piece with per_token > 0: batches would be free")

    def seconds(self, shape: BatchShape) -> float:
        line = max(p.base + p.per_token * shape.tokens + p.per_step * shape.draft_steps for p in self.pieces)
        return max(line + self.per_context * shape.decode_context + self.per_area * shape.prefill_area, 1e-6)

    def tokens_within(self, seconds: float, decode_context: int = 0, draft_steps: int = 0) -> int:
        """The most tokens whose batch takes at most `seconds`; 0 when not even an empty one fits."""
        room = seconds - self.per_context * decode_context
        most = math.inf
        for piece in self.pieces:
            left = room - piece.base - piece.per_step * draft_steps
            if left < 0:
                return 0
            if piece.per_token > 0:
                most = min(most, left / piece.per_token)
        return int(most + 1e-9)

    def scaled(self, factor: float) -> PerfModel:
        """The model of a machine that takes `factor` times as long."""
        pieces = (Piece(factor * p.base, factor * p.per_token, factor * p.per_step) for p in self.pieces)
        return PerfModel(tuple(pieces), factor * self.per_context, factor * self.per_area)

    def to_json(self) -> dict[str, Any]:
        return {
            "pieces": [[p.per_token, p.per_step, p.base] for p in self.pieces],
            "per_context": self.per_context,
            "per_area": self.per_area,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> PerfModel:
        """Inverse of `to_json`. Raises ValueError naming a missing or malformed field."""
        try:
            pieces = tuple(Piece(base=float(b), per_token=float(k), per_step=float(s)) for k, s, b in data["pieces"])
            return PerfModel(pieces, float(data.get("per_context", 0.0)), float(data.get("per_area", 0.0)))
        except KeyError as error:
            raise ValueError(f"time model: field {error} is missing, got {json.dumps(dict(data))[:200]}") from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"time model: {error}; got {json.dumps(dict(data), default=str)[:200]}") from error


@dataclass(frozen=True, slots=True)
class FitQuality:
    """Scores on held-out batches: `r2`, and the mean absolute error in percent of the observed time."""

    r2: float
    mape: float
    samples: int


def _features(shapes: Sequence[BatchShape], knee: float) -> Floats:
    rows = [(1.0, s.tokens, max(s.tokens - knee, 0.0), s.decode_context, s.prefill_area, s.draft_steps) for s in shapes]
    return np.array(rows, dtype=np.float64)


def nonnegative_least_squares(matrix: Floats, target: Floats) -> Floats:
    """Least squares with coefficients >= 0, by trying every set of free columns; the first is always free."""
    best, best_error = np.zeros(matrix.shape[1]), math.inf
    columns = range(1, matrix.shape[1])
    for size in range(len(columns) + 1):
        for chosen in itertools.combinations(columns, size):
            free = [0, *chosen]
            solution, *_ = np.linalg.lstsq(matrix[:, free], target, rcond=None)
            if (solution < 0).any():
                continue
            error = float(np.square(matrix[:, free] @ solution - target).sum())
            if error < best_error * (1 - 1e-9):
                best, best_error = np.zeros(matrix.shape[1]), error
                best[free] = solution
    return best


def fit(shapes: Sequence[BatchShape], seconds: Sequence[float]) -> PerfModel:
    """The roofline with attention terms that fits the samples best in relative error.

    Tries a knee at every power of two between the smallest and largest batch. All coefficients are >= 0,
    so more work never takes less time. Errors are relative to what the round before predicted: relative to
    what was observed they would pull a noisy fit below the mean. Raises ValueError for fewer than four
    samples or a time <= 0.
    """
    if len(shapes) != len(seconds) or len(shapes) < 4:
        raise ValueError(f"a fit needs at least 4 samples with a time each, got {len(shapes)} and {len(seconds)}")
    target = np.array(seconds, dtype=np.float64)
    if not (target > 0).all():
        raise ValueError(f"times must be positive seconds, got {float(target.min())!r}")
    largest = max(s.tokens for s in shapes)
    knees = [2.0**e for e in range(2, 13) if 2**e < largest] or [float(largest)]
    best: tuple[float, float, Floats] = (math.inf, knees[0], np.zeros(6))
    for knee in knees:
        matrix = _features(shapes, knee)
        scale = np.maximum(np.abs(matrix).max(axis=0), 1e-12)
        expected = target
        for _ in range(ROUNDS):
            weighted = matrix / scale / expected[:, None]
            solution = nonnegative_least_squares(weighted, target / expected) / scale
            expected = np.maximum(matrix @ solution, 1e-3 * target)
        error = float(np.square(target / expected - 1.0).mean())
        if error < best[0]:
            best = (error, knee, solution)
    _, knee, (base, slope, extra, context, area, step) = best
    flat = Piece(base, slope, step)
    steep = Piece(base - extra * knee, slope + extra, step)
    pieces = (flat, steep) if extra > 0 else (flat,)
    if not any(piece.per_token > 0 for piece in pieces):
        pieces = (Piece(base, 1e-9, step),)
    return PerfModel(tuple(map(_plain, pieces)), float(context), float(area))


def _plain(piece: Piece) -> Piece:
    return Piece(float(piece.base), float(piece.per_token), float(piece.per_step))


def quality(model: PerfModel, shapes: Sequence[BatchShape], seconds: Sequence[float]) -> FitQuality:
    """Score a model on batches it was not fitted to."""
    observed = np.array(seconds, dtype=np.float64)
    predicted = np.array([model.seconds(shape) for shape in shapes])
    total = float(np.square(observed - observed.mean()).sum())
    r2 = 1.0 - float(np.square(observed - predicted).sum()) / total if total > 0 else math.nan
    return FitQuality(r2, float(np.abs(predicted / observed - 1).mean() * 100), len(shapes))
