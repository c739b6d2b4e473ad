"""The construction of `exact`: an earliest-deadline schedule, token by token, that meets every deadline for ever."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from .exact_jobs import (
    ANCHOR,
    DUE,
    FORCED,
    GOT,
    KIND,
    LEFT,
    LENGTH,
    MANY,
    MARK,
    PROMPT,
    ROUNDING,
    STREAM_COLUMNS,
    TIER,
    TOLERANCE,
    VISITS,
)
from .jit import compiled
from .timemodel import batch_seconds, tokens_within

CONSTRUCTION_MOST: Final = 60_000  # stream visits of one construction
SPLITS: Final = 96  # how often the construction may serve only a part of identical streams
SETTLE: Final = 128  # batches after the last prompt within which a schedule must have become periodic


@compiled
def next_due(streams: Any, i: int, paces: Any) -> float:
    """When the stream's prompt, or its next output token, is due; seconds from now."""
    if streams[LEFT, i] > 0.0:
        return float(streams[ANCHOR, i])
    return float(streams[ANCHOR, i] + (np.floor(streams[GOT, i] + TOLERANCE) + 1.0) * paces[int(streams[KIND, i])])


@compiled
def _forever(model: Any, streams: Any, due: Any, size: int, now: float) -> bool:
    """Whether pure decoding, from here on, surely meets every deadline for ever. Any of three proofs will do.

    One batch holds a token of everybody, is no longer than the tightest pace and in time for all: then so is
    the next one. Every stream has at least the slack it had at `MARK`: then the batches since can be repeated
    for ever. Every stream has a pace of slack, and batches as long as the tightest pace have room for each
    stream's share, one token in so many whole batches: unit jobs in equal slots (proportionate fairness).
    """
    perf, most, _, paces = model
    alive = share = 0.0
    slack = tightest = np.inf
    cyclic = ahead = True
    for i in range(size):
        tightest = min(tightest, paces[int(streams[KIND, i])])
    for i in range(size):
        pace = paces[int(streams[KIND, i])]
        alive += streams[MANY, i]
        share += streams[MANY, i] / np.floor(pace / tightest + TOLERANCE)
        slack = min(slack, due[i] - now)
        cyclic = cyclic and due[i] - now >= streams[MARK, i] - TOLERANCE
        ahead = ahead and due[i] - now >= pace - TOLERANCE
    if cyclic or (ahead and share <= np.floor(min(most, tokens_within(perf, tightest, 0.0, 0.0, 0.0)) + ROUNDING)):
        return True
    return alive <= most and batch_seconds(perf, alive, 0.0, 0.0, 0.0) <= min(slack, tightest) + TOLERANCE


@compiled
def _mark(paces: Any, streams: Any, due: Any, size: int, now: float, longest: int) -> None:
    """Note every stream's slack; a repetition needs two tokens more where items yield fractions of a token."""
    for i in range(size):
        streams[MARK, i] = due[i] - now + (2.0 * paces[int(streams[KIND, i])] if longest > 1 else 0.0)


@compiled
def _sort(order: Any, due: Any, size: int) -> None:
    """By due time; insertion, because a batch leaves the order nearly sorted. Stable."""
    for i in range(1, size):
        item = order[i]
        at = i
        while at > 0 and due[order[at - 1]] > due[item]:
            order[at] = order[at - 1]
            at -= 1
        order[at] = item


@compiled
def _draft_length(model: Any, streams: Any, due: Any, order: Any, size: int, now: float, longest: int) -> int:
    """The longest item up to `longest` that leaves room for all that is due when the batch must end.

    A batch that is full before it must end need not hold all of that: another follows in time.
    """
    perf, most, _, _ = model
    end = due[order[0]]
    for v in range(longest, 1, -1):
        must = 0.0
        for k in range(size):
            i = order[k]
            if due[i] > end + TOLERANCE:
                break
            must += streams[LEFT, i] if streams[LEFT, i] > 0.0 else v * streams[MANY, i]
        room = np.floor(tokens_within(perf, end - now, 0.0, 0.0, float(v)) + ROUNDING)
        if room >= min(must, most):
            return v
    return 1


@compiled
def earliest_deadline(model: Any, given: Any, size: int, longest: int) -> int:
    """Serve `given` [STREAM_COLUMNS, n] earliest deadline first, token by token, with items up to `longest`.

    Every batch ends when the earliest unmet deadline does, or when its work is done; each stream decodes at
    most once in it. Returns the stream visits it took, negative when a deadline is missed or no steady
    state is reached.
    """
    perf, most, gain, paces = model
    rows = size + SPLITS
    streams = np.empty((STREAM_COLUMNS, rows))
    streams[:, :size] = given[:, :size]
    streams[MARK] = np.inf
    due = np.empty(rows)
    order = np.arange(rows)
    prompts = 0
    for i in range(size):
        due[i] = next_due(streams, i, paces)
        prompts += streams[LEFT, i] > 0.0
    _sort(order, due, size)
    now = 0.0
    visits = 0
    settling = 0
    while True:
        if prompts == 0:
            if _forever(model, streams, due, size, now):
                return visits + size
            if settling & (settling - 1) == 0:
                _mark(paces, streams, due, size, now, longest)
            settling += 1
        if settling > SETTLE or visits > CONSTRUCTION_MOST:
            return -visits - 1
        v = _draft_length(model, streams, due, order, size, now, longest)
        steps = float(v) if v > 1 else 0.0
        room = min(most, np.floor(tokens_within(perf, due[order[0]] - now, 0.0, 0.0, steps) + ROUNDING))
        if room < 1.0:
            return -visits - 1
        left = room
        drafted = 0.0
        present = size
        for k in range(present):
            if left <= 0.0:
                break
            i = order[k]
            visits += 1
            if streams[LEFT, i] > 0.0:
                done = min(left, streams[LEFT, i])
                streams[LEFT, i] -= done
                left -= done
                prompts -= streams[LEFT, i] == 0.0
            else:
                fit = min(streams[MANY, i], np.floor(left / v))
                if fit <= 0.0:
                    continue
                if fit < streams[MANY, i]:
                    if size == rows:
                        return -visits - 1
                    streams[:, size] = streams[:, i]
                    streams[MANY, size] -= fit
                    streams[MANY, i] = fit
                    due[size] = due[i]
                    order[size] = size
                    size += 1
                streams[GOT, i] += gain[v]
                left -= fit * v
                drafted = steps
            due[i] = next_due(streams, i, paces)
        now += batch_seconds(perf, room - left, 0.0, 0.0, drafted)
        _sort(order, due, size)
        visits += size


@compiled
def constructed(model: Any, jobs: Any, fixed: Any, taken: Any, near: float, outcome: Any) -> bool:
    """Whether an earliest-deadline schedule serves the `fixed` streams and `taken` [classes] copies of `jobs`.

    Tries every longest item, or when `near` > 0 those about as long. Adds its work to `outcome`.
    """
    size = fixed.shape[1]
    streams = np.zeros((STREAM_COLUMNS, size + int(taken.sum())))
    streams[:, :size] = fixed
    for g in range(taken.size):
        for _ in range(0 if jobs[FORCED, g] > 0.0 else taken[g]):
            streams[ANCHOR, size] = jobs[DUE, g]
            streams[LEFT, size] = jobs[PROMPT, g]
            streams[KIND, size] = jobs[TIER, g]
            streams[MANY, size] = 1.0
            size += 1
    if size == 0:
        return True
    for longest in range(model[2].size - 1, 0, -1):
        if near > 0.0 and abs(longest - near) > 1.0:
            continue
        visits = earliest_deadline(model, streams, size, longest)
        outcome[VISITS] += abs(visits)
        if visits > 0:
            outcome[LENGTH] = longest
            return True
    return False
