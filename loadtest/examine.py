"""What happens in one cell of the exam: its load is played at rate after rate until its capacity is known.

    Cell -> scene -> examine -> result       one combination, what there is in it, what came of it, as JSON values
    results                                  many cells on several processes, each with its clairvoyant bound

Results are equal for equal cells on any machine with the same numpy, except for the planner's real time.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import numpy as np

from slos_serve.scheduler import Capabilities, PerfModel, Planner
from slos_serve.scheduler.attainment import RULES, Rule

from .bound import bounds
from .capacity import (
    EXAMINED,
    STEPS_PER_DOUBLING,
    UNTUNED,
    Fleet,
    Parameters,
    Played,
    Policy,
    Score,
    Search,
    group_size,
    ours,
    play,
    rate_at,
    score,
)
from .cells import (
    ARRIVALS,
    Load,
    Profile,
    Target,
    Turn,
    check_targets,
    check_trace,
    cost,
    draw,
    horizon,
    known,
    lifetime,
    load_profile,
    parse_targets,
    turns,
)
from .settings import SETTINGS
from .workload import WORKLOADS

HEADLINE: Final[Rule] = "strict"
SAMPLE: Final = 500  # sessions that tell a workload's mean lifetime and cost
MODEST: Final = 0.3  # share of it at which the least number of sessions comes within the horizon
REHEARSAL: Final = 0.25  # of a run's seconds, to rule out parameters
SLACK: Final = 0.1  # below the target, so far a rehearsal tells how much worse parameters are
FIRST_GUESS: Final = 0.4  # share of the GPU's raw token rate where the search starts


@dataclass(frozen=True, slots=True)
class Cell:
    """One examined combination. `rate` in sessions per second for all replicas; None searches the capacity."""

    workload: str
    arrivals: str
    profile: str
    policy: str
    replicas: int
    seed: int
    ttft_floor_ms: float = 0.0
    noise: float = 0.05
    rate: float | None = None
    targets: tuple[float, ...] = (0.9,)
    rules: tuple[Rule, ...] = (HEADLINE,)
    slos: tuple[str, ...] = ()
    trace: Path | None = None
    min_requests: int = 600
    burst_period: float = 60.0
    setting: str = ""
    untuned: bool = False
    acceptance: float = 0.0
    prefix_reuse: bool = False

    @property
    def load(self) -> Load:
        return Load(self.workload, self.arrivals, self.trace, self.min_requests, self.burst_period)

    def about(self) -> dict[str, Any]:
        """The cell as JSON values: what a result is found again by."""
        return {
            "workload": self.workload,
            "arrivals": self.arrivals,
            "profile": self.profile,
            "policy": self.policy,
            "replicas": self.replicas,
            "seed": self.seed,
            "ttft_floor_ms": self.ttft_floor_ms,
            "noise": self.noise,
            "rate": self.rate,
            "targets": list(self.targets),
            "rules": list(self.rules),
            "slos": list(self.slos),
            "trace": str(self.trace) if self.trace else None,
            "min_requests": self.min_requests,
            "burst_period_s": self.burst_period,
            "setting": self.setting,
            "untuned": self.untuned,
            "acceptance": self.acceptance,
            "prefix_reuse": self.prefix_reuse,
        }

    def examined(self) -> Policy:
        """The policy; ours in the cell's setting, others as they come when `untuned`."""
        if self.policy == "slos_serve":
            return ours(SETTINGS[self.setting])
        policy = EXAMINED[self.policy]
        return replace(policy, sweep=(UNTUNED[self.policy],)) if self.untuned and self.policy in UNTUNED else policy


@dataclass(frozen=True, slots=True)
class Scene:
    """A cell made ready: its profile and targets, and what a mean session lasts and costs in seconds."""

    cell: Cell
    profile: Profile
    targets: Mapping[str, Target]
    lifetime: float
    cost: float

    def firsts(self, rate: float, share: float = 1.0) -> tuple[list[Turn], float, int]:
        """The sessions at a rate, the seconds they span, and how many did not fit the KV memory.

        `share` of the seconds of a whole run.
        """
        top = self.cell.replicas / self.cost
        seconds = horizon(self.cell.load, self.lifetime, self.cell.rate or MODEST * top, share)
        arrivals = draw(self.cell.load, rate, top, seconds, self.cell.seed)
        return (*self._turns(arrivals, seconds),)

    def _turns(self, arrivals: Sequence[Any], seconds: float) -> tuple[list[Turn], float, int]:
        told = SETTINGS[self.cell.setting].told_lengths
        floor, reuse = self.cell.ttft_floor_ms / 1000, self.cell.prefix_reuse
        firsts, dropped = turns(arrivals, self.profile, self.targets, floor, told=told, reuse=reuse)
        return firsts, seconds, dropped

    def evaluate(self, parameters: Parameters, rate: float, target: float = 0.0, share: float = 1.0) -> Score:
        """Play the cell's sessions at `rate`; given up once fewer than the `target` share can attain.

        Where a group of GPUs that serve together is larger than the cell's replicas, or does not divide them,
        the fleet is the next multiple and gets proportionally more of the same trace.
        """
        gpus = self._gpus(parameters)
        firsts, seconds, dropped = self.firsts(rate * gpus / self.cell.replicas, share)
        if not firsts and not dropped:  # so low a rate that nobody comes tells nothing
            return Score(rate, 0, seconds, 0, dict.fromkeys(RULES, 0.0), complete=False)
        return score(firsts, self.play(parameters, firsts, target), rate=rate, seconds=seconds, dropped=dropped)

    def play(self, parameters: Parameters, firsts: Sequence[Turn], target: float = 0.0) -> Played:
        """Play these sessions on the cell's fleet."""
        make = partial(_planner, self.cell.examined(), parameters)
        split = {name: int(parameters[name]) for name in ("prefill", "decode") if name in parameters}
        fleet = Fleet(self.profile, make, self._gpus(parameters), self.cell.noise, self.cell.seed, **split)
        fleet = replace(fleet, acceptance=self.cell.acceptance)
        return play(fleet, firsts, target)

    def _gpus(self, parameters: Parameters) -> int:
        return -(-self.cell.replicas // group_size(parameters)) * group_size(parameters)


def _planner(policy: Policy, parameters: Parameters, capabilities: Capabilities, perf: PerfModel) -> Planner:
    return policy.make(capabilities, perf, parameters)


def scene(cell: Cell) -> Scene:
    """Check a cell and make it ready. Raises ValueError with the known names, or what can never be served."""
    known("policy", cell.policy, EXAMINED)
    known("arrivals", cell.arrivals, [*ARRIVALS, "trace"])
    known("setting", cell.setting, SETTINGS)
    if cell.setting and cell.policy != "slos_serve":
        raise ValueError(f"--setting: only slos_serve has settings, got {cell.setting} with policy {cell.policy}")
    if cell.prefix_reuse and cell.policy == "distserve":
        raise ValueError("--prefix-reuse: distserve moves every prompt's KV away and keeps none, leave it out")
    profile, targets = load_profile(cell.profile), parse_targets(cell.slos)
    check_targets(targets, profile)
    if cell.trace is not None:
        check_trace(cell.trace, profile, targets)
    else:
        known("workload", cell.workload, WORKLOADS)
    typical = _typical(cell.load, cell.profile, cell.slos, cell.ttft_floor_ms)
    profile = profile.drafting() if cell.acceptance else profile
    return Scene(cell, profile, targets, *typical)


@cache
def _typical(load: Load, profile_name: str, slos: tuple[str, ...], ttft_floor_ms: float) -> tuple[float, float]:
    profile = load_profile(profile_name)
    arrivals = draw(Load(load.workload, "poisson", load.trace), 1.0, 1.0, SAMPLE, 0)
    firsts, _ = turns(arrivals, profile, parse_targets(slos), ttft_floor_ms / 1000)
    if not firsts:
        raise ValueError(f"no session of {load.workload} fits the KV memory of {profile.name}")
    return fmean(map(lifetime, firsts)), fmean(cost(turn, profile) for turn in firsts)


# One cell


def examine(cell: Cell) -> dict[str, Any]:
    """Play one cell; the result as JSON values."""
    ready, started = scene(cell), time.perf_counter()
    result = _point(ready, cell.rate) if cell.rate is not None else _capacities(ready)
    return {**cell.about(), **result, "real_seconds": round(time.perf_counter() - started, 2)}


def _point(ready: Scene, rate: float) -> dict[str, Any]:
    """The best parameters at one rate, by the headline rule."""
    played = [(parameters, ready.evaluate(parameters, rate)) for parameters in ready.cell.examined().sweep]
    parameters, best = max(played, key=lambda pair: pair[1].attainment[HEADLINE])
    return {"parameters": dict(parameters), "capacity_per_gpu": {}, **_shown(best), "curve": _curve(played)}


def _capacities(ready: Scene) -> dict[str, Any]:
    """The capacity by the first rule and target to the grid's resolution; all others read off the curve."""
    cell, sweep = ready.cell, ready.cell.examined().sweep
    least = min(cell.targets)
    search = Search(
        sweep,
        lambda parameters, step: ready.evaluate(parameters, rate_at(step), least),
        start=round(STEPS_PER_DOUBLING * float(np.log2(max(FIRST_GUESS * cell.replicas / ready.cost, 1e-3)))),
        rehearse=lambda parameters, step: ready.evaluate(parameters, rate_at(step), least - SLACK, REHEARSAL),
    )
    headline = search.capacity(cell.rules[0], cell.targets[0])
    capacities: dict[str, dict[str, float]] = {}
    chosen: dict[str, dict[str, Parameters | None]] = {}
    for rule, target in itertools.product(cell.rules, cell.targets):
        first = (rule, target) == (cell.rules[0], cell.targets[0])
        found = headline if first or headline is None else search.read(rule, target)
        capacities.setdefault(rule, {})[f"{target:g}"] = rate_at(found[1]) / cell.replicas if found else 0.0
        chosen.setdefault(rule, {})[f"{target:g}"] = dict(sweep[found[0]]) if found else None
    result: dict[str, Any] = {"parameters": None, "capacity_per_gpu": capacities, "chosen": chosen}
    if headline is not None:
        result |= {"parameters": dict(sweep[headline[0]]), **_shown(search.played(*headline))}
    return {**result, "curve": _curve(search.curve())}


def _shown(result: Score) -> dict[str, Any]:
    return {
        "at_rate": result.rate,
        "sessions": result.sessions,
        "horizon_s": result.seconds,
        "dropped": result.dropped,
        "attainment": dict(result.attainment),
        "token_weighted_attainment": result.token_weighted,
        "attainment_by_length": list(result.by_length),
        "p99_time_between_tokens_s": result.p99_gap,
        "preemptions": result.preemptions,
        "planner_ms": dict(result.planner_ms),
    }


def _curve(played: Iterable[tuple[Parameters, Score]]) -> list[dict[str, Any]]:
    return [
        {
            "parameters": dict(parameters),
            "rate": result.rate,
            "attainment": dict(result.attainment),
            "complete": result.complete,
        }
        for parameters, result in played
    ]


@cache
def _bounds(cell: Cell) -> Mapping[str, float]:
    ready = scene(cell)
    start = FIRST_GUESS * cell.replicas / ready.cost
    return bounds(lambda rate: ready.firsts(rate)[0], ready.profile, cell.replicas, cell.targets[0], start)


def bound(cell: Cell) -> Mapping[str, float]:
    """The clairvoyant bounds on the cell's first capacity, per GPU: the same for every policy."""
    return _bounds(_bounded(cell))


def _bounded(cell: Cell) -> Cell:
    """The cell as far as its bound depends on it."""
    return replace(cell, policy="slos_serve", setting="", rules=(HEADLINE,), targets=cell.targets[:1], untuned=False)


def _bound_of(cell: Cell) -> dict[str, float] | None:
    """None at one rate, where no capacity is asked for."""
    return None if cell.rate is not None else dict(bound(cell))


# Many cells


def results(cells: Sequence[Cell], jobs: int) -> Iterator[dict[str, Any]]:
    """Each cell's result as soon as it is there, on `jobs` processes. The first failure ends it all.

    The bounds take as long as a cell, so they are found by the same processes, once for all cells that share them.
    """
    if jobs <= 1 or len(cells) <= 1:
        yield from ({**examine(cell), "bound": _bound_of(cell)} for cell in cells)
        return
    with ProcessPoolExecutor(min(jobs, len(cells)), mp_context=get_context("spawn")) as pool:
        shared: dict[Cell, Future[Any]] = {}
        waiting: list[tuple[Future[dict[str, Any]], Future[Any]]] = []
        for cell in cells:
            load = _bounded(cell)
            if load not in shared:
                shared[load] = pool.submit(_bound_of, load)
            waiting.append((pool.submit(examine, cell), shared[load]))
        try:
            while waiting:
                wait([future for pair in waiting for future in pair if not future.done()], return_when=FIRST_COMPLETED)
                ready = [pair for pair in waiting if all(future.done() for future in pair)]
                waiting = [pair for pair in waiting if pair not in ready]
                yield from ({**played.result(), "bound": found.result()} for played, found in ready)
        finally:
            for pair in waiting:
                for future in pair:
                    future.cancel()
