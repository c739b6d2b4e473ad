"""`slos-serve demo`: the real server, a minute of mixed traffic, and whether every promise was kept.

Arrival patterns and lengths come from real traces, made to fit a small model by the scales below; prompt
text comes from the Python standard library. Exits with 1 when a request was lost, answered twice, failed
or left hanging, or when the server ended by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from slos_serve.client.client import SlosClient
from slos_serve.client.http_stream import HttpClient
from slos_serve.client.stream import StreamError

from . import report, traces
from .play import Caller, Ledger, Shot, play, probe, shots
from .workload import (
    Arrival,
    Limits,
    Rng,
    Times,
    Workload,
    chatbot,
    coding,
    fit,
    merged,
    poisson,
    reasoning,
    replay,
    representative,
    summarization,
    tool_calling,
)

LEGEND: Final = """
Times are the client's. Attained: every token by its due time. Where SLOs grow with the prompt, the median SLO is shown.
An admitted request was promised its SLO; the others are served best effort and miss unless they are on time anyway."""
HTTP_SHARE: Final = 0.2
LOAD: Final = 0.5  # of the measured token rate: prompts cost too, and the bursts overload it
LEAST_RATE: Final = 0.5  # arrivals per second, however slow the machine
PROBE_REQUESTS: Final = 16
PROBE_SECONDS: Final = 3.0
GRACE_SECONDS: Final = 120.0
READY_SECONDS: Final = 300.0
STOP_SECONDS: Final = 60.0
LONGEST_LINE: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Part:
    """A share of the traffic: whose rhythm, whose lengths, made smaller how."""

    slo_class: str
    workload: Workload
    rhythm: str
    share: float
    prompt_scale: float
    output_scale: float


# A session is about four requests, hence the small share of tool calling.
PARTS: Final = (
    Part("chatbot", chatbot, "azure_chat", 0.35, 0.1, 0.15),
    Part("coding", coding, "azure_code", 0.30, 0.1, 1.0),
    Part("summarization", summarization, "azure_chat", 0.10, 0.2, 0.15),
    Part("tool_calling", tool_calling, "azure_chat", 0.06, 0.2, 0.5),
    Part("reasoning", reasoning, "r1_afternoon", 0.09, 0.1, 0.04),
    Part("best_effort", chatbot, "azure_chat", 0.10, 0.1, 0.15),
)
SCALES: Final = ", ".join(f"{part.slo_class} {part.prompt_scale:g}/{part.output_scale:g}" for part in PARTS)
MAX_PROMPT_TOKENS: Final = 640
MAX_OUTPUT_TOKENS: Final = 256


def traffic(rng: Rng, rate: float, seconds: float) -> list[Arrival]:
    """About `rate * seconds` arrivals of all parts; a tool session counts once."""
    parts = []
    for part in PARTS:
        trace, share = traces.arrival_times(part.rhythm), rate * part.share
        times = representative(rng, _replayed(trace, share, seconds), share * seconds)
        parts.append(_arrivals(rng, part, times))
    return merged(parts)


def steady_traffic(rng: Rng, rate: float, seconds: float) -> list[Arrival]:
    """The same mixture without the traces' bursts: `rate` Poisson arrivals per second, the same at all times."""
    parts = []
    for part in PARTS:
        share = rate * part.share
        times = representative(rng, partial(poisson, rate=share, seconds=seconds), share * seconds)
        parts.append(_arrivals(rng, part, times))
    return merged(parts)


def _arrivals(rng: Rng, part: Part, times: Times) -> list[Arrival]:
    limits = Limits(part.prompt_scale, part.output_scale, MAX_PROMPT_TOKENS, MAX_OUTPUT_TOKENS)
    arrivals = fit(part.workload(rng, times), limits)
    return [replace(arrival, slo_class=part.slo_class) for arrival in arrivals]


def _replayed(trace: Any, rate: float, seconds: float) -> Callable[[Rng], Any]:
    return lambda rng: replay(rng, trace, rate, seconds)


@dataclass(slots=True)
class Served:
    """A server to play against. `process` is None when it was running before and is not ours to stop."""

    grpc: str
    http: str
    log: Path | None = None
    process: asyncio.subprocess.Process | None = None

    @property
    def has_died(self) -> bool:
        return self.process is not None and self.process.returncode is not None

    def tail(self, lines: int = 30) -> str:
        """The last lines of our server's log."""
        return tail(self.log, lines) if self.log else ""


def tail(log: Path, lines: int = 30) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


class ServerFailed(Exception):
    """A server did not become ready, or ended by itself."""


@asynccontextmanager
async def server(repository: Path, *options: str) -> AsyncIterator[Served]:
    """Start the real server on free ports, wait until it is ready, and stop it in the end. `options` are of `serve`.

    Raises ServerFailed with the end of its log when it does not become ready.
    """
    with tempfile.TemporaryDirectory(prefix="slos-demo-") as folder:
        command = [sys.executable, "-m", "slos_serve.backend.cli", "serve", f"--model-repository={repository}"]
        command += [*(f"--{name}-port=0" for name in ("http", "grpc", "metrics")), *options]
        process = await asyncio.create_subprocess_exec(
            *command,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            limit=LONGEST_LINE,
            start_new_session=True,  # Ctrl-C is for us; we end the server
        )
        assert process.stdout is not None
        served = Served("", "", Path(folder) / "server.log", process)
        addresses: asyncio.Future[tuple[str, str]] = asyncio.get_running_loop().create_future()
        reading = asyncio.create_task(_read_log(process.stdout, Path(folder) / "server.log", addresses))
        try:
            served.http, served.grpc = await asyncio.wait_for(addresses, READY_SECONDS)
            yield served
        except (EOFError, asyncio.TimeoutError):
            raise ServerFailed(f"it did not become ready; the end of its log:\n{served.tail()}") from None
        finally:
            await stop(process)
            await reading


_SERVING: Final = re.compile(r"serving http=(\S+) grpc=(\S+)")


async def _read_log(source: asyncio.StreamReader, log: Path, addresses: asyncio.Future[tuple[str, str]]) -> None:
    """Keep what the server prints, and find where it listens for HTTP and gRPC: it says so once it is ready."""
    with log.open("wb", buffering=0) as output:
        async for line in source:
            output.write(line)
            found = _SERVING.search(line.decode("utf-8", "replace"))
            if found and not addresses.done():
                addresses.set_result((found[1], found[2]))
    if not addresses.done():
        addresses.set_exception(EOFError())


async def stop(process: asyncio.subprocess.Process) -> None:
    """Ask a server of ours to end, and after `STOP_SECONDS` make it."""
    if process.returncode is None:
        process.terminate()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(process.wait(), STOP_SECONDS)
    if process.returncode is None:
        os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def _run_name() -> str:
    """Different for every run, so that two demonstrations can share a server."""
    return f"{secrets.token_hex(3)}-"


class Progress:
    """One line that is overwritten on a terminal, a line every ten seconds elsewhere."""

    def __init__(self) -> None:
        self._printed_at = -10.0

    def __call__(self, ledger: Ledger, seconds: float) -> None:
        if not sys.stdout.isatty() and seconds - self._printed_at < 10:
            return
        self._printed_at = seconds
        print(_progress(ledger, seconds), end="\r" if sys.stdout.isatty() else "\n", flush=True)


def _progress(ledger: Ledger, seconds: float) -> str:
    receipts = [record.result.receipt for record in ledger.records if record.result]
    verdicts = [receipt["attained"] for receipt in receipts if receipt.get("attained") is not None]
    tokens = sum(receipt.get("tokens", 0) for receipt in receipts)
    share = f"{100 * sum(verdicts) / len(verdicts):.0f} %" if verdicts else "-"
    ended = len(ledger.records)
    return (
        f"{seconds:5.1f} s  sent {len(ledger.sent):5d}  running {len(ledger.sent) - ended:4d}  "
        f"done {ended:5d}  tokens {tokens:7d}  attained {share}   "
    )


async def measured_rate(
    callers: Sequence[tuple[str, Caller, float]],
    rng: Rng,
    load: float = LOAD,
    seconds: float = PROBE_SECONDS,
    concurrency: int = PROBE_REQUESTS,
) -> tuple[float, float]:
    """The rate (arrivals per second) that asks for `load` of the tokens per second measured now, and those."""
    sample = traffic(rng, rate=10.0, seconds=60.0)
    ready = shots(sample, callers[:1], rng, prefix=_run_name())
    rng.shuffle(ready)  # type: ignore[arg-type]
    tokens_per_second = await probe(ready, concurrency, seconds)
    tokens_per_arrival = sum(arrival.output_tokens for arrival in sample) / (10.0 * 60.0)
    return max(LEAST_RATE, load * tokens_per_second / tokens_per_arrival), tokens_per_second


def samples(ledger: Ledger, ready: Sequence[Shot]) -> str:
    """A line of generated text per class, escaped, after the end of its prompt: the most varied one."""
    prompts = {shot.id: " ".join(shot.text.split()) for shot in ready}
    best: dict[str, tuple[int, str]] = {}
    for record in ledger.records:
        if record.result:
            name, shown = record.arrival.slo_class, record.result.text[:90]
            line = f"  {name}: {prompts[record.id][-40:]!r} -> {shown!r}"
            best[name] = max(best.get(name, (0, "")), (len(set(shown)), line))
    return "\n".join(best[name][1] for name in sorted(best))


async def demonstrate(args: argparse.Namespace, served: Served) -> int:
    """Measure, play, report; the exit code."""
    rng = np.random.default_rng(args.seed)
    async with AsyncExitStack() as stack:
        callers: list[tuple[str, Caller, float]] = [
            ("grpc", await stack.enter_async_context(SlosClient(served.grpc)), 1.0 - HTTP_SHARE)
        ]
        if served.http:
            callers.append(("http", await stack.enter_async_context(HttpClient(served.http)), HTTP_SHARE))
        rate = args.rate
        if rate is None:
            rate, speed = await measured_rate(callers, rng)
            print(f"{PROBE_REQUESTS} requests at a time get {speed:.0f} tokens/s: playing {100 * LOAD:.0f} % of that")
        ready = shots(traffic(rng, rate, args.seconds), callers, rng, prefix=_run_name())
        print(f"{len(ready)} requests, {rate:.2f} arrivals/s, {args.seconds:.0f} s, seed {args.seed}")
        print(f"Lengths are those of the traces times (prompt/output): {SCALES}", flush=True)
        ledger = await play(ready, grace=GRACE_SECONDS, on_tick=Progress())
    return _conclude(args, served, ledger, ready, rate)


def _conclude(args: argparse.Namespace, served: Served, ledger: Ledger, ready: Sequence[Shot], rate: float) -> int:
    measured = report.report(ledger)
    print(f"\n\n{report.table(measured)}\n{LEGEND}\n\nSample text:\n{samples(ledger, ready)}\n")
    lag, faults = measured["generator_lag"], measured["faults"]
    if ledger.records:
        print(f"Requests were sent {lag['p50_ms']:.1f} ms late at the median, {lag['p99_ms']:.1f} ms p99.")
    faults += ["the server ended by itself"] if served.has_died else []
    if args.json:
        settings = {"seed": args.seed, "rate": rate, "seconds": args.seconds}
        args.json.write_text(json.dumps({**settings, **measured}, indent=1) + "\n")
    for fault in faults[:20]:
        print(f"FAULT: {fault}")
    print(_verdict(measured, faults), flush=True)
    return 1 if faults or not ledger.records else 0


def _verdict(measured: dict[str, Any], faults: Sequence[str]) -> str:
    ends = ", ".join(f"{count} {name}" for name, count in sorted(measured["outcomes"].items()))
    return f"{measured['requests']} requests sent: {ends}; {len(faults)} lost, answered twice, failed or left hanging"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`slos-serve demo`."""
    parser.add_argument("--seconds", type=_positive, default=60.0, help="how long to send (default: %(default)s)")
    parser.add_argument("--rate", type=_positive, help="arrivals per second (default: from a short measurement)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON too")
    parser.add_argument("--model-repository", type=Path, default=Path("model_repository"), metavar="DIR")
    parser.add_argument("--grpc", default="", metavar="HOST:PORT", help="use the server running there")
    parser.add_argument("--http", default="", metavar="HOST:PORT", help="its HTTP address, for a fifth of the requests")


def _positive(value: str) -> float:
    number = float(value)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {value}")
    return number


def run(args: argparse.Namespace) -> int:
    """The command; Ctrl-C stops the server too."""
    return concluded(_run(args))


def concluded(work: Coroutine[Any, Any, int]) -> int:
    """The exit code of a demonstration, also of one that was interrupted or whose servers failed."""
    try:
        return asyncio.run(work)
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("\nStopped.")
        return 130
    except (ServerFailed, StreamError) as error:
        print(f"The demonstration failed: {error}", file=sys.stderr)
        return 1


async def _run(args: argparse.Namespace) -> int:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    if args.grpc:
        return await demonstrate(args, Served(args.grpc, args.http))
    started = time.monotonic()
    print(f"Starting the server on {args.model_repository} ...", flush=True)
    async with server(args.model_repository) as served:
        print(f"ready after {time.monotonic() - started:.1f} s: HTTP {served.http}, gRPC {served.grpc}", flush=True)
        code = await demonstrate(args, served)
        print("Stopping the server ...", flush=True)
    assert served.process is not None
    print(f"stopped with exit code {served.process.returncode}")
    return code or (1 if served.process.returncode else 0)
