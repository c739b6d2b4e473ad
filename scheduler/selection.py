"""Which requests to take: dynamic programming over accepted counts, memory and left-over prefill budget.

Algorithm 1 of SLOs-Serve (arXiv 2504.08784): in order of prefill deadlines, a state is the accepted count of
each TPOT tier, the KV memory used and the prefill tokens left over at the last deadline; its worth is the
summed value. A state that has the same counts and no less of anything dominates. The budget between two
deadlines is what the best batches leave beside the decodes of the state (`prefill_speed`). At most `FREE`
requests are free to choose from and a bounded number of states is kept, so the time is bounded too.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from .admission import Verdict, admit
from .drafting import TIERS, tier_drafts, tier_of, tiers_of
from .jit import compiled
from .table import COMPUTED, DUE, KNOWN, LENGTH, TPOT, WEIGHT
from .timemodel import MARGIN, batch_seconds, tokens_within

_ADMITTED: Final = int(Verdict.ADMITTED)
_CAPACITY: Final = int(Verdict.CAPACITY)
_MEMORY: Final = int(Verdict.MEMORY)

FREE: Final = 60  # requests to choose from
LIVE_STATES: Final = 32  # kept a step where a plan is made at every iteration


@compiled
def prefill_speed(perf: Any, tpots: Any, numbers: Any, accept: float, context: float, most: int, cap: float) -> float:
    """PB* for one second: prefill tokens beside decodes that keep their pace; negative: they cannot.

    `numbers[l]` decodes in tier l.
    """
    margin = 1.0 + perf[MARGIN]
    total = 0
    for number in numbers:
        total += number
    if total == 0:
        return float(max(tokens_within(perf, cap / margin, 0.0, 0.0, 0.0), 0.0) / cap)
    drafts = np.zeros(numbers.size, np.int64)
    period, room = tier_drafts(perf, tpots, numbers, accept, context, most, cap, drafts)
    if room <= 0.0 and batch_seconds(perf, float(total), context, 0.0, 0.0) * margin > period:
        return -1.0
    return float(room / period)


@compiled
def equal(left: Any, right: Any) -> bool:
    same = True
    for i in range(left.size):
        same = same and left[i] == right[i]
    return same


@compiled
def choose(
    real: Any, whole: Any, order: Any, free: Any, decodes: Any, now: float, perf: Any, block_tokens: float, most: int,
    context: float, accept: float, room: float, cap: float, states: int, taken: Any,
) -> None:  # fmt: skip
    """Which of `order` (by deadline) to take, in `taken`: those that are not `free` in any case, at most `FREE` free.

    `decodes` run already, `context` is their summed context; `room` the KV blocks there are, `most` the longest
    draft, `accept` the share of guesses accepted, `cap` the longest iteration. Keeps `states` states a step.
    """
    tpots = np.full(TIERS, np.inf)
    num_tiers = max(tiers_of(real, np.concatenate((decodes, order)), tpots), 1)
    counts = np.zeros((states, num_tiers), np.int64)
    memory, left, value, speed = np.zeros(states), np.zeros(states), np.zeros(states), np.zeros(states)
    chosen = np.zeros(states, np.int64)
    for slot in decodes:
        counts[0, tier_of(tpots, num_tiers, real[TPOT, slot])] += 1
    speed[0] = prefill_speed(perf, tpots, counts[0], accept, context, most, cap)
    grown, numbers = np.empty((2 * states, num_tiers), np.int64), np.empty((2 * states, 4))
    masks = np.empty(2 * states, np.int64)
    size, at, number = 1, now, 0
    for item in range(order.size):
        slot = order[item]
        due = max(real[DUE, slot], now)
        tokens = float(whole[KNOWN, slot] - whole[COMPUTED, slot])
        blocks = np.ceil(real[LENGTH, slot] / block_tokens)
        tier = tier_of(tpots, num_tiers, real[TPOT, slot])
        made = 0
        for i in range(size):
            after = left[i] + max(speed[i], 0.0) * (due - at)
            if free[item]:
                grown[made], masks[made] = counts[i], chosen[i]
                numbers[made, 0], numbers[made, 1], numbers[made, 2] = memory[i], after, value[i]
                numbers[made, 3] = speed[i]
                made += 1
            fits = speed[i] >= 0.0 and after >= tokens and memory[i] + blocks <= room
            if fits or not free[item]:
                grown[made], masks[made] = counts[i], chosen[i]
                grown[made, tier] += 1
                numbers[made, 0], numbers[made, 1] = memory[i] + blocks, max(after - tokens, 0.0)
                numbers[made, 2] = value[i]
                numbers[made, 3] = prefill_speed(perf, tpots, grown[made], accept, context, most, cap)
                if free[item]:
                    numbers[made, 2] += real[WEIGHT, slot]
                    masks[made] |= 1 << number
                    if numbers[made, 3] < 0.0:
                        continue  # the decodes alone would not keep their pace
                made += 1
        number += free[item]
        at = due
        size = 0
        for i in np.argsort(-numbers[:made, 2], kind="mergesort"):
            dominated = False
            for j in range(size):
                if memory[j] <= numbers[i, 0] and left[j] >= numbers[i, 1] and equal(counts[j], grown[i]):
                    dominated = True
                    break
            if not dominated and size < states:
                counts[size], chosen[size] = grown[i], masks[i]
                memory[size], left[size], value[size] = numbers[i, 0], numbers[i, 1], numbers[i, 2]
                speed[size] = numbers[i, 3]
                size += 1
    number = 0
    for item in range(order.size):
        taken[item] = True
        if free[item]:
            taken[item] = (chosen[0] >> number) & 1
            number += 1


@compiled
def value_of(real: Any, slots: Any) -> float:
    total = 0.0
    for slot in slots:
        total += real[WEIGHT, slot]
    return total


@compiled
def refine(
    real: Any, whole: Any, order: Any, accepted: Any, count: int, verdict: Any, decodes: Any, perf: Any, now: float,
    cap: float, context: float, beside: float, beside_context: float, tightest: float, slack: float, room: float,
    block_tokens: int,
) -> int:  # fmt: skip
    """Look for a more valuable set than the `count` in `accepted`, where setting back the largest may be wrong.

    That is where values differ or memory binds, and somebody was set back. The set found is put before `admit`
    again, so what is accepted passes the same test of time as ever. Returns how many are in `accepted`.
    """
    hard = binding = False
    for i in range(order.size):
        hard = hard or verdict[i] == _CAPACITY or verdict[i] == _MEMORY
        binding = binding or verdict[i] == _MEMORY or real[WEIGHT, order[i]] != real[WEIGHT, order[0]]
    if not (hard and binding) or order.size > FREE:
        return count
    taken, free = np.zeros(order.size, np.bool_), np.ones(order.size, np.bool_)
    choose(real, whole, order, free, decodes, now, perf, block_tokens, 0, context, 0.0, room, cap, LIVE_STATES, taken)
    some = order[taken]
    others, found = np.empty(some.size + 1, np.int64), np.zeros(some.size, np.int64)
    number = admit(
        real, whole, some, others, found, perf, now, cap, float(decodes.size), context, beside, beside_context,
        tightest, slack, room, block_tokens, False,
    )  # fmt: skip
    if value_of(real, others[:number]) <= value_of(real, accepted[:count]) + 1e-9:
        return count
    at = 0
    for i in range(order.size):
        if taken[i]:
            verdict[i] = found[at]
            at += 1
        elif verdict[i] == _ADMITTED:
            verdict[i] = _CAPACITY
    accepted[:number] = others[:number]
    return number
