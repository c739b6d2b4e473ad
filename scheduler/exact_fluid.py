"""The fluid bound of `exact`: prompt tokens that batches leave beside decodes that keep their pace."""

from __future__ import annotations

from typing import Any

import numpy as np

from .exact_jobs import DUE, TIER, TOLERANCE
from .jit import compiled
from .timemodel import batch_seconds, tokens_within


@compiled
def fluid_options(perf: Any, most: float, gain: Any, paces: Any) -> Any:
    """Every way to speculate beside any decodes: (lengths, load, speed).

    In option (i, v) tier i is the bottleneck with items of length v, and every other tier takes the shortest
    item that keeps its pace at that batch time. lengths [tiers, v, tiers] are those items (0: none is long
    enough), load [tiers, v, tiers] the tokens per second that one stream of a tier then costs, and speed
    [tiers, v, draft steps] the tokens per second of such batches.
    """
    tiers, longest = paces.size, gain.size - 1
    lengths = np.zeros((tiers, longest + 1, tiers), np.int64)
    load = np.zeros((tiers, longest + 1, tiers))
    speed = np.zeros((tiers, longest + 1, longest + 1))
    for i in range(tiers):
        for v in range(1, longest + 1):
            period = paces[i] * gain[v]
            for tier in range(tiers):
                u = 1
                while u <= longest and paces[tier] * gain[u] < period - 1e-12:
                    u += 1
                if u <= longest:
                    lengths[i, v, tier] = u
                    load[i, v, tier] = u / (paces[tier] * gain[u])
            for u in range(1, longest + 1):
                steps = float(u) if u > 1 else 0.0
                span = min(period, batch_seconds(perf, most, 0.0, 0.0, steps))
                speed[i, v, u] = min(most, tokens_within(perf, span, 0.0, 0.0, steps)) / span
    return lengths, load, speed


@compiled
def fluid_rate(options: Any, counts: Any) -> float:
    """Most prefill tokens per second beside `counts` [tiers] decodes; negative when those cannot be kept up."""
    lengths, load, speed = options
    best = -1.0
    for i in range(counts.size):
        if counts[i] == 0:
            continue
        for v in range(1, speed.shape[1]):
            decodes = 0.0
            drafted = 1
            for tier in range(counts.size):
                if counts[tier] > 0:
                    decodes += counts[tier] * load[i, v, tier]
                    drafted = max(drafted, lengths[i, v, tier]) if lengths[i, v, tier] > 0 else speed.shape[1]
                if drafted == speed.shape[1]:
                    break
            if drafted < speed.shape[1]:
                rate = speed[i, v, drafted] - decodes
                if rate >= -1e-6:
                    best = max(best, rate, 0.0)
    return best


@compiled
def idle_tokens(model: Any, seconds: float) -> float:
    """Prefill tokens within `seconds` while nobody decodes: full batches, then one that fills the rest."""
    perf, most, _, _ = model
    full = batch_seconds(perf, most, 0.0, 0.0, 0.0)
    whole = np.floor(seconds / full + TOLERANCE)
    rest = tokens_within(perf, max(seconds - whole * full, 0.0), 0.0, 0.0, 0.0)
    return float(whole * most + min(max(rest, 0.0), most))


@compiled
def supplied(model: Any, options: Any, jobs: Any, base: Any, taken: Any) -> Any:
    """Prefill tokens there can be by each class's due time, [classes], beside the decodes of `taken`.

    With it comes the rate afterwards, negative when the decodes cannot be kept up.
    """
    supply = np.empty(jobs.shape[1])
    counts = base.copy()
    idle = counts.sum() == 0
    rate = 0.0 if idle else fluid_rate(options, counts)
    total = at = 0.0
    for g in range(jobs.shape[1]):
        total = idle_tokens(model, jobs[DUE, g]) if idle else total + max(rate, 0.0) * (jobs[DUE, g] - at)
        at = jobs[DUE, g]
        supply[g] = total
        if taken[g] > 0:
            counts[int(jobs[TIER, g])] += taken[g]
            rate = fluid_rate(options, counts)
            idle = False
    return supply, rate
