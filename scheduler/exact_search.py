"""The search of `exact`: states of accepted counts, memory and left-over tokens; and a greedy filling."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from .exact_fluid import fluid_rate, idle_tokens
from .exact_jobs import (
    BEST,
    BLOCKS,
    COPIES,
    DROPPED,
    DUE,
    FORCED,
    LENGTH,
    MADE,
    NEAR,
    PROMPT,
    TIER,
    TOLERANCE,
    VALUE,
    VISITS,
)
from .exact_prices import best_worth
from .exact_schedule import constructed
from .jit import compiled

MADE_MOST: Final = 50_000  # states made in one pass

# Columns of a state; the accepted and running decodes of each tier follow from COUNTS on.
WORTH: Final = 0
ROOM: Final = 1  # prefill tokens to spare at the due time of the last class
SPENT: Final = 2  # blocks
RATE: Final = 3  # prefill tokens per second from here on; negative while nobody decodes
BOUND: Final = 4
USED: Final = 5  # prompt tokens of all classes taken
NODE: Final = 6  # the last class taken, a column of `nodes`
COUNTS: Final = 7
BUCKETS: Final = 128

# Rows of `nodes`: the trail of what was taken.
PARENT: Final = 0
CLASS: Final = 1
TAKEN: Final = 2


@compiled
def _trace(nodes: Any, node: int, taken: Any) -> None:
    """The copies of each class taken on the way to `node`."""
    taken[:] = 0
    while node >= 0:
        taken[nodes[CLASS, node]] = nodes[TAKEN, node]
        node = nodes[PARENT, node]


@compiled
def _hidden(states: Any, chain: Any, head: int, row: int, capped: bool) -> bool:
    """Whether a state of the bucket dominates `row`; one that `row` dominates gets the bound -inf.

    The tokens used count only where they are `capped`; otherwise what matters of them is in ROOM.
    """
    at = head
    while at >= 0:
        same = True
        for k in range(COUNTS, states.shape[1]):
            same = same and states[at, k] == states[row, k]
        if same:
            worth = states[at, WORTH] - states[row, WORTH]
            room = states[at, ROOM] - states[row, ROOM]
            spent = states[at, SPENT] - states[row, SPENT]
            used = states[at, USED] - states[row, USED] if capped else 0.0
            if worth >= 0.0 and room >= 0.0 and spent <= 0.0 and used <= 0.0:
                return True
            if worth <= 0.0 and room <= 0.0 and spent >= 0.0 and used >= 0.0:
                states[at, BOUND] = -np.inf
        at = chain[at]
    return False


@compiled
def _bucket(state: Any) -> int:
    key = 0
    for k in range(COUNTS, state.size):
        key = (key * 31 + int(state[k])) % 1000003
    return key % BUCKETS


@compiled
def _survivors(states: Any, size: int, width: int, ranked: bool, outcome: Any) -> Any:
    """The states that are not dominated and may still be best; those of highest bound when more than `width`."""
    alive = np.flatnonzero(states[:size, BOUND] > outcome[BEST] + TOLERANCE)
    if ranked or alive.size > width:
        alive = alive[np.argsort(-states[alive, BOUND], kind="mergesort")]
    if alive.size > width:
        outcome[DROPPED] = max(outcome[DROPPED], states[alive[width], BOUND])
    return states[alive[:width]]


@compiled
def _root(options: Any, base: Any, terms: Any, free: float, unit: float) -> Any:
    """The one state before the first class, [1, columns]."""
    states = np.zeros((1, COUNTS + base.size))
    states[0, COUNTS:] = base
    states[0, NODE] = -1.0
    states[0, RATE] = fluid_rate(options, base) if base.sum() > 0 else -1.0
    states[0, BOUND] = best_worth(terms, 0, 0.0, 0.0, states[0, RATE], 0.0, free, unit)
    return states


@compiled
def _child(options: Any, space: Any, prices: Any, g: int, copies: int, parent: Any, child: Any, best: float) -> bool:
    """Make the state after taking `copies` of class `g`; False when it is outside the bounds or not above `best`.

    The bound is tried with too high a rate first (each decode costs at least a token per tpot), because the
    true one takes long.
    """
    jobs, _, _, free, paces = space
    terms, caps, unit = prices
    tier = int(jobs[TIER, g])
    worth = parent[WORTH] + copies * jobs[VALUE, g]
    room = parent[ROOM] - copies * jobs[PROMPT, g]
    used = parent[USED] + copies * jobs[PROMPT, g]
    spent = parent[SPENT] + copies * jobs[BLOCKS, g]
    rate = parent[RATE]
    if room < -TOLERANCE or spent > free or used > caps[g]:
        return False
    if copies > 0 and rate >= 0.0:
        rate = max(rate - copies / paces[tier], 0.0)
    bound = best_worth(terms, g + 1, worth, room, rate, used, free - spent, unit)
    if bound <= best + TOLERANCE:
        return False
    for k in range(COUNTS, child.size):
        child[k] = parent[k]
    if copies > 0:
        child[COUNTS + tier] += copies
        rate = fluid_rate(options, child[COUNTS:])
        bound = best_worth(terms, g + 1, worth, room, rate, used, free - spent, unit)
        if rate < 0.0 or bound <= best + TOLERANCE:
            return False
    child[WORTH] = worth
    child[ROOM] = room
    child[SPENT] = spent
    child[RATE] = rate
    child[BOUND] = bound
    child[USED] = used
    child[NODE] = parent[NODE]
    return True


@compiled
def _last_forced(jobs: Any) -> int:
    """The class up to which running requests are still to come; a state beyond it is a whole set."""
    last = 0
    for g in range(jobs.shape[1]):
        if jobs[FORCED, g] > 0.0:
            last = g
    return last


@compiled
def _expanded(
    model: Any,
    options: Any,
    space: Any,
    prices: Any,
    g: int,
    states: Any,
    after: Any,
    nodes: Any,
    made: int,
    limit: float,
    best: Any,
    outcome: Any,
) -> Any:
    """Fill `after` with what class `g` makes of `states`; returns how many and the nodes made so far.

    A `limit` >= 0 asks for the construction of every set, up to so many visits in all.
    """
    jobs, _, fixed, _, _ = space
    heads = np.full(BUCKETS, -1)
    chain = np.empty(after.shape[0], np.int64)
    taken = np.empty(jobs.shape[1], np.int64)
    span = jobs[DUE, g] - (jobs[DUE, g - 1] if g > 0 else 0.0)
    least = int(jobs[COPIES, g] * jobs[FORCED, g])
    prove = limit >= 0.0 and least == 0
    whole = g >= _last_forced(jobs)
    new = 0
    for parent in states:
        parent[ROOM] = idle_tokens(model, jobs[DUE, g]) if parent[RATE] < 0.0 else parent[ROOM] + parent[RATE] * span
        for copies in range(int(jobs[COPIES, g]), least - 1, -1):
            if new == after.shape[0] or made == MADE_MOST:
                outcome[DROPPED] = max(outcome[DROPPED], parent[BOUND])
                break
            child = after[new]
            if not _child(options, space, prices, g, copies, parent, child, outcome[BEST]):
                continue
            bucket = _bucket(child)
            if _hidden(after, chain, heads[bucket], new, limit >= 0.0):
                continue
            if copies > 0:
                if prove and outcome[VISITS] > limit:
                    outcome[DROPPED] = max(outcome[DROPPED], child[BOUND])
                    continue
                nodes[PARENT, made] = int(parent[NODE])
                nodes[CLASS, made] = g
                nodes[TAKEN, made] = copies
                child[NODE] = made
                made += 1
                better = whole and child[WORTH] > outcome[BEST]
                if prove or better:
                    _trace(nodes, made - 1, taken)
                if prove and not constructed(model, jobs, fixed, taken, outcome[NEAR], outcome):
                    continue
                if better:
                    outcome[BEST] = child[WORTH]
                    best[:] = taken
            chain[new] = heads[bucket]
            heads[bucket] = new
            new += 1
    return new, made


@compiled
def search(
    model: Any, options: Any, space: Any, prices: Any, width: int, visits: float, best: Any, outcome: Any
) -> None:
    """One pass through the classes for a set worth more than `outcome[BEST]`; leaves it in `best` [classes].

    `space` is (jobs, base, fixed, free, tpots), `prices` (terms, caps, unit). At most `width` states outlive a class.
    With `visits` > 0 every set must pass the construction, and each class gets its share of so many visits.
    """
    jobs, base, _, free, _ = space
    terms, _, unit = prices
    states = _root(options, base, terms, free, unit)
    after = np.empty((4 * width, states.shape[1]))
    nodes = np.empty((3, MADE_MOST), np.int64)
    last = outcome[VISITS] + visits
    outcome[NEAR] = outcome[LENGTH]
    made = 0
    for g in range(jobs.shape[1]):
        limit = -1.0
        if visits > 0.0:
            limit = outcome[VISITS] + max(last - outcome[VISITS], 0.0) / (jobs.shape[1] - g)
        size, made = _expanded(model, options, space, prices, g, states, after, nodes, made, limit, best, outcome)
        states = _survivors(after, size, width, visits > 0.0, outcome)
    outcome[MADE] += made


@compiled
def fill(model: Any, jobs: Any, fixed: Any, free: float, visits: float, best: Any, outcome: Any) -> None:
    """Make `best` [classes] a set that the construction serves, and try to add what it lacks.

    Moore-Hodgson on the real schedule: in order of deadlines, whenever the taken ones cannot be served, the
    one that is worth least per token is set back; then the others are offered a place, those worth most per
    token first, until `visits` are spent.
    """
    order = np.argsort(jobs[VALUE] / np.maximum(jobs[PROMPT], 1.0), kind="mergesort")
    wanted = best.copy()
    for g in range(best.size):
        if jobs[FORCED, g] == 0.0:
            best[g] = 0
    spent = 0.0
    for g in range(best.size):
        for _ in range(0 if jobs[FORCED, g] > 0.0 else wanted[g]):
            best[g] += 1
            spent += jobs[BLOCKS, g]
            while not constructed(model, jobs, fixed, best, 0.0, outcome):
                for other in order:
                    if best[other] > 0 and jobs[FORCED, other] == 0.0:
                        best[other] -= 1
                        spent -= jobs[BLOCKS, other]
                        break
    for g in order[::-1]:
        while jobs[FORCED, g] == 0.0 and best[g] < jobs[COPIES, g] and spent + jobs[BLOCKS, g] <= free:
            if outcome[VISITS] > visits:
                return
            best[g] += 1
            if not constructed(model, jobs, fixed, best, 0.0, outcome):
                best[g] -= 1
                break
            spent += jobs[BLOCKS, g]
