"""`slos-serve reality`: is what the simulator predicts what the server does?

    slos-serve reality                     profile, serve three loads twice, compare the second time
    slos-serve reality --recording FILE    compare the second half of a run that a server with `--record` wrote

How long steps and pauses are in the simulation is fitted to the first times, other requests at the same loads.
How live and simulated are made comparable: `scheduler.comparison`. Never looks into the server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from slos_serve.client.client import SlosClient
from slos_serve.client.stream import StreamError
from slos_serve.scheduler import POLICIES
from slos_serve.scheduler.comparison import ALL, Comparison, compare, gap, to_json
from slos_serve.scheduler.observed import observe, phase
from slos_serve.scheduler.recording import Recording, read

from .demo import PROBE_REQUESTS, Progress, ServerFailed, measured_rate, server, steady_traffic
from .play import play, shots

LOADS: Final = (0.5, 0.8, 1.1)
PROBE_SECONDS: Final = 8.0
GRACE_SECONDS: Final = 60.0
SETTLE_SECONDS: Final = 2.0

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


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


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
    parser.add_argument("--fit-seconds", type=float, default=20.0, help="of each load to learn from (%(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting for this run")
    text = "requests at a time that measure the capacity (default: %(default)s)"
    parser.add_argument("--probe-requests", type=int, default=PROBE_REQUESTS, help=text)
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
        ids = [request.id for request in recordings[-1].requests]
        first, second = set(ids[: len(ids) // 2]), set(ids[len(ids) // 2 :])
        rows = _compared(recordings[-1], [first.__contains__], {"second half": second.__contains__})
        return _conclude(args, rows, [])
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
    learn_from = [partial(_starts_with, _fit_prefix(number)) for number in range(len(loads))]
    return _conclude(args, _compared(recording, learn_from, loads), faults)


def _compared(
    recording: Recording, learn_from: Sequence[Callable[[str], bool]], loads: dict[str, Callable[[str], bool]]
) -> list[Comparison]:
    policy = recording.header.policy
    if policy not in POLICIES:
        raise ValueError(f"policy of the recording: must be one of {', '.join(POLICIES)}, got {policy!r}")
    make = POLICIES[policy]
    world = observe(phase(recording.calls, belongs) for belongs in learn_from)
    print(f"steps vary by {100 * world.noise:.0f} % around {world.perf.to_json()}, pauses are {world.turnaround}")
    same = {name: observe([phase(recording.calls, belongs)]) for name, belongs in loads.items()}
    known = [row for name in loads for row in compare(recording, make, {name: loads[name]}, same[name])]
    print(f"if the simulation knew how long the steps of each load itself were: {gap(known)}")
    return compare(recording, make, loads, world)


async def _profile(version: Path, output: Path, seconds: float) -> None:
    command = [sys.executable, "-m", "slos_serve.backend.cli", "profile", str(version)]
    command += [f"--seconds={seconds}", f"--output={output}"]
    process = await asyncio.create_subprocess_exec(*command)
    if await process.wait():
        raise ServerFailed("the engine could not be measured")


def _fit_prefix(number: int) -> str:
    """How the ids of the requests begin that the simulation learns from."""
    return f"fit-{number}-"


def _starts_with(prefix: str, request_id: str) -> bool:
    return request_id.startswith(prefix)


async def _play(args: argparse.Namespace, address: str) -> tuple[dict[str, Callable[[str], bool]], list[str]]:
    """Measure the capacity, play every load and wait until it has ended; which request ids are of which load."""
    rng = np.random.default_rng(args.seed)
    loads: dict[str, Callable[[str], bool]] = {}
    faults: list[str] = []
    async with SlosClient(address, args.model) as client:
        callers = [("grpc", client, 1.0)]
        capacity, speed = await measured_rate(callers, rng, 1.0, PROBE_SECONDS, args.probe_requests)
        await asyncio.sleep(SETTLE_SECONDS)  # until the requests of the measurement are cancelled
        print(f"capacity {capacity:.2f} arrivals/s: {speed:.0f} tokens/s with all slots busy", flush=True)

        async def serve(name: str, prefix: str, load: float, seconds: float) -> None:
            arrivals = steady_traffic(rng, load * capacity, seconds)
            print(f"{name}: {len(arrivals)} requests in {seconds:.0f} s", flush=True)
            ledger = await play(shots(arrivals, callers, rng, prefix), grace=GRACE_SECONDS, on_tick=Progress())
            faults.extend(ledger.faults())

        for number, load in enumerate(args.loads):
            name, prefix = f"{100 * load:.0f} %", f"load-{number}-"
            await serve(f"to learn from, {name}", _fit_prefix(number), load, args.fit_seconds)
            await serve(name, prefix, load, args.seconds)
            loads[name] = partial(_starts_with, prefix)
    return loads, faults
