"""The policies by name, and the one place where a step is decided.

A policy is a compiled loop over the columns of `table` that fills `batch` and `evicted` (see
`batching.compose` for each argument) and a dataclass of its parameters. To add one: write both, and give
them a line in `_LOOPS` and a branch in `decide`.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .baselines import DecodeFirst, EarliestDue, PrefillFirst, decode_first, earliest_due, prefill_first
from .batching import CHANGED, EVICTED, FREE_BLOCKS, NUM_BLOCKS, SHARED, compose
from .jit import compiled
from .learning import HELD_BLOCKS, PREEMPTED_TOTAL, SHARED_BLOCKS
from .paper import Published, published
from .table import HELD, TOLD, VERDICT


@dataclass(frozen=True, slots=True)
class SloServe:
    """Ours; its parameters are the scheduler's `PlannerConfig`."""


Policy: TypeAlias = SloServe | Published | PrefillFirst | DecodeFirst | EarliestDue

_OURS: Final = 0
_PREFILL_FIRST: Final = 1
_DECODE_FIRST: Final = 2
_EARLIEST_DUE: Final = 3
_PUBLISHED: Final = 4
_LOOPS: Final[dict[type[Policy], int]] = {
    SloServe: _OURS,
    PrefillFirst: _PREFILL_FIRST,
    DecodeFirst: _DECODE_FIRST,
    EarliestDue: _EARLIEST_DUE,
    Published: _PUBLISHED,
}


def loop_of(policy: Policy) -> tuple[int, NDArray[np.float64]]:
    """Which branch of `decide`, and the parameters it takes. Raises ValueError for an unknown policy."""
    if type(policy) not in _LOOPS:
        raise ValueError(f"policy: must be one of {[each.__name__ for each in _LOOPS]}, got {policy!r}")
    return _LOOPS[type(policy)], np.array(astuple(policy), dtype=np.float64)


@compiled
def decide(
    loop: int,
    knobs: Any,
    real: Any,
    whole: Any,
    active: Any,
    now: float,
    perf: Any,
    limits: Any,
    books: Any,
    batch: Any,
    evicted: Any,
    counts: Any,
) -> float:
    """One step: fill `batch`, `evicted` and `counts`, keep `books`; returns the predicted seconds."""
    limits[FREE_BLOCKS] = limits[NUM_BLOCKS] - books[HELD_BLOCKS] + books[SHARED_BLOCKS]
    limits[SHARED] = books[SHARED_BLOCKS]
    if loop == _OURS:
        predicted = compose(real, whole, active, now, perf, limits, batch, evicted, counts)
    elif loop == _PREFILL_FIRST:
        predicted = prefill_first(whole, active, perf, limits, batch, evicted, counts, knobs[0])
    elif loop == _DECODE_FIRST:
        predicted = decode_first(whole, active, perf, limits, batch, evicted, counts, knobs[0])
    elif loop == _PUBLISHED:
        predicted = published(real, whole, active, now, perf, limits, batch, evicted, counts, knobs[0], knobs[1])
    else:
        predicted = earliest_due(real, whole, active, now, perf, limits, batch, evicted, counts, knobs[0], knobs[1])
    held = changed = 0
    for slot in active:
        held += whole[HELD, slot]
        changed += whole[VERDICT, slot] != whole[TOLD, slot]
    books[HELD_BLOCKS] = held
    books[SHARED_BLOCKS] = int(limits[SHARED])
    books[PREEMPTED_TOTAL] += counts[EVICTED]
    counts[CHANGED] = changed
    return predicted
