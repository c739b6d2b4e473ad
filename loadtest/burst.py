"""What a burst does: steady arrivals, then five times as many for twelve seconds, and how long it hurts.

Second by second: who attained, by time of arrival, and how many wait for their first token. The steady rate is
half the Poisson capacity of our planner, the same trace for every policy; baselines run with the parameters
that were best for the workload under Poisson arrivals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from .capacity import kept, rounds
from .cells import Turn, draw, turns
from .exam import Cell, Scene, examine, scene

BASE_SHARE: Final = 0.5  # of our Poisson capacity
FACTOR: Final = 5.0
STARTS: Final = 60.0
SECONDS: Final = 12.0
AFTER: Final = 12.0  # seconds right after the burst that are reported on their own
ENDS: Final = 150.0
SEEDS: Final = 20  # traces that are added up


def burst(cell: Cell, policies: Sequence[str]) -> dict[str, Any]:
    """The experiment for one workload and profile: a timeline for each policy, as JSON values."""
    steady = replace(cell, arrivals="poisson", policy="slos_serve", targets=(0.9,), rules=("strict",))
    tuned = {policy: examine(replace(steady, policy=policy)) for policy in dict.fromkeys(("slos_serve", *policies))}
    base = BASE_SHARE * tuned["slos_serve"]["capacity_per_gpu"]["strict"]["0.9"] * cell.replicas
    timelines = {policy: _timeline(replace(steady, policy=policy), tuned[policy], base) for policy in policies}
    return {
        "workload": cell.workload,
        "profile": cell.profile,
        "replicas": cell.replicas,
        "base_rate": base,
        "factor": FACTOR,
        "starts_s": STARTS,
        "ends_s": STARTS + SECONDS,
        "seeds": SEEDS,
        "policies": timelines,
    }


def burst_sessions(ready: Scene, base: float, seed: int) -> list[Turn]:
    """Poisson arrivals at `base` sessions per second, `FACTOR` times as many during the burst."""
    load = replace(ready.cell.load, arrivals="poisson")
    top = FACTOR * base
    arrivals = draw(load, top, top, ENDS, seed)
    chances = np.random.default_rng([seed, 1])
    sessions = dict.fromkeys(each.session or f"alone-{index}" for index, each in enumerate(arrivals))
    lot = dict(zip(sessions, chances.random(len(sessions)).tolist(), strict=True))
    taken = [
        each
        for index, each in enumerate(arrivals)
        if STARTS <= each.at < STARTS + SECONDS or lot[each.session or f"alone-{index}"] < 1 / FACTOR
    ]
    return turns(taken, ready.profile, ready.targets, ready.cell.ttft_floor_ms / 1000)[0]


def _timeline(cell: Cell, tuned: Mapping[str, Any], base: float) -> dict[str, Any]:
    ready = scene(cell)
    arrived, attained, queued = (np.zeros(int(ENDS)) for _ in range(3))
    for seed in range(SEEDS):
        firsts = burst_sessions(ready, base, seed)
        played = ready.play(tuned["parameters"] or {}, firsts)
        for first in firsts:
            second = int(first.request.arrived_at)
            arrived[second] += 1
            attained[second] += kept(first, played.outcomes)["strict"]
            for turn in rounds(first):
                outcome = played.outcomes[turn.request.id]
                until = outcome.token_times[0] if outcome.token_times else ENDS
                low, high = np.ceil([outcome.request.arrived_at, until]).astype(int).clip(0, int(ENDS))
                queued[low:high] += 1
    over = STARTS + SECONDS
    spans = {
        "before": (20.0, STARTS),
        "inside": (STARTS, over),
        "right after": (over, over + AFTER),
        "later": (over + AFTER, ENDS),
    }
    shares = {name: _share(attained, arrived, int(low), int(high)) for name, (low, high) in spans.items()}
    return {
        "parameters": tuned["parameters"],
        "attained": shares,
        "arrived_per_second": (arrived / SEEDS).tolist(),
        "attained_per_second": (attained / SEEDS).tolist(),
        "queue_per_second": (queued / SEEDS).tolist(),
    }


def burst_table(found: Mapping[str, Any]) -> str:
    """Who attained what, as text."""
    names = ("before", "inside", "right after", "later")
    lines = [f"{found['workload']} on {found['profile']}, {found['base_rate']:.3g} per second, then {FACTOR:g}x:"]
    for policy, timeline in found["policies"].items():
        shares = ", ".join(f"{name} {100 * timeline['attained'][name]:.1f} %" for name in names)
        lines.append(f"  {policy:12} {shares}")
    return "\n".join(lines)


def _share(attained: np.ndarray[Any, Any], arrived: np.ndarray[Any, Any], low: int, high: int) -> float:
    return float(attained[low:high].sum() / max(arrived[low:high].sum(), 1))
