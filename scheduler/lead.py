"""Decodes that are ahead of what they owe: their next tokens may wait while prompts are in need.

A token is due by its stage's pace, and so early that the mean of its block of ten keeps it. What a decode has beyond
that is its lead. In quiet times decodes run in every iteration and gain lead; under a burst it buys prefill.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from .jit import compiled
from .table import BLOCK_AT, BLOCK_GAPS, COMPUTED, DUE, TPOT

AHEAD: Final = 3.0  # paces that a decode keeps of its lead


@compiled
def due_of(real: Any, whole: Any, slot: int, blocks: bool) -> float:
    """When the next token of a decode is due, absolute seconds; with `blocks` no later than its block's mean allows."""
    due = float(real[DUE, slot])
    if blocks:
        due = min(due, real[BLOCK_AT, slot] + (whole[BLOCK_GAPS, slot] + 1.0) * real[TPOT, slot])
    return due


@compiled
def in_need(real: Any, whole: Any, decodes: Any, now: float, pace: float) -> Any:
    """The decodes that may not wait for an iteration of at most `pace` times their TPOT."""
    chosen = np.empty_like(decodes)
    count = 0
    for slot in decodes:
        if due_of(real, whole, slot, True) < now + AHEAD * pace * real[TPOT, slot]:
            chosen[count] = slot
            count += 1
    return chosen[:count]


@compiled
def load_until(real: Any, whole: Any, decodes: Any, now: float, seconds: float, pace: float) -> tuple[float, float]:
    """How many of the decodes run in the mean iteration of the next `seconds`, when all leads are spent first, and
    the sum of their contexts."""
    rows = context = 0.0
    for slot in decodes:
        lead = due_of(real, whole, slot, True) - now - AHEAD * pace * real[TPOT, slot]
        share = 1.0 - min(max(lead, 0.0) / max(seconds, 1e-3), 1.0)
        rows += share
        context += share * whole[COMPUTED, slot]
    return rows, context
