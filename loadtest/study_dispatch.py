"""`slos-serve study-dispatch`: which way of choosing an instance keeps most promises, in virtual time.

Every instance is the real planner on a simulated engine, and the ranking is the router's own. A request goes to
one instance, may be declined there at its first plan, and goes on to the next with its arrival time as it was.
Once every request has found its place, each instance is played to its end by itself, in compiled code.

    round_robin   each instance in turn                          sticky   a session's home, others in turn
    least_tokens  the fewest outstanding tokens, known exactly   hops     in turn, following declines (the paper)
    ranked        the router: best by load, following declines   few      the same among some drawn at random
    held          ranked, but kept back for a moment where nobody could promise it

Prints the sessions per second at which 90 % of the sessions attain, as ratios to round-robin in the same scenario,
and what a decision costs. A JSON file keeps what was found: a later run adds to it, and draws all of it.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from slos_serve.scheduler import PerfModel, Piece, Plan, Request, Scheduler, StepReport, timemodel
from slos_serve.scheduler.core import Advances, Chunks
from slos_serve.scheduler.dispatch import Ask, Fleet, Load, drawn, home, is_hopeless, load_of, predict, prefix, rank
from slos_serve.scheduler.simulator import IDLE_SECONDS, Outcome, SimulatedEngine, run_out

from .capacity import kept, rounds
from .cells import TARGETS, Profile, Turn, draw, load_profile, turns
from .cells import Load as Arrivals

TARGET: Final = 0.9
TELL_SECONDS: Final = 0.1
TOLD_SECONDS: Final = 0.5  # the end of a session's round is told so long
PRIOR_OUTPUT: Final = 200.0  # tokens that a dispatcher expects of a request it knows nothing of
MAX_HOPS: Final = 3
POLICIES: Final = ("round_robin", "sticky", "least_tokens", "hops", "ranked", "few", "held")
RANKED: Final = ("ranked", "few", "held")
FEW: Final = 8
HOLD_STEP: Final = 0.01  # seconds between two looks at a request that is kept back
HOLD_SECONDS: Final = 0.05  # and how long at most
PER_REPLICA: Final = 4.5  # sessions per second where a search begins
GALLOP: Final = 2  # points of the grid that a search strides first
CLOSE: Final = 1.1  # from one rate to the next; between them is interpolated
LEAST_RATE: Final = 0.01


@dataclass(slots=True)
class _Live:
    """A request at an instance."""

    turn: Turn
    request: Request
    tokens: int = 0
    is_settled: bool = False
    is_promised: bool = True  # until the first verdict, too


class Site:
    """One instance: planner, engine, what is there, and what its cache holds of sessions."""

    def __init__(self, name: str, profile: Profile, slowdown: float, seed: int) -> None:
        self.name = name
        self.planner = Scheduler(profile.capabilities, profile.perf)
        rng = np.random.default_rng(seed)
        self.engine = SimulatedEngine(profile.capabilities, slower(profile.perf, slowdown), rng, 0.05)
        self.live: dict[str, _Live] = {}
        self.cached: dict[str, int] = {}
        self.ended: deque[tuple[float, str]] = deque(maxlen=512)  # when the round of which session
        self.is_busy = False
        self._outstanding = -1.0

    def take(self, turn: Turn, now: float, *, is_settled: bool) -> None:
        request, session = turn.request, turn.request.session
        known = self.cached.get(session, 0) if session else 0
        block = self.planner.capabilities.block_tokens
        held = min(known, request.prompt_tokens - 1) // block * block
        held = held if held // block < self.planner.free_blocks else 0
        request = replace(request, cached_tokens=held)
        self.live[request.id] = _Live(turn, request, is_settled=is_settled)
        self.changed()
        self.engine.add(request, turn.output_tokens)
        self.planner.add(request, now)

    def drop(self, request_id: str) -> Turn:
        self.planner.cancel(request_id)
        self.engine.release(request_id)
        self.changed()
        return self.live.pop(request_id).turn

    def load(self) -> Load:
        queued = context = 0
        tightest = math.inf
        for each in self.live.values():
            stage = each.request.stages[0]
            if each.tokens:
                context += each.request.prompt_tokens + each.tokens
            elif each.is_promised:
                queued += each.request.prompt_tokens - each.request.cached_tokens
            if each.is_promised and stage.slo:
                tightest = min(tightest, stage.slo.tpot)
        model, perf = self.planner.model, self.planner.perf
        return load_of(
            self.planner.snapshot(),
            self.planner.capabilities,
            lambda shape: float(timemodel.apply(model, perf.seconds(shape))),
            queued_tokens=queued,
            decode_context=context,
            tightest=tightest,
        )

    def outstanding(self) -> float:
        """Tokens still to be computed, as far as one can know."""
        if self._outstanding < 0:
            self._outstanding = sum(
                max(PRIOR_OUTPUT - each.tokens, 1.0) + (0.0 if each.tokens else each.request.prompt_tokens)
                for each in self.live.values()
            )
        return self._outstanding

    def changed(self) -> None:
        """Something ran."""
        self._outstanding = -1.0


def slower(perf: PerfModel, factor: float) -> PerfModel:
    """The same machine, every batch `factor` times as long."""
    pieces = tuple(Piece(p.base * factor, p.per_token * factor, p.per_step * factor) for p in perf.pieces)
    return PerfModel(pieces, perf.per_context * factor, perf.per_area * factor)


@dataclass(frozen=True, slots=True)
class Scenario:
    """Instances (profile and slowdown of each) and what is asked of them."""

    sites: tuple[tuple[str, float], ...]
    workload: str = "mixed"
    arrivals: str = "poisson"
    tell: float = TELL_SECONDS  # 0: at every request
    routers: int = 1
    seconds: float = 0.0  # of arrivals, instead of those asked for
    drawn: int = FEW  # instances that `few` compares
    policies: tuple[str, ...] = ("round_robin", "least_tokens", "hops", "ranked")


def same(count: int, profile: str = "a100-llama-3-8b") -> tuple[tuple[str, float], ...]:
    return ((profile, 1.0),) * count


_SKEWED: Final = (*same(3), ("a100-llama-3-8b", 2.0))
_MIXED: Final = (*same(2), *same(2, "h100-llama-3-8b"))
_BRIEF: Final = ("round_robin", "least_tokens", "ranked")
_SESSIONS: Final = ("round_robin", "sticky", "least_tokens", "hops", "ranked", "held")

SCENARIOS: Final[Mapping[str, Scenario]] = {
    "equal": Scenario(same(4), policies=("round_robin", "least_tokens", "hops", "ranked", "held")),
    "sessions": Scenario(same(4), workload="tool_calling", policies=_SESSIONS),
    "straggler": Scenario(_SKEWED),
    "mixed GPUs": Scenario(_MIXED),
    "bursts": Scenario(same(4), arrivals="bursts", policies=("round_robin", "least_tokens", "hops", "ranked", "held")),
    "sessions, straggler": Scenario(_SKEWED, workload="tool_calling", policies=_SESSIONS[:-1]),
    "sessions, 4 routers": Scenario(
        same(4), workload="tool_calling", routers=4, policies=("round_robin", "sticky", "ranked")
    ),
    "loads at once": Scenario(same(4), tell=0.0, policies=("ranked",)),
    "loads 0.3 s old": Scenario(same(4), tell=0.3, policies=("ranked",)),
    "loads 1 s old": Scenario(same(4), tell=1.0, policies=("ranked",)),
    "straggler, loads 1 s old": Scenario(_SKEWED, tell=1.0, policies=("ranked",)),
    "4 routers": Scenario(same(4), routers=4, policies=("round_robin", "ranked")),
    "16 routers": Scenario(same(4), routers=16, policies=("round_robin", "ranked")),
    "1 replica": Scenario(same(1), policies=_BRIEF),
    "2 replicas": Scenario(same(2), policies=_BRIEF),
    "8 replicas": Scenario(same(8), policies=_BRIEF),
    "64 replicas": Scenario(same(64), seconds=10.0, policies=(*_BRIEF, "few")),
    "512 replicas": Scenario(same(512), seconds=4.0, policies=("round_robin", "ranked", "few")),
    "512 replicas, 64 drawn": Scenario(same(512), seconds=4.0, drawn=64, policies=("few",)),
}
# Scenarios whose other policies do not feel what is changed: their capacities are those of another.
_LIKE: Final[Mapping[str, str]] = {
    "loads at once": "equal",
    "loads 0.3 s old": "equal",
    "loads 1 s old": "equal",
    "straggler, loads 1 s old": "straggler",
    "512 replicas, 64 drawn": "512 replicas",
}


@dataclass(slots=True)
class Router:
    """One router's own knowledge."""

    fleet: Fleet
    homes: dict[str, int] = field(default_factory=dict)
    turn: int = 0


class Service:
    """All instances and routers of one run."""

    def __init__(self, scenario: Scenario, policy: str, seed: int) -> None:
        self.sites = [
            Site(f"i{n}", load_profile(name), slowdown, seed + n) for n, (name, slowdown) in enumerate(scenario.sites)
        ]
        self.policy = policy
        self.may_be_declined = len(self.sites) > 1 and policy in ("hops", *RANKED)
        self.tell_every = scenario.tell
        self.drawn = scenario.drawn
        names = [site.name for site in self.sites]
        self.routers = [Router(Fleet(names), turn=1009 * n) for n in range(scenario.routers)]
        self.outcomes: dict[str, Outcome] = {}
        self.declined: dict[str, list[int]] = {}
        self.held: dict[str, float] = {}
        self.expected: dict[str, tuple[float, float, Router]] = {}
        self.coming = 0  # requests that are still to find their place
        self.until = math.inf
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = itertools.count()
        self._rng = np.random.default_rng(seed)

    def at(self, when: float, act: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), act))

    def run(self, firsts: Sequence[Turn], until: float) -> dict[str, Outcome]:
        """Until every session has ended, or `until`."""
        self.coming = sum(1 for turn in firsts for _ in rounds(turn))
        self.until = until
        for turn in firsts:
            self.at(turn.request.arrived_at, lambda now, turn=turn: self.arrive(turn, now))  # type: ignore[misc]
        ticking = len(self.routers) if self.tell_every > 0 and self.policy in RANKED else 0
        for number, router in enumerate(self.routers[:ticking]):
            self.tell(router, number * self.tell_every / ticking)
        while self._events and self._events[0][0] <= until:
            now, _, act = heapq.heappop(self._events)
            act(now)
        return self.outcomes

    def tell(self, router: Router, now: float) -> None:
        self.tell_once(router, now)
        if self.coming:
            self.at(now + self.tell_every, lambda later: self.tell(router, later))

    def tell_once(self, router: Router, now: float) -> None:
        for number, site in enumerate(self.sites):
            router.fleet.tell(site.name, site.load(), now)
            told = itertools.takewhile(lambda end: end[0] >= now - TOLD_SECONDS, reversed(site.ended))
            router.homes.update((session, number) for _, session in told)

    def arrive(self, turn: Turn, now: float) -> None:
        self.outcomes[turn.request.id] = Outcome(turn.request)
        self.declined[turn.request.id] = []
        self.dispatch(turn, now)

    def dispatch(self, turn: Turn, now: float) -> None:
        number = self.choose(turn, now)
        if number is None:
            self.held[turn.request.id] = self.held.get(turn.request.id, 0.0) + HOLD_STEP
            self.at(now + HOLD_STEP, lambda later: self.dispatch(turn, later))
            return
        self.sites[number].take(turn, now, is_settled=not self.may_be_declined)
        self.coming -= not self.may_be_declined
        self.wake(number, now)

    def choose(self, turn: Turn, now: float) -> int | None:
        """Where the request goes; None when it is kept back."""
        router = self.routers[int(self._rng.integers(len(self.routers)))]
        session, before = turn.request.session, self.declined[turn.request.id]
        count = len(self.sites)
        if self.policy in RANKED:
            return self.ranked(router, turn, now)
        if self.policy == "least_tokens":
            return min(range(count), key=lambda n: self.sites[n].outstanding())
        if self.policy == "sticky" and session is not None:
            return int((home(router.fleet, session) or "i0")[1:])
        if before:
            return (before[-1] + 1) % count
        router.turn += 1
        return router.turn % count

    def ask(self, router: Router, turn: Turn, now: float) -> Ask:
        request, slo = turn.request, turn.request.stages[0].slo
        assert slo is not None
        cached = None
        if request.session is not None:
            known = router.homes.get(request.session)
            tokens = 0 if known is None else self.sites[known].cached.get(request.session, 0)
            last = None if known is None else (self.sites[known].name, tokens)
            cached = prefix(router.fleet, request.session, last, request.prompt_tokens)
        left = max(request.arrived_at + slo.ttft - now, 1e-3)
        return Ask(request.prompt_tokens, PRIOR_OUTPUT, left, slo.tpot, cached)

    def ranked(self, router: Router, turn: Turn, now: float) -> int | None:
        """As a router does it."""
        request, before = turn.request, self.declined[turn.request.id]
        if self.tell_every <= 0:
            self.tell_once(router, now)
        ask = self.ask(router, turn, now)
        router.turn += 1
        among = drawn(router.fleet, ask, self.drawn, router.turn) if self.policy == "few" and not before else None
        order = [n for n in rank(router.fleet, ask, now, router.turn, among).tolist() if n not in before]
        is_refused = not order or len(before) >= MAX_HOPS
        if self.policy == "held" and (is_refused or is_hopeless(router.fleet, ask, now)) and self.may_hold(turn, ask):
            before.clear()
            return None
        if is_refused:
            order = rank(router.fleet, replace(ask, ttft=math.inf, tpot=math.inf), now, router.turn, among).tolist()
        self.expected[request.id] = (now, float(predict(router.fleet, ask, now)[order[0]]), router)
        router.fleet.sent(self.sites[order[0]].name, ask)
        if request.session is not None:
            router.homes[request.session] = order[0]
        return int(order[0])

    def may_hold(self, turn: Turn, ask: Ask) -> bool:
        return self.held.get(turn.request.id, 0.0) < HOLD_SECONDS and ask.ttft > 2 * HOLD_STEP

    def wake(self, number: int, now: float) -> None:
        if not self.sites[number].is_busy:
            self.step(number, now)

    def step(self, number: int, now: float) -> None:
        site = self.sites[number]
        site.is_busy = False
        if site.live and not self.coming:
            run_out(site.planner, site.engine, self.outcomes, now, self.until)
            site.live = {name: each for name, each in site.live.items() if name in site.engine.slot_of}
        if not site.live:
            return
        plan = site.planner.plan(now)
        for each in plan.decisions:
            site.live[each.request_id].is_promised = each.admitted
        gone = [each.request_id for each in plan.decisions if self.declines(site, each.request_id, each.admitted)]
        is_idle = not plan.chunks and not plan.evicted
        turns_ = [site.drop(name) for name in gone]
        if gone:
            plan = without(plan, set(gone))
        if is_idle:
            if site.live:
                self.at(min(plan.wake_at, now + IDLE_SECONDS), lambda later: self.wake(number, later))
        else:
            report = site.engine.step(plan, now)
            site.is_busy = True
            self.at(max(report.finished_at, now + 1e-6), lambda later: self.ended(number, report, later))
        for turn in turns_:
            self.declined[turn.request.id].append(number)
            self.dispatch(turn, now)

    def declines(self, site: Site, request_id: str, admitted: bool) -> bool:
        """Whether the first verdict on a request sends it on."""
        each = site.live[request_id]
        if each.is_settled:
            return False
        each.is_settled = True
        most = min(MAX_HOPS, len(self.sites)) if self.policy in RANKED else len(self.sites) - 1
        goes_on = len(self.declined[request_id]) < most and not admitted and not each.tokens
        self.coming -= not goes_on
        return goes_on

    def ended(self, number: int, report: StepReport, now: float) -> None:
        site = self.sites[number]
        # Counted again: a request with a cached prefix may have come while the step ran.
        site.planner.report(replace(report, free_blocks=site.engine.free_blocks))
        site.changed()
        assert isinstance(report.advances, Advances)
        for name, row in zip(report.advances.ids, report.advances.numbers.tolist(), strict=True):
            self.outcomes[name].token_times.extend([report.finished_at] * row[1])
            each = site.live[name]
            if row[1] and not each.tokens and name in self.expected:
                sent_at, expected, router = self.expected.pop(name)
                router.fleet.observed(site.name, expected, now - sent_at)
            each.tokens += row[1]
            if row[4]:
                self.finish(site, site.live.pop(name), now)
        self.step(number, now)

    def finish(self, site: Site, ended: _Live, now: float) -> None:
        turn = ended.turn
        self.coming -= not ended.is_settled
        if turn.request.session is not None:
            site.cached[turn.request.session] = turn.request.prompt_tokens + turn.output_tokens
            site.ended.append((now, turn.request.session))
        if turn.following is not None:
            at = now + turn.delay
            following = replace(turn.following, request=replace(turn.following.request, arrived_at=at))
            self.at(at, lambda later: self.arrive(following, later))


def without(plan: Plan, gone: set[str]) -> Plan:
    """The plan without the chunks of requests that are gone."""
    kept_ = [index for index, chunk in enumerate(plan.chunks) if chunk.request_id not in gone]
    assert isinstance(plan.chunks, Chunks)
    chunks = Chunks(tuple(plan.chunks.ids[index] for index in kept_), plan.chunks.numbers[kept_])
    return replace(plan, chunks=chunks, evicted=tuple(name for name in plan.evicted if name not in gone))


def attainment(scenario: Scenario, policy: str, rate: float, seed: int) -> float:
    """The share of sessions all of whose tokens came in time."""
    arrivals = Arrivals(scenario.workload, scenario.arrivals, burst_period=20.0)
    # Thinned from, or made of, the same sessions at every rate: what differs is the policy.
    sessions = draw(arrivals, rate, PER_REPLICA * len(scenario.sites), scenario.seconds, seed)
    firsts, _ = turns(sessions, load_profile(scenario.sites[0][0]), TARGETS, 0.25)
    outcomes = Service(scenario, policy, seed).run(firsts, scenario.seconds + 120.0)
    return sum(kept(turn, outcomes)["strict"] for turn in firsts) / max(len(firsts), 1)


def capacity(share: Callable[[float], float], guess: float) -> float:
    """The rate at which TARGET of the sessions attain, interpolated between two neighbours of a grid of rates.

    The grid (powers of CLOSE) is the same for all policies, so that none is luckier with the rates it meets. 0 where
    even LEAST_RATE is too much.
    """
    found: dict[int, float] = {}

    def at(point: int) -> float:
        if point not in found:
            found[point] = share(CLOSE**point)
        return found[point]

    low = high = round(math.log(guess) / math.log(CLOSE))
    step = GALLOP
    while at(high) >= TARGET:
        low, high, step = high, high + step, min(2 * step, 8)
    while at(low) < TARGET:
        if CLOSE**low < LEAST_RATE:
            return 0.0
        low, high, step = low - step, low, min(2 * step, 8)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle) >= TARGET else (low, middle)
    return float(CLOSE ** (low + (at(low) - TARGET) / max(at(low) - at(high), 1e-9)))


def decision_micros(count: int, few: int = 0, repeats: int = 400) -> float:
    """The median time of one choice among so many instances, or among `few` drawn from them."""
    rng = np.random.default_rng(0)
    fleet = Fleet([f"i{n}" for n in range(count)])
    for name in fleet.names:
        fleet.tell(name, Load(float(rng.integers(0, 5000)), 0.0, float(rng.integers(0, 60)), 20.0, 0.03, 1e-4, 0.05))
    ask = Ask(500, 200, 0.6, 0.1, {"i0": 300.0})
    times = []
    for turn in range(repeats):
        begun = time.perf_counter()
        rank(fleet, ask, 0.05, turn, drawn(fleet, ask, few, turn) if few else None)
        times.append(time.perf_counter() - begun)
    return float(np.median(times) * 1e6)


def decisions() -> dict[str, dict[str, float]]:
    """Microseconds of a choice by the number of instances, among all and among FEW."""
    counts = (1, 2, 4, 8, 64, 512)
    return {
        "all": {str(count): decision_micros(count) for count in counts},
        "few": {str(count): decision_micros(count, FEW) for count in counts},
    }


def lines(found: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """Capacity as a ratio to round-robin; the scenario's own policies only."""
    yield f"{'scenario':<26}{'round robin/s':>14}" + "".join(f"{name:>14}" for name in POLICIES[1:])
    for name, rates in found.items():
        base = rates.get("round_robin") or found.get(_LIKE.get(name, ""), {}).get("round_robin", math.nan)
        cells = (f"{rates[each] / base:>14.2f}" if each in rates else f"{'':>14}" for each in POLICIES[1:])
        yield f"{name:<26}{base:>14.2f}" + "".join(cells)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`slos-serve study-dispatch`."""
    parser.add_argument("--scenario", action="append", choices=list(SCENARIOS), help="default: all")
    parser.add_argument("--policy", action="append", choices=POLICIES, help="default: those of the scenario")
    parser.add_argument("--seeds", type=int, default=1, help="runs whose capacities are averaged")
    parser.add_argument("--seconds", type=float, default=60.0, help="of arrivals; 64 and 512 replicas: 10 and 4")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keeps what was found; what it has is not run again")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG of all that was found")


def search(name: str, policy: str, seed: int, seconds: float, guess: float) -> float:
    """The capacity of one scenario under one policy; the search begins near `guess`, if there is any."""
    scenario = SCENARIOS[name]
    scenario = replace(scenario, seconds=scenario.seconds or seconds)
    guess = guess or PER_REPLICA * len(scenario.sites)
    return capacity(lambda rate: attainment(scenario, policy, rate, seed), guess)


def run(args: argparse.Namespace) -> int:
    """The command."""
    kept_: dict[str, Any] = {"capacity": {}}
    if args.json and args.json.exists():
        kept_ = json.loads(args.json.read_text(encoding="utf-8"))
    runs: dict[str, dict[str, dict[str, float]]] = kept_["capacity"]
    kept_["decision_us"] = decisions()
    for seed in range(args.seeds):
        for name in args.scenario or SCENARIOS:
            for policy in args.policy or SCENARIOS[name].policies:
                seeds = runs.setdefault(name, {}).setdefault(policy, {})
                if str(seed) not in seeds:
                    guess = max((rate for other in runs[name].values() for rate in other.values()), default=0.0)
                    seeds[str(seed)] = search(name, policy, seed, args.seconds, guess)
                    print(f"{name}, {policy}, seed {seed}: {seeds[str(seed)]:.2f}/s", flush=True)
                if args.json:
                    args.json.write_text(json.dumps(kept_, indent=1) + "\n", encoding="utf-8")
    found = averaged(runs)
    print("\n".join(lines(found)))
    for among, micros in kept_["decision_us"].items():
        shown = ", ".join(f"{count}: {value:.0f}" for count, value in micros.items())
        print(f"one decision among {among}, microseconds by instances: {shown}")
    if args.plot:
        plot(found, kept_["decision_us"], args.plot)
    return 0


def averaged(runs: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Geometric means over the seeds that every policy of a scenario has."""
    found: dict[str, dict[str, float]] = {}
    for name, policies in runs.items():
        shared = set.intersection(*(set(seeds) for seeds in policies.values()))
        if shared:
            found[name] = {
                policy: math.exp(float(np.mean([math.log(seeds[seed]) for seed in shared])))
                for policy, seeds in policies.items()
            }
    return found


def plot(found: Mapping[str, Mapping[str, float]], micros: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Four panels: capacity by scenario, by number of replicas, by age of loads, and what a decision costs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), layout="constrained")
    skews, scale, ages, costs = figure.subplots(2, 2).flat
    _plot_skews(skews, {n: r for n, r in found.items() if "round_robin" in r and "replica" not in n})
    _plot_scale(scale, found)
    _plot_ages(ages, found)
    for among, values in micros.items():
        costs.loglog([int(count) for count in values], list(values.values()), "o-", label=f"among {among}")
    costs.axhline(50.0, color="grey", linestyle=":")
    costs.set(xlabel="instances", ylabel="microseconds", title="one decision")
    costs.set_ylim(bottom=1.0)
    for axis in (costs.xaxis, costs.yaxis):
        _plain_ticks(axis)
    costs.legend()
    figure.savefig(path, dpi=110)


def _plot_skews(axes: Any, found: Mapping[str, Mapping[str, float]]) -> None:
    names = list(found)
    for index, policy in enumerate(POLICIES):
        places = [place + 0.12 * (index - 3) for place, name in enumerate(names) if policy in found[name]]
        values = [found[name][policy] / found[name]["round_robin"] for name in names if policy in found[name]]
        if values and policy != "round_robin":
            # from 1 on: what is better goes up, what is worse goes down
            bars = axes.bar(places, [value - 1.0 for value in values], 0.12, bottom=1.0, label=policy)
            if policy == "ranked":
                axes.bar_label(bars, [f"{value:.2f}" if value < 10 else f"{value:.0f}" for value in values], fontsize=8)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_yscale("log")
    _plain_ticks(axes.yaxis)
    axes.set_xticks(range(len(names)), names, rotation=20, ha="right")
    axes.set(ylabel="times round-robin", title="capacity on four replicas")
    _legend(axes)


def _plot_scale(axes: Any, found: Mapping[str, Mapping[str, float]]) -> None:
    plain = [name for name in found if name.endswith(("replica", "replicas")) or name == "equal"]
    sizes = {len(SCENARIOS[name].sites): found[name] for name in plain}
    for policy in POLICIES:
        points = [(size, sizes[size][policy] / size) for size in sorted(sizes) if policy in sizes[size]]
        if len(points) > 1:
            axes.semilogx(*zip(*points, strict=True), "o-", label=policy, base=2)
            axes.set_xticks(list(sizes), [f"{size}" for size in sizes])
    axes.set(xlabel="replicas (the runs of 64 and 512 are short)", ylabel="sessions/s per replica", title="capacity")
    axes.set_ylim(bottom=0)
    _legend(axes)


def _plot_ages(axes: Any, found: Mapping[str, Mapping[str, float]]) -> None:
    for like in ("equal", "straggler"):
        names = [like, *(name for name, other in _LIKE.items() if other == like)]
        points = sorted((SCENARIOS[n].tell, found[n]["ranked"]) for n in names if "ranked" in found.get(n, {}))
        if points:
            (line,) = axes.plot(*zip(*points, strict=True), "o-", label=f"{like}, ranked")
            base = found[like].get("round_robin", math.nan)
            axes.axhline(base, color=line.get_color(), linestyle=":", label=f"{like}, round robin")
    axes.set(xlabel="seconds between two loads", ylabel="sessions/s", title="capacity with old loads")
    axes.set_ylim(bottom=0)
    _legend(axes)


def _plain_ticks(axis: Any) -> None:
    """Whole numbers on a logarithmic axis, not powers."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend(axes: Any) -> None:
    """Where there is anything to name: a study of few scenarios leaves panels empty."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
