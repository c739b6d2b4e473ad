"""`slos-serve study-dispatch`: which way of choosing an instance keeps most promises, in virtual time.

Every instance is the real planner on a simulated engine, and the ranking is the router's own. A request goes to
one instance, may be declined there at its first plan, and goes on to the next with its arrival time as it was.

    round_robin   each instance in turn                          sticky   a session's home, others in turn
    least_tokens  the fewest outstanding tokens, known exactly   hops     in turn, following declines (the paper)
    ranked        the router: best by load, following declines

Prints the sessions per second at which 90 % of the sessions attain, as ratios to round-robin in the same scenario.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from slos_serve.scheduler import PerfModel, Piece, Plan, Request, Scheduler, StepReport, timemodel
from slos_serve.scheduler.core import Advances, Chunks
from slos_serve.scheduler.dispatch import Ask, Fleet, Load, home, load_of, predict, rank
from slos_serve.scheduler.simulator import Outcome, SimulatedEngine

from .capacity import kept
from .cells import TARGETS, Profile, Turn, draw, load_profile, turns
from .cells import Load as Arrivals

TARGET: Final = 0.9
TELL_SECONDS: Final = 0.1
PRIOR_OUTPUT: Final = 200.0  # tokens that a dispatcher expects of a request it knows nothing of
MAX_HOPS: Final = 3
POLICIES: Final = ("round_robin", "sticky", "least_tokens", "hops", "ranked")


@dataclass(slots=True)
class _Live:
    """A request at an instance."""

    turn: Turn
    request: Request
    tokens: int = 0
    is_settled: bool = False


class Site:
    """One instance: planner, engine, what is there, and what its cache holds of sessions."""

    def __init__(self, name: str, profile: Profile, slowdown: float, seed: int) -> None:
        self.name = name
        self.planner = Scheduler(profile.capabilities, profile.perf)
        rng = np.random.default_rng(seed)
        self.engine = SimulatedEngine(profile.capabilities, slower(profile.perf, slowdown), rng, 0.05)
        self.live: dict[str, _Live] = {}
        self.cached: dict[str, int] = {}
        self.is_busy = False

    def take(self, turn: Turn, now: float) -> None:
        request, session = turn.request, turn.request.session
        known = self.cached.get(session, 0) if session else 0
        block = self.planner.capabilities.block_tokens
        held = min(known, request.prompt_tokens - 1) // block * block
        held = held if held // block < self.planner.free_blocks else 0
        request = replace(request, cached_tokens=held)
        self.live[request.id] = _Live(turn, request)
        self.engine.add(request, turn.output_tokens)
        self.planner.add(request, now)

    def drop(self, request_id: str) -> Turn:
        self.planner.cancel(request_id)
        self.engine.release(request_id)
        return self.live.pop(request_id).turn

    def load(self) -> Load:
        queued = context = 0
        tightest = math.inf
        for each in self.live.values():
            stage = each.request.stages[0]
            if each.tokens:
                context += each.request.prompt_tokens + each.tokens
            else:
                queued += each.request.prompt_tokens - each.request.cached_tokens
            tightest = min(tightest, stage.slo.tpot if stage.slo else math.inf)
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
        return sum(
            max(PRIOR_OUTPUT - each.tokens, 1.0) + (0.0 if each.tokens else each.request.prompt_tokens)
            for each in self.live.values()
        )


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
    tell: float = TELL_SECONDS
    routers: int = 1
    seconds: float = 60.0


def same(count: int, profile: str = "a100-llama-3-8b") -> tuple[tuple[str, float], ...]:
    return ((profile, 1.0),) * count


SCENARIOS: Final[Mapping[str, Scenario]] = {
    "equal": Scenario(same(4)),
    "bursts": Scenario(same(4), arrivals="bursts"),
    "sessions": Scenario(same(4), workload="tool_calling"),
    "straggler": Scenario((*same(3), ("a100-llama-3-8b", 2.0))),
    "mixed GPUs": Scenario((*same(2), *same(2, "h100-llama-3-8b"))),
    "loads 1 s old": Scenario(same(4), tell=1.0),
    "4 routers": Scenario(same(4), routers=4),
}


@dataclass(slots=True)
class Router:
    """One router's own knowledge."""

    fleet: Fleet
    told_at: np.ndarray[Any, Any]
    homes: dict[str, int] = field(default_factory=dict)
    turn: int = 0


class Service:
    """All instances and routers of one run."""

    def __init__(self, scenario: Scenario, policy: str, seed: int) -> None:
        self.sites = [
            Site(f"i{n}", load_profile(name), slowdown, seed + n) for n, (name, slowdown) in enumerate(scenario.sites)
        ]
        self.policy = policy
        self.tell_every = scenario.tell
        names = [site.name for site in self.sites]
        self.routers = [Router(Fleet(names), np.zeros(len(names)), turn=n) for n in range(scenario.routers)]
        self.outcomes: dict[str, Outcome] = {}
        self.declined: dict[str, list[int]] = {}
        self.expected: dict[str, tuple[float, float, Router]] = {}
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = itertools.count()
        self._rng = np.random.default_rng(seed)

    def at(self, when: float, act: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), act))

    def run(self, firsts: Sequence[Turn], until: float) -> dict[str, Outcome]:
        """Until every session has ended, or `until`."""
        for turn in firsts:
            self.at(turn.request.arrived_at, lambda now, turn=turn: self.arrive(turn, now))  # type: ignore[misc]
        for router in self.routers:
            self.tell(router, 0.0)
        while self._events and self._events[0][0] <= until:
            now, _, act = heapq.heappop(self._events)
            act(now)
            if not any(site.live for site in self.sites) and len(self._events) <= len(self.routers):
                break
        return self.outcomes

    def tell(self, router: Router, now: float) -> None:
        for number, site in enumerate(self.sites):
            router.fleet.tell(site.name, site.load())
            router.told_at[number] = now
        self.at(now + self.tell_every, lambda later: self.tell(router, later))

    def arrive(self, turn: Turn, now: float) -> None:
        self.outcomes[turn.request.id] = Outcome(turn.request)
        self.declined[turn.request.id] = []
        self.dispatch(turn, now)

    def dispatch(self, turn: Turn, now: float) -> None:
        number = self.choose(turn, now)
        self.sites[number].take(turn, now)
        self.wake(number, now)

    def choose(self, turn: Turn, now: float) -> int:
        router = self.routers[int(self._rng.integers(len(self.routers)))]
        session, before = turn.request.session, self.declined[turn.request.id]
        count = len(self.sites)
        if self.policy == "ranked":
            return self.ranked(router, turn, now)
        if self.policy == "least_tokens":
            return min(range(count), key=lambda n: self.sites[n].outstanding())
        if self.policy == "sticky" and session is not None:
            return int((home(session, router.fleet.names) or "i0")[1:])
        if before:
            return (before[-1] + 1) % count
        router.turn += 1
        return router.turn % count

    def ranked(self, router: Router, turn: Turn, now: float) -> int:
        request, before = turn.request, self.declined[turn.request.id]
        slo = request.stages[0].slo
        assert slo is not None
        cached = None
        if request.session is not None and request.session in router.homes:
            number = router.homes[request.session]
            cached = {self.sites[number].name: float(self.sites[number].cached.get(request.session, 0))}
        left = max(request.arrived_at + slo.ttft - now, 1e-3)
        ask = Ask(request.prompt_tokens, PRIOR_OUTPUT, left, slo.tpot, cached)
        router.turn += 1
        order = [n for n in rank(router.fleet, ask, now - router.told_at, router.turn).tolist() if n not in before]
        if not order or len(before) >= MAX_HOPS:
            order = rank(router.fleet, replace(ask, ttft=math.inf, tpot=math.inf), now - router.told_at).tolist()
        expected = float(predict(router.fleet, ask, now - router.told_at)[order[0]])
        self.expected[request.id] = (now, expected, router)
        router.fleet.sent(self.sites[order[0]].name, ask)
        if request.session is not None:
            router.homes[request.session] = order[0]
        return int(order[0])

    def wake(self, number: int, now: float) -> None:
        if not self.sites[number].is_busy:
            self.step(number, now)

    def step(self, number: int, now: float) -> None:
        site = self.sites[number]
        site.is_busy = False
        if not site.live:
            return
        plan = site.planner.plan(now)
        gone = [each.request_id for each in plan.decisions if self.declines(site, each.request_id, each.admitted)]
        is_idle = not plan.chunks and not plan.evicted
        turns_ = [site.drop(name) for name in gone]
        if gone:
            plan = without(plan, set(gone))
        if is_idle:
            if site.live:
                self.at(min(plan.wake_at, now + 0.05), lambda later: self.wake(number, later))
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
        most = min(MAX_HOPS, len(self.sites)) if self.policy == "ranked" else len(self.sites) - 1
        may = self.policy in ("ranked", "hops") and len(self.declined[request_id]) < most
        return may and not admitted and not each.tokens

    def ended(self, number: int, report: StepReport, now: float) -> None:
        site = self.sites[number]
        # Counted again: a request with a cached prefix may have come while the step ran.
        site.planner.report(replace(report, free_blocks=site.engine.free_blocks))
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
        if turn.request.session is not None:
            site.cached[turn.request.session] = turn.request.prompt_tokens + turn.output_tokens
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
    drawn = draw(arrivals, rate, rate, scenario.seconds, seed)
    firsts, _ = turns(drawn, load_profile(scenario.sites[0][0]), TARGETS, 0.25)
    outcomes = Service(scenario, policy, seed).run(firsts, 4 * scenario.seconds)
    return sum(kept(turn, outcomes)["strict"] for turn in firsts) / max(len(firsts), 1)


def capacity(scenario: Scenario, policy: str, low: float, high: float, seed: int, tries: int = 8) -> float:
    """The highest rate found by bisection (logarithmic) at which TARGET of the sessions attain."""
    for _ in range(tries):
        middle = math.sqrt(low * high)
        if attainment(scenario, policy, middle, seed) >= TARGET:
            low = middle
        else:
            high = middle
    return low


def decision_micros(count: int, repeats: int = 300) -> float:
    """The median time of one ranking over so many instances."""
    rng = np.random.default_rng(0)
    fleet = Fleet([f"i{n}" for n in range(count)])
    for name in fleet.names:
        fleet.tell(name, Load(float(rng.integers(0, 5000)), 0.0, float(rng.integers(0, 60)), 20.0, 0.03, 1e-4, 0.05))
    ages, ask = np.full(count, 0.05), Ask(500, 200, 0.6, 0.1)
    times = []
    for turn in range(repeats):
        begun = time.perf_counter()
        rank(fleet, ask, ages, turn)
        times.append(time.perf_counter() - begun)
    return float(np.median(times) * 1e6)


def lines(found: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """Capacity as a ratio to round-robin."""
    yield f"{'scenario':<16}{'round robin/s':>14}" + "".join(f"{name:>14}" for name in POLICIES[1:])
    for name, rates in found.items():
        base = rates["round_robin"]
        yield f"{name:<16}{base:>14.2f}" + "".join(f"{rates[each] / base:>14.2f}" for each in POLICIES[1:])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`slos-serve study-dispatch`."""
    parser.add_argument("--scenario", action="append", choices=list(SCENARIOS), help="default: all")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60.0, help="virtual seconds of arrivals")
    parser.add_argument("--low", type=float, default=1.0, help="sessions per second where the search begins")
    parser.add_argument("--high", type=float, default=80.0)
    parser.add_argument("--json", type=Path, metavar="FILE")


def run(args: argparse.Namespace) -> int:
    """The command."""
    found: dict[str, dict[str, float]] = {}
    for name in args.scenario or SCENARIOS:
        scenario = replace(SCENARIOS[name], seconds=args.seconds)
        found[name] = {}
        for policy in POLICIES:
            rates = [capacity(scenario, policy, args.low, args.high, seed) for seed in range(args.seeds)]
            found[name][policy] = math.exp(float(np.mean(np.log(rates))))
            print(f"{name}, {policy}: {found[name][policy]:.2f}/s", flush=True)
    micros = {count: decision_micros(count) for count in (1, 2, 4, 8, 64, 512)}
    print("\n".join(lines(found)))
    print("one decision, microseconds: " + ", ".join(f"{count}: {value:.0f}" for count, value in micros.items()))
    if args.json:
        args.json.write_text(json.dumps({"capacity": found, "decision_us": micros}, indent=1) + "\n", encoding="utf-8")
    return 0
