"""Decodes that are ahead of what they owe: their next tokens may wait while prompts are in need.

A token is due by its stage's pace. What a decode has beyond that is its lead: in quiet times decodes run in every
iteration and gain lead, under a burst it buys prefill. Only so much of it is spent that the mean of every block of ten
tokens keeps the pace. Where `PlannerConfig.lead` allows it, the rest is spent, too, for somebody who could not be
promised otherwise, and then no pause is longer than ten paces.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from .jit import compiled
from .table import BLOCK_AT, BLOCK_GAPS, COMPUTED, DUE, SERVED, TPOT

# How far a lead is spent; the names are what `PlannerConfig.lead` is given.
SPENT: Final = ("unspent", "blocks", "whole")
UNSPENT: Final = 0.0  # not at all
IN_BLOCKS: Final = 1.0  # as far as the mean of a block allows
WHOLE: Final = 2.0  # as far as due times allow, where somebody could not be promised otherwise

AHEAD: Final = 3.0  # paces that a decode keeps of its lead
PAUSE: Final = 10.0  # paces that a decode waits at most


@compiled
def due_of(real: Any, whole: Any, slot: int, blocks: bool) -> float:
    """When the next token of a decode is due, absolute seconds; with `blocks` no later than its block's mean allows."""
    due = float(real[DUE, slot])
    if blocks:
        due = min(due, real[BLOCK_AT, slot] + (whole[BLOCK_GAPS, slot] + 1.0) * real[TPOT, slot])
    return due


@compiled
def needed_at(real: Any, whole: Any, slot: int, blocks: bool) -> float:
    """When the next token of a decode may come at the latest, absolute seconds.

    With `blocks` the mean of its block is kept; without, only its due time is, but no pause is longer than a block.
    """
    if blocks:
        return due_of(real, whole, slot, True)
    return float(min(real[DUE, slot], real[SERVED, slot] + PAUSE * real[TPOT, slot]))


@compiled
def in_need(real: Any, whole: Any, decodes: Any, now: float, pace: float, blocks: bool) -> Any:
    """The decodes that may not wait for an iteration of at most `pace` times their TPOT."""
    chosen = np.empty_like(decodes)
    count = 0
    for slot in decodes:
        if needed_at(real, whole, slot, blocks) < now + AHEAD * pace * real[TPOT, slot]:
            chosen[count] = slot
            count += 1
    return chosen[:count]


@compiled
def load_until(
    real: Any, whole: Any, decodes: Any, now: float, seconds: float, pace: float, blocks: bool
) -> tuple[float, float]:
    """How many of the decodes run in the mean iteration of the next `seconds`, when all leads are spent first, and
    the sum of their contexts."""
    rows = context = 0.0
    for slot in decodes:
        lead = needed_at(real, whole, slot, blocks) - now - AHEAD * pace * real[TPOT, slot]
        share = 1.0 - min(max(lead, 0.0) / max(seconds, 1e-3), 1.0)
        rows += share
        context += share * whole[COMPUTED, slot]
    return rows, context
