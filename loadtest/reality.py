"""`slos-serve reality`: is what the simulator predicts what the server does?

    slos-serve reality                     profile, serve at three loads, simulate the same arrivals, compare
    slos-serve reality --recording FILE    compare a run that a server with `--record` wrote

Live and simulated are judged alike, by the engine's clock: from a request's arrival at the planner's side to
the end of the iteration that made a token. The simulation is given the recorded arrivals and the lengths of
the outputs, and what the server itself knew when a load began: the profile, and by replay what the planner
had learned (the correction of its time model, output lengths, acceptance). It never sees a live token time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from slos_serve.client.client import SlosClient
from slos_serve.client.stream import StreamError
from slos_serve.scheduler import POLICIES, Request, Scheduler, attained
from slos_serve.scheduler.recording import Added, Call, Cancelled, Header, Planned, Recording, read, replay
from slos_serve.scheduler.simulator import SimulatedEngine, simulate
from slos_serve.scheduler.timemodel import MARGIN

from .demo import Progress, ServerFailed, measured_rate, server, steady_traffic
from .play import play, shots

LOADS: Final = (0.5, 0.8, 1.1)
PROBE_SECONDS: Final = 8.0
GRACE_SECONDS: Final = 60.0
SETTLE_SECONDS: Final = 2.0
ALL: Final = "all"


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


def turnaround(calls: Sequence[Call]) -> float:
    """Median seconds between the end of a step and the start of the next, where there was something to run."""
    gaps: list[float] = []
    finished: float | None = None
    for call in calls:
        if isinstance(call, Planned):
            if not call.plan.chunks:
                finished = None
        elif not isinstance(call, (Added, Cancelled)):
            if finished is not None:
                gaps.append(call.started_at - finished)
            finished = call.finished_at
    return statistics.median(gaps) if gaps else 0.0


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
    header: Header, before: Sequence[Call], group: Sequence[Life], seed: int = 0
) -> list[tuple[Request, bool, Sequence[float]]]:
    """The requests of `group` through the simulator, from where the planner stood after the calls `before`."""
    planner = POLICIES[header.policy](header.capabilities, header.perf)
    difference = replay(Recording(header, list(before)), planner)
    if difference is not None:
        raise ValueError(f"the recording does not replay: plan {difference.index} differs")
    assert isinstance(planner, Scheduler)  # every policy is one
    for name, life in lives(before).items():
        if not life.ended:
            planner.cancel(name)
    noise = float(planner.model[MARGIN]) / 2  # the margin is about two deviations
    engine = SimulatedEngine(header.capabilities, header.perf, noise=noise, rng=np.random.default_rng(seed))
    engine.model = planner.model.copy()  # as corrected until then
    outcomes = simulate(
        [life.request for life in group],
        {life.request.id: len(life.token_times) for life in group},
        planner,
        engine,
        acceptance=_acceptance(group),
        turnaround=turnaround(before),
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


def compare(recording: Recording, loads: Mapping[str, Callable[[str], bool]]) -> list[Comparison]:
    """Every class at every load, and all together. `loads`: a name, and which request ids belong to it.

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
        model = simulated(recording.header, _before(recording.calls, belongs), group)
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


_HEADER: Final = (
    "load",
    "class",
    "requests",
    "attained live",
    "sim",
    "TTFT p50 ms live",
    "sim",
    "TPOT p50 ms live",
    "sim",
)


def table(rows: Sequence[Comparison]) -> str:
    """The comparison as text."""
    lines = [_HEADER]
    for row in rows:
        live, model = row.live, row.simulated
        lines.append(
            (
                row.load, row.slo_class, str(live.requests), _percent(live.attained), _percent(model.attained),
                _shown(live.ttft_ms), _shown(model.ttft_ms), _shown(live.tpot_ms), _shown(model.tpot_ms),
            )
        )  # fmt: skip
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADER))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


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


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def to_json(rows: Sequence[Comparison]) -> list[dict[str, Any]]:
    names = Measured.__slots__
    return [
        {"load": row.load, "class": row.slo_class}
        | {side: {name: getattr(part, name) for name in names}
           for side, part in (("live", row.live), ("simulated", row.simulated))}
        for row in rows
    ]  # fmt: skip


def plot(rows: Sequence[Comparison], path: Path) -> None:
    """Three panels (attained, TTFT, TPOT), live against simulated, a point for each class and load."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(12, 4.2), constrained_layout=True)
    for panel, (name, label, factor) in zip(
        panels,
        (("attained", "attained, %", 100), ("ttft_ms", "median TTFT, ms", 1), ("tpot_ms", "median TPOT, ms", 1)),
        strict=True,
    ):
        highest = 1.0
        for number, load in enumerate(dict.fromkeys(row.load for row in rows)):
            points = [
                (factor * x, factor * y)
                for row in rows
                if row.load == load and row.slo_class != ALL
                and (x := getattr(row.live, name)) is not None and (y := getattr(row.simulated, name)) is not None
            ]  # fmt: skip
            panel.plot(*np.array(points).reshape(-1, 2).T, "os^Dv"[number % 5], label=load, alpha=0.8)
            highest = max([highest, *(max(point) for point in points)])
        panel.plot([0, highest], [0, highest], color="0.6", linewidth=1, zorder=0)
        panel.set_xlabel(f"{label}, live")
        panel.set_ylabel("simulated")
    panels[0].legend(title="load")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-repository", type=Path, default=Path("model_repository"), metavar="DIR")
    parser.add_argument("--model", default="slos_llm", help="its model (default: %(default)s)")
    parser.add_argument("--loads", type=float, nargs="+", default=LOADS, help="shares of capacity (default: .5 .8 1.1)")
    parser.add_argument("--seconds", type=float, default=30.0, help="length of each load (default: %(default)s)")
    parser.add_argument("--profile-seconds", type=float, default=20.0, help="first measure so long (%(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting for this run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recording", type=Path, metavar="FILE", help="compare this run instead of making one")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="keep the recording of the run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the comparison as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it (needs matplotlib)")


def run(args: argparse.Namespace) -> int:
    """The command: 0 when a comparison was made, 1 when requests or the server failed."""
    if args.plot:
        import matplotlib  # noqa: F401  say that it is missing before a minute of measuring, not after
    if args.recording:
        with args.recording.open(encoding="utf-8") as file:
            recordings = read(file)
        if not recordings:
            raise ValueError(f"{args.recording}: there is no recording in it")
        return _conclude(args, compare(recordings[-1], {"recorded": lambda name: True}), [])
    try:
        return asyncio.run(_measure(args))
    except (ServerFailed, StreamError) as error:
        print(f"The server failed: {error}", file=sys.stderr)
        return 1


def _conclude(args: argparse.Namespace, rows: Sequence[Comparison], faults: Sequence[str]) -> int:
    print(f"\n{table(rows)}\n{gap(rows)}")
    for fault in faults:
        print(f"FAULT: {fault}")
    if args.json:
        args.json.write_text(json.dumps(to_json(rows), indent=1) + "\n", encoding="utf-8")
    if args.plot:
        plot(rows, args.plot)
    return 1 if faults else 0


async def _measure(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="slos-reality-") as scratch:
        path = args.keep or Path(scratch) / "run.jsonl"
        path.unlink(missing_ok=True)
        profile = Path(scratch) / "profile.json"
        await _profile(args.model_repository / args.model / "1", profile, args.profile_seconds)
        options = [f"--record={path}", f"--set=profile={profile}", *(f"--set={each}" for each in args.set)]
        async with server(args.model_repository, *options) as served:
            loads, faults = await _play(args, served.grpc)
        with path.open(encoding="utf-8") as file:
            (recording,) = read(file)
    return _conclude(args, compare(recording, loads), faults)


async def _profile(version: Path, output: Path, seconds: float) -> None:
    command = [sys.executable, "-m", "slos_serve.backend.cli", "profile", str(version)]
    command += [f"--seconds={seconds}", f"--output={output}"]
    process = await asyncio.create_subprocess_exec(*command)
    if await process.wait():
        raise ServerFailed("the engine could not be measured")


def _starts_with(prefix: str, request_id: str) -> bool:
    return request_id.startswith(prefix)


async def _play(args: argparse.Namespace, address: str) -> tuple[dict[str, Callable[[str], bool]], list[str]]:
    """Measure the capacity, play every load and wait until it has ended; which request ids are of which load."""
    rng = np.random.default_rng(args.seed)
    loads: dict[str, Callable[[str], bool]] = {}
    faults: list[str] = []
    async with SlosClient(address, args.model) as client:
        callers = [("grpc", client, 1.0)]
        capacity, speed = await measured_rate(callers, rng, 1.0, PROBE_SECONDS)
        await asyncio.sleep(SETTLE_SECONDS)  # until the requests of the measurement are cancelled
        print(f"capacity {capacity:.2f} arrivals/s: {speed:.0f} tokens/s with all slots busy", flush=True)
        for number, load in enumerate(args.loads):
            name, prefix = f"{100 * load:.0f} %", f"load-{number}-"
            arrivals = steady_traffic(rng, load * capacity, args.seconds)
            print(f"{name}: {len(arrivals)} requests in {args.seconds:.0f} s", flush=True)
            ledger = await play(shots(arrivals, callers, rng, prefix), grace=GRACE_SECONDS, on_tick=Progress())
            loads[name] = partial(_starts_with, prefix)
            faults += ledger.faults()
    return loads, faults
