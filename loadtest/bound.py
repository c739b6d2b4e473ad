"""What nobody could exceed: two optimistic models of a clairvoyant scheduler, to tell how near a policy comes.

    stationary   No queues, no bursts: the costliest tenth (at a 90 % target) is refused for free, by compute and
                 by memory separately; the rest must fit the GPU's seconds and the KV memory on average, at the
                 mean time between tokens that allows most. An upper bound wherever decodes are always resident,
                 because arrivals, deadlines, granularity and the cost of refusing are all left out.
    trace        The very sessions of the cell, as fluid work on pooled GPUs: earliest deadline first, which is
                 optimal for a set that fits, lengths known, chunks of any size, a round's release as early and
                 its deadlines as late as they can be, decode work due only in a few instalments. Where a set does
                 not fit, the session that frees most is dropped (Moore-Hodgson), online. No KV memory. Optimistic
                 in everything but the dropping, so in practice an upper bound, not a theorem.

The smaller of the two is the bound of a cell. Both without speculation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from slos_serve.scheduler import BatchShape

from .capacity import STEPS_PER_DOUBLING, rate_at, rounds
from .cells import Profile, Turn

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]

INSTALMENTS: Final = 6  # parts in which a round's decode work is due
PERIODS: Final = 24  # mean times between tokens that are tried
GRID: Final = 2  # steps of the rate grid between which the trace's bound is found


def bounds(
    firsts_at: Callable[[float], Sequence[Turn]], profile: Profile, replicas: int, target: float, start: float
) -> Mapping[str, float]:
    """Sessions per second and GPU at which a clairvoyant scheduler attains `target`, by both models.

    `firsts_at` draws the sessions at a rate for all replicas; the search begins at `start` such sessions.
    """
    stationary = stationary_rate(firsts_at(start), profile, target)
    trace = trace_rate(firsts_at, profile, replicas, target, start) / replicas
    return {"stationary": stationary, "trace": trace, "least": min(stationary, trace)}


# No queues


def stationary_rate(firsts: Sequence[Turn], profile: Profile, target: float) -> float:
    """Sessions per second on one GPU, on average, at the best mean time between tokens."""
    slowest = max(_tpots(firsts))
    floor = profile.iteration_seconds
    compute = np.array([sum(_marginal_seconds(turn, profile) for turn in rounds(first)) for first in firsts])
    memory = np.array([sum(_token_contexts(turn) for turn in rounds(first)) for first in firsts])
    busy, held = _cheapest(compute, target), _cheapest(memory, target)
    base = max(piece.base for piece in profile.perf.pieces if piece.per_token == _slope(profile))
    rates = []
    for period in np.geomspace(min(floor, slowest), slowest, PERIODS):
        rates.append(min(max(1.0 - base / period, 0.0) / busy, profile.kv_capacity_tokens / (held * period)))
    return float(max(rates))


def _cheapest(costs: Floats, target: float) -> float:
    """The mean cost per session when only the cheapest `target` share is served."""
    kept = max(1, int(np.ceil(target * costs.size)))
    return float(np.sort(costs)[:kept].sum() / costs.size)


def _tpots(firsts: Sequence[Turn]) -> list[float]:
    return [s.slo.tpot for first in firsts for turn in rounds(first) for s in turn.stages if s.slo]


def _slope(profile: Profile) -> float:
    return max(piece.per_token for piece in profile.perf.pieces)


def _marginal_seconds(turn: Turn, profile: Profile) -> float:
    """GPU seconds of a request in batches so large that their fixed cost is shared; attention included."""
    prompt, output = turn.request.prompt_tokens, turn.output_tokens
    attention = profile.perf.per_area * 0.5 * prompt**2 + profile.perf.per_context * _token_contexts(turn)
    return _slope(profile) * (prompt + output - 1) + attention


def _token_contexts(turn: Turn) -> float:
    """The context summed over the decodes of a request: what it reads, and what it holds per iteration."""
    decodes = turn.output_tokens - 1
    return decodes * (turn.request.prompt_tokens + 0.5 * decodes)


# The very trace


@dataclass(frozen=True, slots=True)
class _Work:
    """What one round of a session has to have done by when: seconds of one GPU, deadlines ascending."""

    release: float
    session: int
    deadlines: Floats
    seconds: Floats


def trace_rate(
    firsts_at: Callable[[float], Sequence[Turn]], profile: Profile, replicas: int, target: float, start: float
) -> float:
    """The highest rate of a coarse grid at which `trace_share` reaches the target, by bisection."""

    def passes(step: int) -> bool:
        return trace_share(firsts_at(rate_at(step)), profile, replicas) >= target

    low = high = round(STEPS_PER_DOUBLING * float(np.log2(start)))
    stride = 8
    if passes(low):
        while passes(high := low + stride):
            low = high
    else:
        while not passes(low := high - stride):
            high = low
            if high < -20 * STEPS_PER_DOUBLING:
                return 0.0
    while high - low > GRID:
        middle = (low + high) // 2
        low, high = (middle, high) if passes(middle) else (low, middle)
    return rate_at(low)


def trace_share(firsts: Sequence[Turn], profile: Profile, replicas: int) -> float:
    """Share of the sessions that fluid earliest-deadline-first serves in time on `replicas` pooled GPUs."""
    return 1.0 - len(trace_dropped(firsts, profile, replicas)) / len(firsts)


def trace_dropped(firsts: Sequence[Turn], profile: Profile, replicas: int) -> set[int]:
    """The sessions, by unit, that fluid earliest-deadline-first drops on `replicas` pooled GPUs."""
    works = sorted((work for first in firsts for work in _works(first, profile)), key=lambda work: work.release)
    dropped: set[int] = set()
    deadlines, left, owners = np.empty(0), np.empty(0), np.empty(0, np.int64)
    now = 0.0
    for work in works:
        if work.session in dropped:
            continue
        deadlines, left, owners = _run(deadlines, left, owners, (work.release - now) * replicas)
        now = work.release
        at = np.searchsorted(deadlines, work.deadlines, side="right")
        deadlines = np.insert(deadlines, at, work.deadlines)
        left = np.insert(left, at, work.seconds)
        owners = np.insert(owners, at, work.session)
        while (late := np.flatnonzero(now + np.cumsum(left) / replicas > deadlines + 1e-9)).size:
            victim = int(np.bincount(owners[: late[0] + 1], left[: late[0] + 1]).argmax())
            dropped.add(victim)
            kept = owners != victim
            deadlines, left, owners = deadlines[kept], left[kept], owners[kept]
    return dropped


def _run(deadlines: Floats, left: Floats, owners: Ints, seconds: float) -> tuple[Floats, Floats, Ints]:
    """What is left after so many GPU seconds, earliest deadline first."""
    done = np.cumsum(left)
    first = int(np.searchsorted(done, seconds, side="right"))
    if first < left.size:
        left = left.copy()
        left[first] = done[first] - seconds
    return deadlines[first:], left[first:], owners[first:]


def _works(first: Turn, profile: Profile) -> list[_Work]:
    """The rounds of a session: released as early as an idle GPU allows, due as late as the promises allow."""
    works: list[_Work] = []
    earliest = latest = first.request.arrived_at
    for turn in rounds(first):
        earliest, latest = earliest + turn.delay, latest + turn.delay
        slo = turn.stages[0].slo
        assert slo is not None
        prompt, output = turn.request.prompt_tokens, turn.output_tokens
        paces = np.concatenate([np.full(s.max_new_tokens, s.slo.tpot) for s in turn.stages if s.slo])[:output]
        dues = latest + slo.ttft + np.cumsum(paces) - paces[0]
        edges = np.unique(np.linspace(1, output, INSTALMENTS + 1).round().astype(np.int64))
        spans = list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))
        token = _token_seconds(profile)
        prefill = token * prompt + profile.perf.per_area * 0.5 * prompt**2
        decode = [
            (high - low) * (token + profile.perf.per_context * (prompt + 0.5 * (low + high))) for low, high in spans
        ]
        deadlines = np.array([dues[0], *(dues[high - 1] for _, high in spans)])
        works.append(_Work(earliest, turn.unit, deadlines, np.array([prefill, *decode])))
        earliest += profile.prefill_seconds(prompt) + (output - 1) * profile.iteration_seconds
        latest = float(dues[-1])
    return works


def _token_seconds(profile: Profile) -> float:
    """GPU seconds per token in the largest batch there is, where its fixed cost is shared by most."""
    tokens = profile.capabilities.max_batch_tokens
    return profile.perf.seconds(BatchShape(tokens)) / tokens
