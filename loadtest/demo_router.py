"""`slos-serve demo-router`: three instances and a router, bursts of mixed traffic, one instance killed and restarted.

Locust plays (`locustfile`). After a while of traffic the busiest instance is killed with SIGKILL, or frozen with
SIGSTOP for half a minute, unless its supervisor has restarted it by then; the routers notice both, and the requests
it had go on elsewhere. Prints attainment per class before, during and after, and exits with 1 when a request was
lost, answered twice, failed or left hanging.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from slos_serve.client.client import Running, SlosClient, input_tensors
from slos_serve.client.routed import RoutedClient, control_output

from .demo import ServerFailed, concluded, measured_rate, stop, tail

LOCUSTFILE: Final = Path(__file__).with_name("locustfile.py")
LOAD: Final = 0.2  # of the measured token rate: an instance fewer, and another one starting, on the same cores
LEAST_RATE: Final = 1.0  # arrivals per second, or nobody would be there to lose a server
READY_SECONDS: Final = 600.0
GRACE_SECONDS: Final = 90.0
ENOUGH: Final = 3.0  # requests that an instance must have to be worth a kill
FROZEN_SECONDS: Final = 30.0
BUSY_SECONDS: Final = 20.0  # how long one that has them is waited for
PHASES: Final = ("before", "during", "after")
FAIR: Final = frozenset({"done", "refused", "cancelled"})
LEGEND: Final = """
Attained: every token by its due time at the client. `during` are requests that ran while the instance was away."""


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where everything is: HOST:PORT each."""

    router: str
    router_http: str
    instances: tuple[str, ...]


_ROUTER: Final = re.compile(r"router: http=(\S+) grpc=(\S+)")
_INSTANCE: Final = re.compile(r"instance \d+: http=\S+ grpc=(\S+)")


@asynccontextmanager
async def service(repository: Path, instances: int, log: Path) -> AsyncIterator[Addresses]:
    """`slos-serve serve --instances N --router` on free ports, until every instance is ready. Raises ServerFailed."""
    command = [sys.executable, "-m", "slos_serve.backend.cli", "serve", f"--model-repository={repository}"]
    command += [f"--instances={instances}", "--router", "--probe-interval=1"]
    command += [f"--{name}-port=0" for name in ("http", "grpc", "metrics")]
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *command, stdout=output, stderr=asyncio.subprocess.STDOUT, start_new_session=True
        )
        try:
            yield await asyncio.wait_for(_ready(process, log, instances), READY_SECONDS)
        except asyncio.TimeoutError:
            raise ServerFailed(f"not ready after {READY_SECONDS:.0f} s:\n{tail(log)}") from None
        finally:
            await stop(process)


async def _ready(process: asyncio.subprocess.Process, log: Path, instances: int) -> Addresses:
    found: Addresses | None = None
    while True:
        if process.returncode is not None:
            raise ServerFailed(f"it ended with {process.returncode}:\n{tail(log)}")
        text = log.read_text(errors="replace")
        router, each = _ROUTER.search(text), _INSTANCE.findall(text)
        if router is not None and found is None:
            found = Addresses(router[2], router[1], tuple(each))
        if found is not None and len(await usable(found.router)) == instances:
            return found
        await asyncio.sleep(0.5)


async def usable(router: str) -> set[str]:
    """The instances that a router sends requests to."""
    async with RoutedClient([router]) as client:
        return await client.usable() or set()


async def requests_at(address: str) -> float:
    """How many requests an instance has, as it tells a router."""
    async with SlosClient(address) as client:
        async for message, _ in client.responses(input_tensors({"control": "watch"}), "", READY_SECONDS, Running()):
            return float(control_output(message)["load"]["requests"])
    return 0.0


async def busiest(addresses: Addresses, most: float = ENOUGH, patience: float = BUSY_SECONDS) -> tuple[str, float]:
    """The instance with the most requests, once it has `most` of them or `patience` seconds are over."""
    until = time.monotonic() + patience
    while True:
        counts = {each: await requests_at(each) for each in addresses.instances}
        found = max(counts, key=lambda each: counts[each])
        if counts[found] >= most or time.monotonic() >= until:
            return found, counts[found]
        await asyncio.sleep(0.05)


def server_of(address: str) -> int:
    """The process that serves gRPC at this address of this machine. Raises ServerFailed when there is none."""
    option = f"--grpc-port={address.rpartition(':')[2]}".encode()
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit() and option in (folder / "cmdline").read_bytes().split(b"\0"):
                return int(folder.name)
    raise ServerFailed(f"no server process at {address}")


def kill(address: str) -> None:
    """The server at this address and its model processes, as a crash would: nothing is told to anybody."""
    os.killpg(server_of(address), signal.SIGKILL)


async def freeze(address: str) -> None:
    """The same processes stand still for `FROZEN_SECONDS`, and go on where they are still there."""
    group = server_of(address)
    os.killpg(group, signal.SIGSTOP)
    try:
        await asyncio.sleep(FROZEN_SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGCONT)


def phase(record: dict[str, Any], gone_at: float, back_at: float) -> str:
    """Whether a request ran before, during or after the time in which an instance was away."""
    ended_at = record["at"] + (record["total_ms"] or 0.0) / 1000
    if ended_at < gone_at:
        return "before"
    return "during" if record["at"] < back_at else "after"


def table(records: Sequence[dict[str, Any]], gone_at: float, back_at: float) -> str:
    """Attainment by class and phase, and the longest gap that a caller saw between two tokens."""
    phases = [phase(record, gone_at, back_at) for record in records]
    lines = [f"{'class':<16}" + "".join(f"{name:>18}" for name in PHASES)]
    for name in sorted({record["slo_class"] for record in records}):
        cells = ""
        for each in PHASES:
            verdicts = [
                record["attained"]
                for record, its in zip(records, phases, strict=True)
                if its == each and record["slo_class"] == name
            ]
            promised = [verdict for verdict in verdicts if verdict is not None]
            share = f"{100 * sum(promised) / len(promised):.0f} %" if promised else "-"
            cells += f"{share + ' of ' + str(len(verdicts)):>18}"
        lines.append(f"{name:<16}{cells}")
    gaps = ""
    for each in PHASES:
        found = [r["gap_ms"] for r, its in zip(records, phases, strict=True) if its == each and r["gap_ms"] is not None]
        gaps += f"{f'{np.percentile(found, 99):.0f} ms' if found else '-':>18}"
    return "\n".join([*lines, f"{'p99 worst gap':<16}{gaps}"])


def faults(records: Sequence[dict[str, Any]]) -> list[str]:
    """One line per request that did not end exactly once and fairly."""
    ids = [record["id"] for record in records]
    found = [f"{r['id']}: {r['outcome']} {r['error']}" for r in records if r["outcome"] not in FAIR]
    return found + [f"{name}: ended {ids.count(name)} times" for name in {each for each in ids if ids.count(each) > 1}]


async def _locust(addresses: Addresses, rate: float, folder: Path) -> asyncio.subprocess.Process:
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "-u", "1", "-r", "1"]
    command += ["--via", "place", "--addresses", addresses.router, "--http", addresses.router_http]
    command += ["--rate", f"{rate:.3f}", "--rhythm", "onoff", "--period", "12", "--grace", f"{GRACE_SECONDS:.0f}"]
    command += ["--stop-timeout", f"{GRACE_SECONDS + 10:.0f}", "--records", str(folder / "records.jsonl")]
    command += ["--slo-json", str(folder / "slo.json"), "--only-summary", "--max-lag-ms", "2000"]
    with (folder / "locust.log").open("wb") as output:
        return await asyncio.create_subprocess_exec(*command, stdout=output, stderr=asyncio.subprocess.STDOUT)


async def demonstrate(args: argparse.Namespace, addresses: Addresses, folder: Path) -> int:
    """Play, kill or freeze, wait until it is back, play on, report; the exit code."""
    async with SlosClient(addresses.router, "slos_router") as client:
        rng = np.random.default_rng(0)
        rate = args.rate or max(LEAST_RATE, (await measured_rate([("grpc", client, 1.0)], rng, LOAD))[0])
    print(f"{rate:.2f} arrivals/s in bursts of five times that, placed by the router, a fifth through HTTP", flush=True)
    locust = await _locust(addresses, rate, folder)
    frozen: asyncio.Task[None] | None = None
    try:
        await asyncio.sleep(args.seconds)
        victim, requests = await busiest(addresses)
        gone_at = time.time()
        if args.freeze:
            frozen = asyncio.create_task(freeze(victim))
        else:
            kill(victim)
        done = "froze" if args.freeze else "killed"
        print(f"{done} the instance at {victim} with its model process and {requests:.0f} requests", flush=True)
        while victim in await usable(addresses.router):
            await asyncio.sleep(0.05)
        print(f"the router stopped using it within {time.time() - gone_at:.2f} s", flush=True)
        while victim not in await usable(addresses.router):
            _check(locust, folder)
            await asyncio.sleep(0.2)
        back_at = time.time()
        print(f"it was back in use after {back_at - gone_at:.1f} s", flush=True)
        await asyncio.sleep(args.seconds)
        _check(locust, folder)
    finally:
        if frozen is not None:
            frozen.cancel()
        if locust.returncode is None:
            locust.send_signal(signal.SIGINT)
        code = await asyncio.wait_for(locust.wait(), GRACE_SECONDS + 60)
    return _conclude(args, folder, code, gone_at, back_at)


def _check(locust: asyncio.subprocess.Process, folder: Path) -> None:
    if locust.returncode is not None:
        raise ServerFailed(f"Locust ended with {locust.returncode}:\n{tail(folder / 'locust.log')}")


def _conclude(args: argparse.Namespace, folder: Path, code: int, gone_at: float, back_at: float) -> int:
    lines = (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(text) for text in lines]
    wrong = faults(records)
    moved = sum(1 for record in records if record["losses"])
    print(f"\n{table(records, gone_at, back_at)}\n{LEGEND}\n")
    print(f"{moved} requests lost their server and went on with another, {_resumed(records)} of them in mid-stream")
    for fault in wrong[:20]:
        print(f"FAULT: {fault}")
    if args.json:
        data = {"gone_at": gone_at, "back_at": back_at, "locust_exit": code, "records": records}
        args.json.write_text(json.dumps(data) + "\n", encoding="utf-8")
    print(f"{len(records)} requests sent, {len(records) - len(wrong)} ended exactly once; {len(wrong)} lost or failed")
    print({0: "Locust: a valid run", 3: "Locust: INVALID, the generator fell behind"}.get(code, f"Locust: exit {code}"))
    return 1 if wrong or not records or code else 0


def _resumed(records: Sequence[dict[str, Any]]) -> int:
    return sum(1 for record in records if record["resumed_tokens"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`slos-serve demo-router`."""
    parser.add_argument("--seconds", type=float, default=30.0, help="traffic before and after (default: %(default)s)")
    parser.add_argument("--instances", type=int, default=3)
    parser.add_argument("--rate", type=float, help="arrivals per second (default: from a short measurement)")
    freezes = f"stop the instance for {FROZEN_SECONDS:.0f} s instead of killing it"
    parser.add_argument("--freeze", action="store_true", help=freezes)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every request's record")
    parser.add_argument("--model-repository", type=Path, default=Path("model_repository"), metavar="DIR")


def run(args: argparse.Namespace) -> int:
    """The command; Ctrl-C stops the servers too."""
    return concluded(_run(args))


async def _run(args: argparse.Namespace) -> int:
    if args.instances < 2:
        raise ValueError(f"--instances: must be at least 2, or nobody is left to go on, got {args.instances}")
    with tempfile.TemporaryDirectory(prefix="slos-demo-") as name:
        folder = Path(name)
        started = time.monotonic()
        print(f"Starting {args.instances} instances of {args.model_repository} and a router ...", flush=True)
        async with service(args.model_repository, args.instances, folder / "servers.log") as addresses:
            print(f"ready after {time.monotonic() - started:.1f} s: router at {addresses.router}", flush=True)
            return await demonstrate(args, addresses, folder)
