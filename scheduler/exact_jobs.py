"""The requests of an admission problem as arrays: classes of identical ones, and the streams that serve them.

Part of `exact`, which says what the problem is.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from .jit import compiled

ROUNDING: Final = 1e-6  # of a token: room for 99.9999995 tokens is room for 100
TOLERANCE: Final = 1e-9  # of tokens, seconds and values: absorbs the rounding of sums

# Columns of `jobs`: one row per class of identical requests, by deadline.
DUE: Final = 0  # seconds from now until the prompt must be done
PROMPT: Final = 1  # tokens
BLOCKS: Final = 2
VALUE: Final = 3
COPIES: Final = 4
TIER: Final = 5
FORCED: Final = 6  # 1 for running requests, which are kept
JOB_COLUMNS: Final = 7

# Columns of `streams`: what the construction serves.
ANCHOR: Final = 0  # token j is due at ANCHOR + j * tpot
LEFT: Final = 1  # prompt tokens to go
KIND: Final = 2  # tier
MANY: Final = 3  # identical streams in step
GOT: Final = 4  # output tokens so far (expected, when speculating)
MARK: Final = 5  # slack that a repetition of the last batches needs, seconds
STREAM_COLUMNS: Final = 6

# What a search reports.
BEST: Final = 0  # the value of the best set
DROPPED: Final = 1  # the highest bound among states that were dropped for want of room
MADE: Final = 2  # states
VISITS: Final = 3  # streams visited by the construction
LENGTH: Final = 4  # the longest item of the construction's last success
NEAR: Final = 5  # the same, when the pass began
OUTCOMES: Final = 6


@compiled
def _before(table: Any, i: int, j: int) -> bool:
    """The order of classes: by due time, and identical requests together."""
    for k in range(table.shape[0]):
        if table[k, i] != table[k, j]:
            return bool(table[k, i] < table[k, j])
    return False


@compiled
def classified(requests: Any, now: float, free: float, level: int) -> Any:
    """Requests as (jobs, base, fixed, rows, first): identical ones merged, by due time.

    base [`level` tiers] counts the decodes that are in step, fixed [STREAM_COLUMNS, n] has the streams of all
    running requests, and class g consists of the requests `rows[first[g] : first[g + 1]]`.
    """
    deadlines, prompts, blocks, tiers, values, running = requests
    table = np.empty((JOB_COLUMNS, deadlines.size))
    rows = np.empty(deadlines.size, np.int64)
    base = np.zeros(level, np.int64)
    size = 0
    wanted = 0.0
    for i in range(deadlines.size):
        due = max(deadlines[i] - now, 0.0)
        if running[i] and prompts[i] == 0 and due == 0.0:
            base[tiers[i]] += 1
        elif running[i] or (values[i] > 0.0 and blocks[i] <= free):
            table[DUE, size] = due
            table[PROMPT, size] = prompts[i]
            table[BLOCKS, size] = 0.0 if running[i] else blocks[i]
            table[VALUE, size] = 0.0 if running[i] else values[i]
            table[COPIES, size] = 1.0
            table[TIER, size] = tiers[i]
            table[FORCED, size] = 1.0 if running[i] else 0.0
            wanted += table[BLOCKS, size]
            rows[size] = i
            size += 1
    if wanted <= free:
        table[BLOCKS, :size] = 0.0
    order = np.argsort(table[DUE, :size], kind="mergesort")
    for i in range(1, size):
        item = order[i]
        at = i
        while at > 0 and _before(table, item, order[at - 1]):
            order[at] = order[at - 1]
            at -= 1
        order[at] = item
    first = np.zeros(size + 1, np.int64)
    classes = 0
    for i in range(size):
        if i == 0 or _before(table, order[i - 1], order[i]):
            first[classes] = i
            classes += 1
    first[classes] = size
    jobs = table[:, order[first[:classes]]].copy()
    jobs[COPIES] = first[1 : classes + 1] - first[:classes]
    return jobs, base, _fixed(jobs, base), rows[order], first[: classes + 1]


@compiled
def _fixed(jobs: Any, base: Any) -> Any:
    """The streams of the running requests: one per tier of decodes in step, one per forced class."""
    streams = np.zeros((STREAM_COLUMNS, base.size + jobs.shape[1]))
    size = 0
    for tier in range(base.size):
        if base[tier] > 0:
            streams[KIND, size] = tier
            streams[MANY, size] = base[tier]
            size += 1
    for g in range(jobs.shape[1]):
        if jobs[FORCED, g] > 0.0:
            streams[ANCHOR, size] = jobs[DUE, g]
            streams[LEFT, size] = jobs[PROMPT, g] * jobs[COPIES, g]
            streams[KIND, size] = jobs[TIER, g]
            streams[MANY, size] = jobs[COPIES, g]
            size += 1
    return streams[:, :size].copy()
