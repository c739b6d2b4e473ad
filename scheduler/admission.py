"""Who can be promised an SLO: earliest deadlines first, setting back what costs most (Moore-Hodgson).

A request without a first token is provisional. At every step all of them are considered again in order
of deadline; when one cannot be in time, the request whose removal frees most time per value is set back
(Moore 1968, Hodgson: the largest job of the first late prefix, optimal for equal values) and runs best
effort until it fits again. The time a set needs follows the batches that would run: iterations as long as
the tightest resident TPOT allows, each first carrying a token of every decode, the rest prefill.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Final

import numpy as np

from .jit import compiled
from .table import COMPUTED, DUE, HELD, KNOWN, LENGTH, TPOT, VERDICT, WEIGHT
from .timemodel import AREA, MARGIN, SCALE, batch_seconds, tokens_within


class Verdict(IntEnum):
    """Why a request is admitted or not; the text is what a receipt shows."""

    UNDECIDED = 0
    ADMITTED = 1
    LATE = 2
    CAPACITY = 3
    MEMORY = 4
    PACE = 5
    MISSED = 6
    RELEGATED = 7
    BEST_EFFORT = 8


REASONS: Final[dict[Verdict, str]] = {
    Verdict.UNDECIDED: "not planned yet",
    Verdict.ADMITTED: "admitted: every deadline fits",
    Verdict.LATE: "best effort: the first token cannot be in time even alone",
    Verdict.CAPACITY: "best effort: other deadlines fill the time",
    Verdict.MEMORY: "best effort: the predicted KV peak does not fit",
    Verdict.PACE: "best effort: one more decode would break the tightest TPOT",
    Verdict.MISSED: "best effort: the first token came after its deadline",
    Verdict.RELEGATED: "best effort: KV memory ran out and this request held most",
    Verdict.BEST_EFFORT: "best effort: asked for",
}

# The compiled loops know plain integers.
_ADMITTED: Final = int(Verdict.ADMITTED)
_LATE: Final = int(Verdict.LATE)
_CAPACITY: Final = int(Verdict.CAPACITY)
_MEMORY: Final = int(Verdict.MEMORY)
_PACE: Final = int(Verdict.PACE)


@compiled
def finish_after(
    perf: Any, period: float, first: float, decodes: float, context: float, tokens: float, area: float
) -> float:
    """Seconds until `tokens` of prefill (with attention `area`) are done beside `decodes` decodes.

    An iteration of `first` seconds where a prompt must be done so soon, whole ones of `period`, then the one
    that carries the rest. Infinite when the decodes alone fill the period. Times are inflated by the planning
    margin.
    """
    slack = 1.0 + perf[MARGIN]
    per_iteration = tokens_within(perf, period / slack, context, 0.0, 0.0) - decodes
    if per_iteration < 1.0:
        return np.inf
    begun = 0.0
    if first < period:
        opening = tokens_within(perf, first / slack, context, 0.0, 0.0) - decodes
        if 1.0 <= opening < tokens:
            tokens -= opening
            begun = first
    whole = np.ceil(tokens / per_iteration) - 1.0
    whole = max(whole, 0.0)
    rest = tokens - whole * per_iteration
    extra = perf[SCALE] * perf[AREA] * area * slack
    return float(begun + whole * period + batch_seconds(perf, rest + decodes, context, 0.0, 0.0) * slack + extra)


@compiled
def admit(
    real: Any,
    whole: Any,
    order: Any,
    accepted: Any,
    verdict: Any,
    perf: Any,
    now: float,
    cap: float,
    decodes: float,
    context: float,
    beside: float,
    beside_context: float,
    tightest: float,
    slack: float,
    room: float,
    block_tokens: int,
    settle: bool,
) -> int:
    """Choose among the provisional slots `order` (by deadline); returns how many, in `accepted`.

    `cap` is the longest iteration, `decodes` and `context` the promised decodes and the sum of their
    contexts, `beside` and `beside_context` those of them that the mean iteration carries until the prompts are due,
    `tightest` their tightest TPOT, `slack` the seconds until the first of them is due, `room` the KV blocks not
    spoken for. With `settle` nobody admitted before is set back. `verdict[i]` tells of
    `order[i]`. O(n^2) at worst, O(n) when all fit.
    """
    count = 0
    tokens = area = blocks = grown = 0.0
    margin = 1.0 + perf[MARGIN]
    index = np.empty(order.size, np.int64)
    for i in range(order.size):
        slot = order[i]
        left = float(whole[KNOWN, slot] - whole[COMPUTED, slot])
        due = real[DUE, slot] - now
        own = left * (whole[COMPUTED, slot] + 0.5 * left)
        if batch_seconds(perf, left, 0.0, own, 0.0) > due:
            verdict[i] = _LATE
            continue
        peak = np.ceil(real[LENGTH, slot] / block_tokens)
        if blocks + max(peak, float(whole[HELD, slot])) > room:
            verdict[i] = _MEMORY
            continue
        pace = min(tightest, real[TPOT, slot])
        if batch_seconds(perf, decodes + count + 1.0, context + grown + whole[KNOWN, slot], 0.0, 0.0) * margin > pace:
            verdict[i] = _PACE
            continue
        verdict[i] = _ADMITTED
        accepted[count] = slot
        index[count] = i
        count += 1
        tokens += left
        area += own
        blocks += peak
        grown += whole[KNOWN, slot]
        tightest = pace
        while count > 0:
            period = min(cap, tightest)
            rows, past = beside + 0.5 * (count - 1), beside_context + 0.5 * grown
            first = real[DUE, accepted[0]] - now
            finish = finish_after(perf, period, first, rows, past, tokens, area)
            if finish > due:
                # A batch without the decodes is shorter, when they can wait for it.
                alone = batch_seconds(perf, tokens, 0.0, area, 0.0) * margin
                after = batch_seconds(perf, decodes + count, context + grown, 0.0, 0.0) * margin
                if alone + after <= slack and count == 1:
                    finish = min(finish, alone)
            if finish <= due:
                break
            worst = count - 1
            most = -1.0
            for j in range(count):
                other = accepted[j]
                if settle and whole[VERDICT, other] == _ADMITTED:
                    continue
                cost = (whole[KNOWN, other] - whole[COMPUTED, other]) / max(real[WEIGHT, other], 1e-9)
                if cost >= most:
                    worst = j
                    most = cost
            gone = accepted[worst]
            spared = float(whole[KNOWN, gone] - whole[COMPUTED, gone])
            tokens -= spared
            area -= spared * (whole[COMPUTED, gone] + 0.5 * spared)
            blocks -= np.ceil(real[LENGTH, gone] / block_tokens)
            grown -= whole[KNOWN, gone]
            verdict[index[worst]] = _CAPACITY
            count -= 1
            for j in range(worst, count):
                accepted[j] = accepted[j + 1]
                index[j] = index[j + 1]
            if gone == slot:
                break
    return count


@compiled
def shortest_period(
    real: Any,
    whole: Any,
    accepted: Any,
    count: int,
    perf: Any,
    now: float,
    floor: float,
    cap: float,
    decodes: float,
    context: float,
    reserve: float,
) -> float:
    """The shortest iteration that meets every accepted deadline `reserve` times faster than needed.

    Long iterations carry prefill cheaply but keep new short prompts waiting; the shortest that suffices
    serves both. Tries 12 lengths between `floor` and `cap`.
    """
    if count == 0 or floor >= cap:
        return min(floor, cap)
    ratio = (cap / floor) ** (1.0 / 11.0)
    period = floor
    for _ in range(12):
        tokens = area = 0.0
        fits = True
        for j in range(count):
            slot = accepted[j]
            left = float(whole[KNOWN, slot] - whole[COMPUTED, slot])
            tokens += left
            area += left * (whole[COMPUTED, slot] + 0.5 * left)
            finish = finish_after(perf, period, period, decodes + 0.5 * j, context, tokens, area)
            if finish * reserve > real[DUE, slot] - now:
                fits = False
                break
        if fits:
            return period
        period *= ratio
    return cap
