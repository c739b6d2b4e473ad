"""Capacity: the highest rate at which a policy keeps enough of its promises, found by bisection.

Rates lie on one geometric grid, so that all policies, parameters and targets meet the same traces and
share what was played. Each replica has a planner and an engine of its own; sessions are dealt round
robin, all rounds of one to the same replica. Best-effort work is played to its end and paid for.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final, TypeAlias

import numpy as np

from slos_serve.scheduler import (
    Capabilities,
    DecodeFirst,
    EarliestDue,
    PerfModel,
    Plan,
    Planner,
    PrefillFirst,
    Published,
    Request,
    Scheduler,
)
from slos_serve.scheduler.attainment import RULES, TOLERANCE, Floats, Rule
from slos_serve.scheduler.core import RequestId
from slos_serve.scheduler.distserve import Disaggregated, Link, Replica
from slos_serve.scheduler.simulator import Outcome, SimulatedEngine, simulate

from .cells import Profile, Turn
from .settings import SETTINGS, Setting

Parameters: TypeAlias = Mapping[str, float]

STEPS_PER_DOUBLING: Final = 24  # of the grid of rates: neighbours differ by 2.9 %
FINALISTS: Final = 3  # settings of a sweep that are played whole
FINALIST_GAP: Final = 0.05  # of attainment behind the best in the rehearsal, at most
DECODE_SIDE_BUDGET: Final = 512  # tokens a batch where only what lost its memory is prefilled again
LENGTH_CLASSES: Final = 4  # quartiles of prompt plus output


@dataclass(frozen=True, slots=True)
class Policy:
    """How to make a policy's planner, and the parameters to try. Ours has one setting for all cells.

    A policy that serves with separate prefill and decode replicas has their numbers among its parameters.
    """

    make: Callable[[Capabilities, PerfModel, Parameters], Planner]
    sweep: tuple[Parameters, ...]


def group_size(parameters: Parameters) -> int:
    """GPUs that serve together under these parameters."""
    return int(parameters.get("prefill", 1) + parameters.get("decode", 0))


def ours(setting: Setting) -> Policy:
    """Our planner in one setting for all cells."""
    return Policy(lambda capabilities, perf, parameters: Scheduler(capabilities, perf, setting.config()), ({},))


def _published(capabilities: Capabilities, perf: PerfModel, parameters: Parameters) -> Planner:
    return Scheduler(capabilities, perf, policy=Published(parameters["cap"], bool(parameters["blocks"])))


def _vllm(capabilities: Capabilities, perf: PerfModel, parameters: Parameters) -> Planner:
    return Scheduler(capabilities, perf, policy=PrefillFirst(int(parameters["budget"])))


def _sarathi(capabilities: Capabilities, perf: PerfModel, parameters: Parameters) -> Planner:
    return Scheduler(capabilities, perf, policy=DecodeFirst(int(parameters["budget"])))


def _qoserve(capabilities: Capabilities, perf: PerfModel, parameters: Parameters) -> Planner:
    return Scheduler(capabilities, perf, policy=EarliestDue(parameters["alpha"], parameters["cap"]))


def _distserve(capabilities: Capabilities, perf: PerfModel, parameters: Parameters) -> Planner:
    """The prefill side: whole prompts first come first served, batched up to what saturates the GPU."""
    return Scheduler(capabilities, perf, policy=PrefillFirst(int(parameters["budget"])))


# What is best most often comes first: the better the first, the sooner the others are ruled out.
EXAMINED: Final[Mapping[str, Policy]] = {
    "slos_serve": ours(SETTINGS[""]),
    "slos_serve_paper": Policy(
        _published, tuple({"cap": cap, "blocks": blocks} for cap in (0.1, 0.06, 0.2, 0.04) for blocks in (1.0, 0.0))
    ),
    "sarathi": Policy(_sarathi, tuple({"budget": budget} for budget in (1024, 512, 256, 2048, 128, 4096))),
    "vllm": Policy(_vllm, tuple({"budget": budget} for budget in (4096, 2048, 8192))),
    "qoserve": Policy(
        _qoserve,
        tuple({"alpha": alpha, "cap": cap} for cap in (0.04, 0.06, 0.03, 0.1) for alpha in (4.0, 16.0, 1.0, 0.0)),
    ),
    "distserve": Policy(
        _distserve,
        tuple(
            {"prefill": prefill, "decode": decode, "budget": 512}
            for prefill, decode in ((1, 1), (2, 1), (1, 2), (1, 3))
        ),
    ),
}


# The baselines' own defaults, for comparisons that do not tune them.
UNTUNED: Final[Mapping[str, Parameters]] = {
    "sarathi": {"budget": 512},
    "vllm": {"budget": 2048},
    "qoserve": {"alpha": 1.0, "cap": 0.2},
}


class Stopwatch:
    """Times the call that makes a plan, in CPU seconds."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, plan: Callable[[], Plan]) -> Plan:
        started = time.thread_time()
        made = plan()
        self.seconds.append(time.thread_time() - started)
        return made


@dataclass(frozen=True, slots=True)
class Score:
    """One run in numbers: shares of all sessions that attained, by rule; CPU milliseconds of a plan after an arrival.

    `token_weighted` counts each session by its prompt and output tokens; `by_length` gives the strict share
    of each quartile of that size, shortest first; `p99_gap` is the P99 time between tokens in seconds.
    A run that was given up is not `complete`: its attainment is an upper bound and the rest is not known.
    """

    rate: float
    sessions: int
    seconds: float
    dropped: int
    attainment: Mapping[Rule, float]
    complete: bool = True
    token_weighted: float = 0.0
    by_length: tuple[float, ...] = ()
    p99_gap: float = 0.0
    preemptions: int = 0
    planner_ms: Mapping[str, float] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class Fleet:
    """What serves: `replicas` of a profile under a policy. `noise` is the sd of the lognormal iteration time.

    With `prefill` and `decode` each group of so many replicas splits the work; the policy is then the
    prefill side's, and the decode side runs all its decodes in every iteration. `acceptance` is the share of
    right guesses where the profile's engine can draft.
    """

    profile: Profile
    make: Callable[[Capabilities, PerfModel], Planner]
    replicas: int = 1
    noise: float = 0.05
    seed: int = 0
    prefill: int = 1
    decode: int = 0
    acceptance: float = 0.0

    @property
    def groups(self) -> int:
        return self.replicas // (self.prefill + self.decode)

    def engine(self, index: int) -> SimulatedEngine:
        rng = np.random.default_rng([self.seed, index])
        return SimulatedEngine(self.profile.capabilities, self.profile.perf, rng, self.noise)


class GaveUp(Exception):
    """More first tokens are late than any target allows."""


class LateFirstTokens:
    """Counts sessions whose first token is late, a miss under every rule; ends the run beyond `allowed`."""

    def __init__(self, firsts: Sequence[Turn], allowed: float) -> None:
        self._due = {t.request.id: t.request.arrived_at + t.stages[0].slo.ttft for t in firsts if t.stages[0].slo}
        self._allowed = allowed
        self._open: list[tuple[float, int]] = []
        self._seen = 0
        self.missed = 0

    def __call__(self, now: float, arrived: Sequence[Outcome], first_at: Sequence[float] | Floats) -> None:
        for serial in range(self._seen, len(arrived)):
            if (due := self._due.get(arrived[serial].request.id)) is not None:
                heapq.heappush(self._open, (due + TOLERANCE, serial))
        self._seen = len(arrived)
        while self._open and self._open[0][0] < now:
            due, serial = heapq.heappop(self._open)
            self.missed += bool(first_at[serial] > due)
        if self.missed > self._allowed:
            raise GaveUp


@dataclass(slots=True)
class Played:
    """What became of each request; how long plans took; late first tokens where the run was given up."""

    outcomes: dict[RequestId, Outcome] = field(default_factory=dict)
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    late: int | None = None


def play(fleet: Fleet, firsts: Sequence[Turn], target: float = 0.0) -> Played:
    """Every session to its end, or until so many first tokens are late that no `target` share can attain."""
    played, missed = Played(), 0
    for index in range(fleet.groups):
        share = firsts[index :: fleet.groups]
        watch = LateFirstTokens(share, (1.0 - target) * len(firsts) - missed + 1e-6)
        try:
            (_split if fleet.decode else _alone)(fleet, index, share, played, watch if target else None)
        except GaveUp:
            played.late = missed + watch.missed
            return played
        missed += watch.missed
    return played


def _alone(fleet: Fleet, index: int, share: Sequence[Turn], played: Played, watch: LateFirstTokens | None) -> None:
    """One replica serves its share of the sessions."""
    simulate(
        [turn.request for turn in share],
        {turn.request.id: turn.output_tokens for turn in share},
        fleet.make(fleet.profile.capabilities, fleet.profile.perf),
        fleet.engine(index),
        acceptance=fleet.acceptance,
        follow_up=_follower(share) if any(turn.following for turn in share) else None,
        outcomes=played.outcomes,
        watch=watch,
        timed=played.stopwatch,
    )


def _split(fleet: Fleet, index: int, share: Sequence[Turn], played: Played, watch: LateFirstTokens | None) -> None:
    """A group of prefill and decode replicas serves its share of the sessions."""
    numbers = [index * (fleet.prefill + fleet.decode) + member for member in range(fleet.prefill + fleet.decode)]
    decodes = partial(Scheduler, policy=DecodeFirst(DECODE_SIDE_BUDGET))
    prefill, decode = (
        [Replica(make(fleet.profile.capabilities, fleet.profile.perf), fleet.engine(number)) for number in side]
        for make, side in ((fleet.make, numbers[: fleet.prefill]), (decodes, numbers[fleet.prefill :]))
    )
    link = Link(fleet.profile.kv_bytes_per_token)
    group = Disaggregated(prefill, decode, link, played.outcomes, watch, _follower(share), played.stopwatch)
    group.simulate([turn.request for turn in share], {turn.request.id: turn.output_tokens for turn in share})


def _follower(share: Sequence[Turn]) -> Callable[[RequestId, float], tuple[Request, int] | None]:
    """Releases the next round of a session once the tool has answered."""
    current = {turn.request.id: turn for turn in share}

    def follow(request_id: RequestId, now: float) -> tuple[Request, int] | None:
        turn = current.pop(request_id)
        following = turn.following
        if following is None:
            return None
        current[following.request.id] = following
        return replace(following.request, arrived_at=now + turn.delay), following.output_tokens

    return follow


def rounds(turn: Turn) -> Iterator[Turn]:
    """A session's requests in order."""
    each: Turn | None = turn
    while each is not None:
        yield each
        each = each.following


def kept(turn: Turn, outcomes: Mapping[RequestId, Outcome]) -> dict[Rule, bool]:
    """Whether all requests of a session attained, under each rule, judged by the tokens each stage really had."""
    all_kept = dict.fromkeys(RULES, True)
    for each in rounds(turn):
        outcome = outcomes.get(each.request.id)
        if outcome is None or len(outcome.token_times) < each.output_tokens:
            return dict.fromkeys(RULES, False)
        times = np.array(outcome.token_times)
        case = (each.stages, [stage.max_new_tokens for stage in each.stages], outcome.request.arrived_at, times)
        for name in RULES:
            all_kept[name] = all_kept[name] and RULES[name](*case)
    return all_kept


def score(firsts: Sequence[Turn], played: Played, **about: Any) -> Score:
    """Judge a run: a session attains when all of its requests do. Raises ValueError without sessions.

    Of a run that was given up only an upper bound of the attainment is known.
    """
    if not firsts:
        raise ValueError("no session fits the KV memory of this profile: nothing to judge")
    if played.late is not None:
        bound = dict.fromkeys(RULES, 1.0 - played.late / len(firsts))
        return Score(sessions=len(firsts), attainment=bound, complete=False, **about)
    outcomes, planning = played.outcomes, played.stopwatch.seconds
    verdicts = [kept(turn, outcomes) for turn in firsts]
    kept_by = {name: np.array([verdict[name] for verdict in verdicts]) for name in RULES}
    sizes = np.array([sum(t.request.prompt_tokens + t.output_tokens for t in rounds(turn)) for turn in firsts])
    order = np.argsort(sizes, kind="stable")
    gaps = np.concatenate([np.diff(outcome.token_times) for outcome in outcomes.values()])
    strict = kept_by["strict"]
    return Score(
        sessions=len(firsts),
        attainment={name: float(values.mean()) for name, values in kept_by.items()},
        token_weighted=float((strict * sizes).sum() / sizes.sum()),
        by_length=tuple(float(strict[part].mean()) for part in np.array_split(order, LENGTH_CLASSES) if part.size),
        p99_gap=float(np.percentile(gaps, 99)) if gaps.size else 0.0,
        preemptions=sum(outcome.preemptions for outcome in outcomes.values()),
        planner_ms={
            "median": float(np.median(planning)) * 1000,
            "p99": float(np.percentile(planning, 99)) * 1000,
            "calls": len(planning),
        },
        **about,
    )


def rate_at(step: float) -> float:
    """Sessions per second at a point of the grid."""
    return float(2.0 ** (step / STEPS_PER_DOUBLING))


@dataclass(slots=True)
class Search:
    """Capacities of one policy in one cell.

    `evaluate(parameters, step)` plays one point of the grid and `rehearse` a short version of it, which is only
    used to find where to start and which parameters are worth the whole play.
    """

    sweep: Sequence[Parameters]
    evaluate: Callable[[Parameters, int], Score]
    start: int
    rehearse: Callable[[Parameters, int], Score] | None = None
    span: int = 10 * STEPS_PER_DOUBLING  # a factor of 1000 below `start` counts as no capacity
    finalists: list[int] = field(default_factory=list)
    _played: dict[tuple[int, int], Score] = field(default_factory=dict)

    def capacity(self, rule: Rule, target: float) -> tuple[int, int] | None:
        """The best (index into the sweep, step) with at least `target` attained under `rule`; None: nowhere."""
        self.finalists = list(range(len(self.sweep)))
        if self.rehearse is not None:
            self._rehearsal(self.rehearse, rule, target)
        best: tuple[int, int] | None = None
        for index in self.finalists:
            if best is not None and not self._passes(index, best[1] + 1, rule, target):
                continue
            step = self._highest(index, self.start if best is None else best[1] + 1, rule, target)
            if step is not None:
                best = index, step
        return best

    def read(self, rule: Rule, target: float, width: int = 8) -> tuple[int, float] | None:
        """The better (index, step) of the first two finalists by interpolation between points that are played.

        Attainment is taken as linear between two points of the curve that are at most `width` steps apart.
        """
        found = [(self._crossing(index, rule, target, width), index) for index in self.finalists[:2]]
        steps = [(step, -index) for step, index in found if step is not None]
        return (-max(steps)[1], max(steps)[0]) if steps else None

    def played(self, index: int, step: int) -> Score:
        if (index, step) not in self._played:
            self._played[index, step] = self.evaluate(self.sweep[index], step)
        return self._played[index, step]

    def curve(self) -> Iterator[tuple[Parameters, Score]]:
        """Everything played, by parameters and rate."""
        for (index, _), result in sorted(self._played.items(), key=lambda item: item[0]):
            yield self.sweep[index], result

    def _passes(self, index: int, step: int, rule: Rule, target: float) -> bool:
        return self.played(index, step).attainment[rule] >= target

    def _rehearsal(self, rehearse: Callable[[Parameters, int], Score], rule: Rule, target: float) -> None:
        """Search on short plays and a coarse grid; leaves the start and the best few parameters behind."""
        stride = 4
        coarse = Search(self.sweep, lambda parameters, step: rehearse(parameters, step * stride), self.start // stride)
        best = coarse.capacity(rule, target)
        if best is None:
            return
        self.start = best[1] * stride
        near = {index: coarse.played(index, best[1] + 1).attainment[rule] for index in range(len(self.sweep))}
        ranked = sorted((index for index in near if index != best[0]), key=lambda index: -near[index])
        close = [index for index in ranked if near[index] >= target - FINALIST_GAP]
        self.finalists = [best[0], *close[: FINALISTS - 1]]

    def _highest(self, index: int, start: int, rule: Rule, target: float) -> int | None:
        """Gallop from `start` until the edge is between two steps, then bisect."""
        low = high = start
        stride = 4
        if self._passes(index, start, rule, target):
            while self._passes(index, high := low + stride, rule, target):
                low, stride = high, 2 * stride
        else:
            while not self._passes(index, low := high - stride, rule, target):
                if start - low > self.span:
                    return None
                high, stride = low, 2 * stride
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._passes(index, middle, rule, target) else (low, middle)
        return low

    def _crossing(self, index: int, rule: Rule, target: float, width: int) -> float | None:
        """Where the curve of one setting falls below the target, in steps of the grid."""
        known = sorted(step for which, step in self._played if which == index)
        low = max((step for step in known if self._passes(index, step, rule, target)), default=None)
        if low is None:
            low = self._downhill(index, known[0] if known else self.start, rule, target)
        if low is None:
            return None
        high = min((step for step in known if step > low), default=None)
        if high is None:
            high = low + width
            while self._passes(index, high, rule, target):
                low, high = high, high + width
        while high - low > (width if self.played(index, high).complete else 1):
            middle = (low + high) // 2
            low, high = (middle, high) if self._passes(index, middle, rule, target) else (low, middle)
        above, below = (self.played(index, step).attainment[rule] for step in (low, high))
        return low + (high - low) * (above - target) / (above - below) if high - low > 1 else low

    def _downhill(self, index: int, start: int, rule: Rule, target: float) -> int | None:
        step, stride = start, 8
        while not self._passes(index, step := step - stride, rule, target):
            if start - step > self.span:
                return None
            stride = 2 * stride
        return step
