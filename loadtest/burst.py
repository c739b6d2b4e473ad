"""What a burst does: steady arrivals, then five times as many for twelve seconds, and how long it hurts.

Second by second: who attained, by time of arrival, and how many wait for their first token. The steady rate is
half the Poisson capacity of our planner, the same trace for every policy; baselines run with the parameters
that were best for the workload under Poisson arrivals. The bound is what a clairvoyant scheduler could attain of the
very sessions, as fluid work (`bound`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from .bound import trace_dropped
from .capacity import kept, rounds
from .cells import Turn, draw, turns
from .examine import Cell, Scene, examine, scene

BASE_SHARE: Final = 0.5  # of our Poisson capacity
FACTOR: Final = 5.0
STARTS: Final = 60.0
SECONDS: Final = 12.0
AFTER: Final = 12.0  # seconds right after the burst that are reported on their own
ENDS: Final = 150.0
SEEDS: Final = 20  # traces that are added up
_OVER: Final = STARTS + SECONDS
SPANS: Final[Mapping[str, tuple[int, int]]] = {  # seconds
    "before": (20, int(STARTS)),
    "inside": (int(STARTS), int(_OVER)),
    "right after": (int(_OVER), int(_OVER + AFTER)),
    "later": (int(_OVER + AFTER), int(ENDS)),
}


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
        "bound": _bound(scene(steady), base),
    }


def _bound(ready: Scene, base: float) -> dict[str, float]:
    """Shares of the sessions that a clairvoyant scheduler could attain at most, by span."""
    arrived, attained = np.zeros(int(ENDS)), np.zeros(int(ENDS))
    for seed in range(SEEDS):
        firsts = burst_sessions(ready, base, seed)
        dropped = trace_dropped(firsts, ready.profile, ready.cell.replicas)
        for first in firsts:
            second = int(first.request.arrived_at)
            arrived[second] += 1
            attained[second] += first.unit not in dropped
    return _shares(attained, arrived)


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
    return {
        "parameters": tuned["parameters"],
        "attained": _shares(attained, arrived),
        "arrived_per_second": (arrived / SEEDS).tolist(),
        "attained_per_second": (attained / SEEDS).tolist(),
        "queue_per_second": (queued / SEEDS).tolist(),
    }


def burst_table(found: Mapping[str, Any]) -> str:
    """Who attained what, as text."""
    lines = [f"{found['workload']} on {found['profile']}, {found['base_rate']:.3g} per second, then {FACTOR:g}x:"]
    attained = {policy: timeline["attained"] for policy, timeline in found["policies"].items()}
    for policy, shares_of in {**attained, "bound": found["bound"]}.items():
        shares = ", ".join(f"{name} {100 * shares_of[name]:.1f} %" for name in SPANS)
        lines.append(f"  {policy:12} {shares}")
    return "\n".join(lines)


def _shares(attained: np.ndarray[Any, Any], arrived: np.ndarray[Any, Any]) -> dict[str, float]:
    """The share attained of those who arrived in each span, from counts per second."""
    return {
        name: float(attained[low:high].sum() / max(arrived[low:high].sum(), 1)) for name, (low, high) in SPANS.items()
    }
