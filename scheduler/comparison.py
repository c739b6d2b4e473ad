"""A recorded run held against the simulation of the same arrivals.

Live and simulated are judged alike, by the engine's clock: from a request's arrival at the planner's side to
the end of the iteration that made a token. The simulation is given the recorded arrivals and the lengths of
the outputs, how long steps and pauses are (`observed`, from an earlier part of the run), and by replay what the
planner had learned until the arrivals began (the correction of its model, output lengths, acceptance). It never
sees a token time of what it is compared with.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import numpy as np

from .attainment import attained
from .core import Capabilities, Request
from .engine import Planner
from .observed import Observed
from .perf import PerfModel
from .recording import Added, Call, Cancelled, Header, Planned, Recording, replay
from .scheduler import Scheduler
from .simulator import SimulatedEngine, simulate

ALL: Final = "all"
Make: TypeAlias = Callable[[Capabilities, PerfModel], Planner]


@dataclass(slots=True)
class Life:
    """What one recorded request got."""

    request: Request
    token_times: list[float] = field(default_factory=list)
    stage_tokens: list[int] = field(default_factory=lambda: [0])
    drafted: int = 0
    tried: int = 0  # guesses up to the first wrong one of each step
    accepted: int = 0
    ended: bool = False


@dataclass(frozen=True, slots=True)
class Measured:
    """A group of requests in numbers; times are medians in milliseconds, None where there is none."""

    requests: int
    attained: float | None
    ttft_ms: float | None
    tpot_ms: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """One class at one load, live and simulated."""

    load: str
    slo_class: str
    live: Measured
    simulated: Measured


def lives(calls: Iterable[Call]) -> dict[str, Life]:
    """What every request of these calls got, by id; where an id was used again, the last."""
    found: dict[str, Life] = {}
    drafts: dict[str, int] = {}
    for call in calls:
        if isinstance(call, Added):
            found[call.request.id] = Life(call.request)
        elif isinstance(call, Planned):
            drafts = {chunk.request_id: chunk.draft for chunk in call.plan.chunks}
        elif not isinstance(call, Cancelled):
            for advance in call.advances:
                life = found[advance.request_id]
                life.token_times += [call.finished_at] * advance.new_tokens
                life.stage_tokens[-1] += advance.new_tokens
                if advance.stage_ended and len(life.stage_tokens) < len(life.request.stages):
                    life.stage_tokens.append(0)
                drafted = drafts.get(advance.request_id, 0)
                life.drafted += drafted
                life.tried += min(advance.accepted + 1, drafted)
                life.accepted += advance.accepted
                life.ended = advance.done
    return found


def measured(cases: Iterable[tuple[Request, bool, Sequence[float]]]) -> Measured:
    """A group of (request, attained, token times)."""
    rows = list(cases)
    promised = [is_attained for request, is_attained, _ in rows if not request.is_best_effort]
    first = [times[0] - request.arrived_at for request, _, times in rows if times]
    pace = [(times[-1] - times[0]) / (len(times) - 1) for _, _, times in rows if len(times) > 1]
    return Measured(
        len(rows),
        sum(promised) / len(promised) if promised else None,
        1e3 * statistics.median(first) if first else None,
        1e3 * statistics.median(pace) if pace else None,
    )


def simulated(
    header: Header, make: Make, before: Sequence[Call], group: Sequence[Life], world: Observed, seed: int = 0
) -> list[tuple[Request, bool, Sequence[float]]]:
    """The requests of `group` through the simulator, from where the planner stood after the calls `before`."""
    planner = make(header.capabilities, header.perf)
    difference = replay(Recording(header, list(before)), planner)
    if difference is not None:
        raise ValueError(f"the recording does not replay: plan {difference.index} differs")
    assert isinstance(planner, Scheduler)  # every policy is one
    for name, life in lives(before).items():
        if not life.ended:
            planner.cancel(name)
    rng = np.random.default_rng(seed)
    engine = SimulatedEngine(header.capabilities, world.perf, noise=world.noise, rng=rng)
    outcomes = simulate(
        [life.request for life in group],
        {life.request.id: len(life.token_times) for life in group},
        planner,
        engine,
        acceptance=_acceptance(group),
        turnaround=world.turnaround,
    )
    return [(each.request, each.attained, each.token_times) for each in outcomes.values()]


def _acceptance(group: Sequence[Life]) -> dict[str, float]:
    """How often a guess is right, for each request: the mean of its class."""
    sums: dict[str, list[int]] = {}
    for life in group:
        sums.setdefault(life.request.slo_class, [0, 0])
        sums[life.request.slo_class][0] += life.accepted
        sums[life.request.slo_class][1] += life.tried
    return {
        life.request.id: sums[life.request.slo_class][0] / max(sums[life.request.slo_class][1], 1) for life in group
    }


def compare(
    recording: Recording, make: Make, loads: Mapping[str, Callable[[str], bool]], world: Observed
) -> list[Comparison]:
    """Every class at every load, and all together. `loads`: a name, and which request ids belong to it. `make`
    is the entry of `POLICIES` that the recording is about, `world` how long its steps take.

    Requests that did not end are left out of both sides.
    """
    found = lives(recording.calls)
    compared = []
    for load, belongs in loads.items():
        group = [life for name, life in found.items() if belongs(name) and life.ended]
        if not group:
            continue
        live = [
            (each.request, attained(each.request.stages, each.stage_tokens, each.request.arrived_at, each.token_times),
             each.token_times)
            for each in group
        ]  # fmt: skip
        model = simulated(recording.header, make, _before(recording.calls, belongs), group, world)
        for name in (*sorted({each.request.slo_class for each in group}), ALL):
            pair = [measured(case for case in cases if name in (ALL, case[0].slo_class)) for cases in (live, model)]
            compared.append(Comparison(load, name, *pair))
    return compared


def _before(calls: Sequence[Call], belongs: Callable[[str], bool]) -> Sequence[Call]:
    """The calls before the first request of a load."""
    for index, call in enumerate(calls):
        if isinstance(call, Added) and belongs(call.request.id):
            return calls[:index]
    return calls


def gap(rows: Sequence[Comparison]) -> str:
    """The largest differences over all classes together, one number each."""
    whole = [row for row in rows if row.slo_class == ALL]
    points = [100 * (row.simulated.attained - row.live.attained) for row in whole
              if row.live.attained is not None and row.simulated.attained is not None]  # fmt: skip
    parts = [f"attained {_largest(points):+.1f} points"]
    for name in ("ttft_ms", "tpot_ms"):
        pairs = [(getattr(row.live, name), getattr(row.simulated, name)) for row in whole]
        ratios = [100 * (model / live - 1) for live, model in pairs if live and model]
        parts.append(f"{name[:4].upper()} {_largest(ratios):+.1f} %")
    return "largest gap of all classes together, simulated against live: " + ", ".join(parts)


def _largest(values: Sequence[float]) -> float:
    return max(values, key=abs, default=0.0)


def to_json(rows: Sequence[Comparison]) -> list[dict[str, Any]]:
    names = Measured.__slots__
    return [
        {"load": row.load, "class": row.slo_class}
        | {side: {name: getattr(part, name) for name in names}
           for side, part in (("live", row.live), ("simulated", row.simulated))}
        for row in rows
    ]  # fmt: skip
