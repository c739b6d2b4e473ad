"""SLOs-Serve as published (arXiv 2504.08784, algorithms 1 and 2), the policy we set out from.

    admission   once, at arrival: dynamic programming over new requests by prefill deadline; a state is the
                accepted count of each TPOT tier, the memory used and the prefill tokens left over; running
                requests are forced; who is declined runs best effort for good
    batch       as long as the tightest resident TPOT allows; decode tokens when their interval has begun, which is
                counted within their block of ten; prefill by deadline; best effort from what is left
    drafts      one length per tier: for every tier as the bottleneck and every length, the others take the
                shortest that keeps up; the choice with the most prefill tokens per second wins

What the published code is known to get wrong is done right: the best state is kept, expected tokens are not
rounded down, more left-over budget dominates less, equal requests do not multiply states, the time model
has its context term, and memory is charged by the predicted length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from .admission import Verdict
from .batching import (
    BLOCK_TOKENS,
    CONTEXT,
    DECODES,
    LOADS,
    MAX_DRAFT,
    MEMBERS,
    OWED,
    OWN_DRAFT,
    PREFILL_AREA,
    ROWS,
    STEPS,
    TOKENS,
    classify,
    make_room_for_decodes,
    place_line,
    place_promised,
    serving_order,
    write_decodes,
)
from .drafting import TIERS, tier_drafts, tier_of, tiers_of
from .jit import compiled
from .lead import due_of
from .selection import FREE, choose
from .table import ACCEPT, BEST_EFFORT, DUE, KIND, TPOT, VERDICT
from .timemodel import MARGIN, batch_seconds

_UNDECIDED: Final = int(Verdict.UNDECIDED)
_ADMITTED: Final = int(Verdict.ADMITTED)
_CAPACITY: Final = int(Verdict.CAPACITY)

STATES: Final = 256  # of the dynamic program: few requests are new in one step


@dataclass(frozen=True, slots=True)
class Published:
    """`cap`: longest iteration in seconds. `blocks`: a token is due so that the mean of its block of ten is kept, which
    is how the paper scores; off, it is due by the stage's pace alone and may come anywhere in its interval."""

    cap: float = 0.1
    blocks: bool = True


@compiled
def within(free: Any, most: int) -> Any:
    """All but the free ones after the first `most` of those."""
    return ~free | (np.cumsum(free) <= most)


@compiled
def decide_new(
    real: Any, whole: Any, waiting: Any, decodes: Any, now: float, perf: Any, limits: Any, context: float,
    accept: float, room: float, cap: float,
) -> Any:  # fmt: skip
    """Promise or decline for good who is new among `waiting`; returns who is promised, by deadline."""
    order = waiting[np.argsort(real[DUE][waiting], kind="mergesort")]
    free = whole[VERDICT][order] == _UNDECIDED
    here = within(free, FREE)  # the others wait for the next step
    order, free = order[here], free[here]
    if free.sum() > 0:
        taken = np.zeros(order.size, np.bool_)
        choose(
            real, whole, order, free, decodes, now, perf, limits[BLOCK_TOKENS], int(limits[MAX_DRAFT]), context,
            accept, room, cap, STATES, taken,
        )  # fmt: skip
        for i in range(order.size):
            whole[VERDICT, order[i]] = _ADMITTED if taken[i] else _CAPACITY
            if not taken[i]:
                whole[KIND, order[i]] = BEST_EFFORT
    return order[whole[VERDICT][order] == _ADMITTED]


@compiled
def reachable(due: Any, soonest: float) -> float:
    """The earliest of the due times that are not before `soonest`; infinite without one."""
    least = np.inf
    for each in due:
        if each >= soonest:
            least = min(least, each)
    return float(least)


@compiled
def begun(real: Any, decodes: Any, due: Any, now: float, period: float) -> Any:
    """The decodes whose token's interval has begun, or whose token would be late in the next iteration."""
    return decodes[(due - real[TPOT][decodes] <= now) | (due < now + 2.0 * period)]


@compiled
def published(
    real: Any, whole: Any, active: Any, now: float, perf: Any, limits: Any, batch: Any, evicted: Any, counts: Any,
    cap: float, blocks: float,
) -> float:  # fmt: skip
    """One step of the published planner; the arguments are those of `batching.compose`."""
    counts[:] = 0
    n, slots = active.size, whole.shape[1]
    load = np.zeros(LOADS)
    promised, waiting = np.empty(n, np.int64), np.empty(n, np.int64)
    num_promised, num_waiting, _, _, room = classify(real, whole, active, now, perf, limits, promised, waiting, load)
    decodes = promised[:num_promised]
    due = np.empty(num_promised)
    for i in range(num_promised):
        due[i] = due_of(real, whole, decodes[i], blocks > 0.5)
    accept = 0.0
    for slot in active:
        accept += min(real[ACCEPT, slot], 0.999) / n
    tpots = np.full(TIERS, np.inf)
    num_tiers = max(tiers_of(real, np.concatenate((decodes, waiting[:num_waiting])), tpots), 1)
    accepted = decide_new(
        real, whole, waiting[:num_waiting], decodes, now, perf, limits, load[CONTEXT], accept, room, cap
    )
    admitted = np.zeros(slots, np.bool_)
    admitted[accepted] = True

    numbers = np.zeros(num_tiers, np.int64)
    for slot in decodes:
        numbers[tier_of(tpots, num_tiers, real[TPOT, slot])] += 1
    drafts = np.zeros(num_tiers, np.int64)
    period = cap
    if num_promised > 0:
        period, _ = tier_drafts(perf, tpots, numbers, accept, load[CONTEXT], int(limits[MAX_DRAFT]), cap, drafts)
        least = reachable(due, now + batch_seconds(perf, 1.0, 0.0, 0.0, 0.0))
        period = max(min(period, least - now), batch_seconds(perf, load[DECODES], load[CONTEXT], 0.0, 0.0))
    running = begun(real, decodes, due, now, period)
    if running.size == 0 and accepted.size == 0:
        running = decodes

    load[:OWED] = 0.0
    in_batch = np.zeros(slots, np.bool_)
    chosen = np.empty(n, np.int64)
    line, spare = np.empty(n + 1, np.int64), np.empty(n, np.int64)
    size, num_spare, starving = serving_order(real, whole, active, now, accepted, admitted, limits, line, spare)
    make_room_for_decodes(whole, running, accepted, spare[:num_spare], in_batch, limits, evicted, counts)
    place_promised(whole, running, chosen, in_batch, limits, load)
    guesses = np.zeros(slots, np.int64)
    total, each_its_own = 0.0, limits[OWN_DRAFT] > 0.5
    for slot in chosen[: int(load[DECODES])]:
        guesses[slot] = drafts[tier_of(tpots, num_tiers, real[TPOT, slot])] if each_its_own else drafts.min()
        total += guesses[slot]
    seconds = period / (1.0 + perf[MARGIN])
    load[TOKENS] += total  # the guesses' share of the batch is spoken for
    place_line(
        whole, line[:size], accepted, spare[:num_spare], admitted, starving, seconds, seconds, chosen, in_batch,
        perf, limits, load, batch, evicted, counts,
    )  # fmt: skip
    load[TOKENS] -= total
    if load[MEMBERS] == 0:
        make_room_for_decodes(whole, decodes, accepted, spare[:num_spare], in_batch, limits, evicted, counts)
        place_promised(whole, decodes, chosen, in_batch, limits, load)
    longest = write_decodes(whole, chosen[: int(load[DECODES])], guesses, limits, load, batch, counts)
    counts[STEPS] = longest
    if counts[ROWS] == 0:
        return 0.0
    return float(batch_seconds(perf, load[TOKENS], load[CONTEXT], load[PREFILL_AREA], float(longest)))
