"""What one cell of the exam is: who asks for what and when, on which hardware, under which SLOs.

A cell's requests depend on its `Load`, its profile, the rate and nothing else, so every policy meets the
same trace. Rates vary by thinning and superposing, recorded traces and drawn ones alike; time is never
rescaled. Output lengths are hidden from the planner: all it is told is a limit no output reaches. The
tokens of a thinking stage are told, but only the moment it ends is used. Every round of a session computes
its whole prompt unless prefixes are reused: then what a round repeats of those before it has its KV already,
as far as free memory goes when it comes. Its SLO stays that of the whole prompt.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import numpy as np

from slos_serve.scheduler import BatchShape, Capabilities, PerfModel, Piece, Request, Slo, Stage

from . import traces
from .trace_file import read_trace, rows
from .workload import WORKLOADS, Arrival, Rng, Times, onoff_bursts, poisson, representative

BLOCK_TOKENS: Final = 16
OUTPUT_LIMIT: Final = 32768  # what every request asks for at most; the longest shipped output is shorter
MAX_DRAFT: Final = 4
DRAFT_SECONDS: Final = 0.0015  # a step of a draft model of about 125 M parameters, assumed
BURST_FACTOR: Final = 5.0
BURST_SHARE: Final = 0.15  # of the time
MIN_BURSTS: Final = 5  # in every run


# Hardware


@dataclass(frozen=True, slots=True)
class Profile:
    """One GPU with one model on it: seconds per iteration (the host's time included) and KV memory in tokens.

    `draft_seconds`: a step of the draft model that guesses, where one does.
    """

    name: str
    perf: PerfModel
    kv_capacity_tokens: int
    kv_bytes_per_token: int
    capabilities: Capabilities
    source: str
    licence: str
    draft_seconds: float = DRAFT_SECONDS

    def prefill_seconds(self, tokens: int) -> float:
        """Zero-load time of a prompt of `tokens`, in batches as large as the engine takes."""
        most = self.capabilities.max_batch_tokens
        total = 0.0
        for past in range(0, tokens, most):
            chunk = min(most, tokens - past)
            total += self.perf.seconds(BatchShape(chunk, prefill_area=chunk * (past + 0.5 * chunk)))
        return total

    def drafting(self) -> Profile:
        """The same with a small draft model: up to `MAX_DRAFT` guesses, `draft_seconds` for each step of it."""
        pieces = tuple(replace(piece, per_step=self.draft_seconds) for piece in self.perf.pieces)
        capabilities = replace(self.capabilities, max_draft=MAX_DRAFT)
        return replace(self, perf=replace(self.perf, pieces=pieces), capabilities=capabilities)

    @property
    def iteration_seconds(self) -> float:
        """The shortest iteration there is: one token, no context."""
        return self.perf.seconds(BatchShape(1))


def profiles() -> list[str]:
    """Names of the shipped profiles."""
    folder = files("slos_serve.scheduler").joinpath("profiles")
    return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))


def _without_attention(profile: Profile) -> Profile:
    """Time as the paper models it."""
    return replace(profile, perf=replace(profile.perf, per_context=0.0, per_area=0.0))


def _twice_the_memory(profile: Profile) -> Profile:
    capabilities = replace(profile.capabilities, num_blocks=2 * profile.capabilities.num_blocks)
    return replace(profile, kv_capacity_tokens=2 * profile.kv_capacity_tokens, capabilities=capabilities)


def _guesses_for_nothing(profile: Profile) -> Profile:
    return replace(profile, draft_seconds=0.0)


# What a profile's name may end in: a world that differs in one thing, to see what that is worth.
WORLDS: Final[Mapping[str, Callable[[Profile], Profile]]] = {
    "-linear": _without_attention,
    "-double-kv": _twice_the_memory,
    "-free-drafts": _guesses_for_nothing,
}


@cache
def load_profile(name: str) -> Profile:
    """A shipped profile, its name followed by one of `WORLDS` or not. Raises ValueError listing the known names."""
    for suffix, changed in WORLDS.items():
        if name.endswith(suffix):
            return replace(changed(load_profile(name.removesuffix(suffix))), name=name)
    known("profile", name, profiles())
    data = json.loads(files("slos_serve.scheduler").joinpath("profiles", f"{name}.json").read_text())
    return _profile(data)


def _profile(data: Mapping[str, Any]) -> Profile:
    kernels = PerfModel.from_json(data["time_model"])
    host = float(data["host_seconds"])
    pieces = tuple(Piece(p.base + host, p.per_token, p.per_step) for p in kernels.pieces)
    capacity = int(data["kv_capacity_tokens"])
    capabilities = Capabilities(
        num_blocks=capacity // BLOCK_TOKENS,
        block_tokens=BLOCK_TOKENS,
        max_batch_tokens=int(data["max_batch_tokens"]),
        max_batch_requests=int(data["max_batch_requests"]),
        max_context=capacity,
    )
    return Profile(
        name=data["name"],
        perf=replace(kernels, pieces=pieces),
        kv_capacity_tokens=capacity,
        kv_bytes_per_token=int(data["kv_bytes_per_token"]),
        capabilities=capabilities,
        source=data["source"],
        licence=data["licence"],
    )


def known(what: str, name: str, names: Iterable[str]) -> None:
    """Raises ValueError naming the known ones unless `name` is one of them."""
    if name not in (names := sorted(names)):
        raise ValueError(f"unknown {what} {name!r}; known: {', '.join(names)}")


# SLOs


@dataclass(frozen=True, slots=True)
class Target:
    """A class's SLO: TTFT as a multiple of the zero-load prefill time (`factor`) or in `seconds`, TPOT in seconds.

    `answer_tpot` paces the answer after the thinking, or the last round of a session, where it differs.
    """

    factor: float | None
    tpot: float
    answer_tpot: float | None = None
    seconds: float | None = None

    def ttft(self, profile: Profile, prompt_tokens: int, floor: float) -> float:
        asked = self.seconds if self.factor is None else self.factor * profile.prefill_seconds(prompt_tokens)
        assert asked is not None
        return max(asked, floor)


TARGETS: Final[Mapping[str, Target]] = {
    "chatbot": Target(5, 0.100),
    "coding": Target(5, 0.050),
    "summarization": Target(3, 0.100),
    "tool_calling": Target(3, 0.050, 0.100),
    "reasoning": Target(3, 0.050, 0.100),
}


def parse_targets(texts: Sequence[str]) -> dict[str, Target]:
    """The targets with those of `CLASS=TTFT/TPOT[/ANSWER_TPOT]` in their place; milliseconds, or TTFT as `5x`.

    Raises ValueError naming the text and what is wrong with it.
    """
    targets = dict(TARGETS)
    for text in texts:
        name, _, numbers = text.partition("=")
        parts = numbers.split("/")
        try:
            values = [float(part.removesuffix("x")) for part in parts]
        except ValueError:
            values = []
        if not name or len(values) not in (2, 3) or not all(math.isfinite(v) and v > 0 for v in values):
            raise ValueError(f"--slo: must be CLASS=TTFT/TPOT[/ANSWER_TPOT] in ms (TTFT also as 5x), got {text!r}")
        relative = parts[0].endswith("x")
        targets[name] = Target(
            factor=values[0] if relative else None,
            tpot=values[1] / 1000,
            answer_tpot=values[2] / 1000 if len(values) == 3 else None,
            seconds=None if relative else values[0] / 1000,
        )
    return targets


def check_targets(targets: Mapping[str, Target], profile: Profile) -> None:
    """Raises ValueError for an SLO that no request could ever meet: shorter than one iteration."""
    shortest = profile.iteration_seconds
    for name, target in targets.items():
        pairs = (("TTFT", target.seconds), ("TPOT", target.tpot), ("answer TPOT", target.answer_tpot))
        for field, seconds in pairs:
            if seconds is not None and seconds < shortest:
                raise ValueError(
                    f"class {name}: {field}: {seconds * 1000:g} ms is impossible: one iteration on {profile.name} "
                    f"takes {shortest * 1000:.1f} ms"
                )
        if target.factor is not None and target.factor < 1:
            raise ValueError(f"class {name}: TTFT: {target.factor:g}x of the zero-load prefill time is impossible")


# Arrivals


@dataclass(frozen=True, slots=True)
class Load:
    """Who asks and when: a workload's name with arrivals' name, or a `trace` file, whose arrivals are its own.

    At least `min_requests` sessions, ten mean lifetimes and `MIN_BURSTS` bursts; a burst period is in seconds.
    """

    workload: str
    arrivals: str = "poisson"
    trace: Path | None = None
    min_requests: int = 600
    burst_period: float = 60.0


def _bursts(rng: Rng, rate: float, seconds: float, load: Load) -> Times:
    """During a burst requests come `BURST_FACTOR` times as fast as between bursts; `rate` is the mean."""
    over_mean = BURST_FACTOR / (1 + (BURST_FACTOR - 1) * BURST_SHARE)
    return onoff_bursts(rng, rate, seconds, over_mean, BURST_SHARE, load.burst_period)


PROCESSES: Final[Mapping[str, Callable[[Rng, float, float, Load], Times]]] = {
    "poisson": lambda rng, rate, seconds, load: poisson(rng, rate, seconds),
    "bursts": _bursts,
}
RECORDED: Final = ("azure_code", "azure_chat")
ARRIVALS: Final = (*PROCESSES, *RECORDED)


@cache
def _trace(path: Path, default_class: str = "chatbot") -> tuple[Arrival, ...]:
    return tuple(read_trace(path, default_class))


def horizon(load: Load, lifetime: float, rate: float, share: float = 1.0) -> float:
    """Seconds of arrivals to draw where sessions last `lifetime` seconds and about `rate` come per second.

    `share` of that for a rehearsal, whole bursts all the same.
    """
    seconds = share * max(10.0 * lifetime, load.min_requests / rate)
    if load.arrivals == "bursts":
        seconds = max(math.ceil(seconds / load.burst_period), round(share * MIN_BURSTS)) * load.burst_period
    return seconds


@lru_cache(maxsize=8)
def _layer(load: Load, top: float, seconds: float, seed: int, layer: int) -> list[list[Arrival]]:
    """Sessions at `top` per second, in random order: any first part of them is the same process, thinned."""
    rng = np.random.default_rng([seed, layer])
    times = representative(rng, lambda rng: PROCESSES[load.arrivals](rng, top, seconds, load), top * seconds)
    sessions = by_session(WORKLOADS[load.workload](rng, times))
    return [sessions[i] for i in rng.permutation(len(sessions)).tolist()]


def by_session(arrivals: Sequence[Arrival]) -> list[list[Arrival]]:
    """The rounds of each session together, sessions in order of arrival."""
    sessions: dict[str, list[Arrival]] = {}
    for index, arrival in enumerate(arrivals):
        sessions.setdefault(arrival.session or f"alone-{index}", []).append(arrival)
    return list(sessions.values())


def draw(load: Load, rate: float, top: float, seconds: float, seed: int) -> list[Arrival]:
    """The arrivals at `rate` sessions per second: `top` per second thinned, or superposed where that is not enough.

    Equal for equal arguments, and nested: a higher rate has all sessions of a lower one, and more.
    """
    if load.trace is not None:
        return resampled(np.random.default_rng(seed), _trace(load.trace), rate, seconds)
    if load.arrivals in RECORDED:
        recorded = WORKLOADS[load.workload](np.random.default_rng(seed), traces.arrival_times(load.arrivals))
        return resampled(np.random.default_rng(seed), recorded, rate, seconds)
    whole, rest = divmod(rate / top, 1.0)
    drawn: list[Arrival] = []
    for layer in range(int(whole) + 1):
        sessions = _layer(load, top, seconds, seed, layer)
        kept = len(sessions) if layer < int(whole) else round(rest * len(sessions))
        for rounds in sessions[:kept]:
            drawn += [replace(each, session=each.session and f"{layer}-{each.session}") for each in rounds]
    return sorted(drawn, key=lambda arrival: (arrival.at, arrival.session or "", arrival.round))


def resampled(rng: Rng, arrivals: Sequence[Arrival], rate: float, seconds: float) -> list[Arrival]:
    """A recorded trace at `rate` sessions per second for `seconds`: rotated whole copies, and one thinned.

    A session's rounds stay together. A trace shorter than `seconds` is repeated.
    """
    groups = by_session(arrivals)
    starts = np.array([rounds[0].at for rounds in groups])
    if len(groups) < 2 or starts[-1] <= starts[0]:
        raise ValueError(f"a trace needs two sessions at different times, got {len(groups)}")
    span = float(starts[-1] - starts[0]) * len(groups) / (len(groups) - 1)
    copies, rest = divmod(rate * span / len(groups), 1.0)
    drawn: list[Arrival] = []
    for copy in range(int(copies) + 1):
        keep = rng.random(len(groups)) < (1.0 if copy < int(copies) else rest)
        shift = rng.uniform(0.0, span)
        for lap in range(math.ceil(seconds / span)):
            times = (starts - starts[0] - shift) % span + lap * span
            for index in np.flatnonzero(keep & (times < seconds)).tolist():
                name = f"{copy}-{lap}-{index}"
                drawn += [replace(each, at=float(times[index]), session=name) for each in groups[index]]
    return sorted(drawn, key=lambda arrival: (arrival.at, arrival.session or "", arrival.round))


# Requests


@dataclass(frozen=True, slots=True)
class Turn:
    """One request as the planner sees it, and what it does not see: its real length and what follows it.

    `stages` hold the tokens really produced and judge the outcome; `unit` numbers the session it belongs to.
    """

    request: Request
    output_tokens: int
    stages: tuple[Stage, ...]
    unit: int
    following: Turn | None = None
    delay: float = 0.0


def turns(
    arrivals: Sequence[Arrival],
    profile: Profile,
    targets: Mapping[str, Target],
    floor: float,
    *,
    told: bool = False,
    reuse: bool = False,
) -> tuple[list[Turn], int]:
    """The first round of each session, later ones linked to it; and how many sessions were left out.

    With `told` each request says how long its output will be, with `reuse` how much of its prompt is cached.

    Left out are those with a round that alone exceeds the KV memory. Raises ValueError for an unknown class.
    """
    sessions = by_session(arrivals)
    fitting = [rounds for rounds in sessions if all(_fits(each, profile) for each in rounds)]
    firsts = [_linked(rounds, unit, profile, targets, floor, told, reuse) for unit, rounds in enumerate(fitting)]
    return firsts, len(sessions) - len(fitting)


def _fits(arrival: Arrival, profile: Profile) -> bool:
    return arrival.prompt_tokens + arrival.output_tokens < profile.kv_capacity_tokens


def check_trace(path: Path, profile: Profile, targets: Mapping[str, Target], default_class: str = "chatbot") -> None:
    """Raises ValueError naming file, line and field of the first row that this cell can never serve."""
    for (line, _), arrival in zip(rows(path), _trace(path, default_class), strict=True):
        if arrival.slo_class not in targets:
            names = ", ".join(sorted(targets))
            raise ValueError(f"{path}, line {line}: slo_class: unknown class {arrival.slo_class!r}; known: {names}")
        if not _fits(arrival, profile):
            raise ValueError(
                f"{path}, line {line}: prompt_tokens: {arrival.prompt_tokens} and {arrival.output_tokens} output "
                f"tokens do not fit the KV memory of {profile.name}: {profile.kv_capacity_tokens} tokens"
            )


def _linked(
    rounds: Sequence[Arrival],
    unit: int,
    profile: Profile,
    targets: Mapping[str, Target],
    floor: float,
    told: bool,
    reuse: bool,
) -> Turn:
    turn: Turn | None = None
    delay = 0.0
    for index in range(len(rounds) - 1, -1, -1):
        arrival = rounds[index]
        known("class", arrival.slo_class, targets)
        target = targets[arrival.slo_class]
        ttft = target.ttft(profile, arrival.prompt_tokens, floor)
        last = index == len(rounds) - 1
        stages = _stages(arrival, target, ttft, alone=len(rounds) == 1, last=last)
        hidden = (*stages[:-1], replace(stages[-1], max_new_tokens=max(OUTPUT_LIMIT, stages[-1].max_new_tokens)))
        request = Request(
            f"{unit}.{index}",
            arrival.at,
            arrival.prompt_tokens,
            hidden,
            slo_class=arrival.slo_class,
            session=None if len(rounds) == 1 else str(unit),
            expected_new_tokens=float(arrival.output_tokens) if told else None,
            cached_tokens=min(arrival.reusable_prefix_tokens, arrival.prompt_tokens - 1) if reuse else 0,
        )
        turn = Turn(request, arrival.output_tokens, stages, unit, turn, delay)
        delay = arrival.tool_delay
    assert turn is not None
    return turn


def _stages(arrival: Arrival, target: Target, ttft: float, *, alone: bool, last: bool) -> tuple[Stage, ...]:
    answer_tpot = target.answer_tpot or target.tpot
    thinking, answer = arrival.thinking_tokens, arrival.output_tokens - arrival.thinking_tokens
    if thinking and answer:
        return Stage(thinking, Slo(ttft, target.tpot)), Stage(answer, Slo(ttft, answer_tpot))
    ends_session = last and not (alone and thinking)
    return (Stage(arrival.output_tokens, Slo(ttft, answer_tpot if ends_session else target.tpot)),)


def lifetime(turn: Turn) -> float:
    """Seconds a session may take at most when every promise is kept."""
    total, each = 0.0, turn
    while True:
        slo = each.stages[0].slo
        total += slo.ttft if slo else 0.0
        total += sum(stage.max_new_tokens * stage.slo.tpot for stage in each.stages if stage.slo)
        total += each.delay
        if each.following is None:
            return total
        each = each.following


def cost(turn: Turn, profile: Profile) -> float:
    """GPU seconds a session takes in large batches: the slope of the time model, no fixed cost."""
    per_token = max(piece.per_token for piece in profile.perf.pieces)
    total, each = 0.0, turn
    while True:
        prompt, output = each.request.prompt_tokens, each.output_tokens
        total += per_token * (prompt + output) + profile.perf.per_area * 0.5 * prompt**2
        total += profile.perf.per_context * output * (prompt + 0.5 * output)
        if each.following is None:
            return total
        each = each.following
