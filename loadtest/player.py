"""An open-loop load generator as a process of its own: settings in, one JSON line per ended request out.

Locust runs one for each of its users, since its own green threads would distort the times that are measured.
A request is sent when it is due, however slow the server is. When standard input ends nothing new is sent, what
runs may end for a while, and the process ends. Every request sent has exactly one line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from typing import Any, Final, get_type_hints

import numpy as np

from slos_serve.client.client import SlosClient
from slos_serve.client.http_stream import HttpClient
from slos_serve.client.routed import RoutedClient
from slos_serve.scheduler.attainment import due_times

from . import demo, traces
from .play import Caller, Ledger, Record, play, shots
from .report import judge
from .workload import WORKLOADS, Arrival, Limits, Rng, Times, fit, onoff_bursts, poisson, replay

VIA: Final = ("place", "forward", "ensemble", "direct")
RHYTHMS: Final = ("poisson", "onoff", "step", *sorted(("azure_chat", "azure_code", "r1_morning", "r1_afternoon")))
TICK_SECONDS: Final = 0.1
HORIZON_SECONDS: Final = 3600.0  # nobody stops it: it ends by itself


@dataclass(frozen=True, slots=True)
class Settings:
    """What is played against what. Each line's comment is its help."""

    # gRPC addresses HOST:PORT with commas between: routers, or for `direct` one instance
    addresses: str = "127.0.0.1:8001"
    # place, forward, ensemble (through routers) or direct
    via: str = "direct"
    # HTTP address HOST:PORT for a share of the requests
    http: str = ""
    # share of the requests that go over HTTP, where there is an address for it
    http_share: float = 0.2
    # mean arrivals per second of each user
    rate: float = 2.0
    # poisson, onoff (5 times the mean for 15 % of the time), step (doubles half-way), or a trace's name
    rhythm: str = "poisson"
    # `demo` (the mixture of the demonstration) or a workload of loadtest/workload.py
    workload: str = "demo"
    # lengths of a workload of the papers times this, to fit a small model
    scale: float = 0.1
    # seconds of one period of onoff, and of the whole of step
    period: float = 30.0
    # seconds that what is running may take at the end
    grace: float = 60.0
    # what all random numbers come from
    seed: int = 0

    def __post_init__(self) -> None:
        known = {"via": VIA, "rhythm": RHYTHMS, "workload": ("demo", *WORKLOADS)}
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("rate", "scale", "period"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: must be above 0, got {getattr(self, name)!r}")

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Settings:
        """Raises ValueError for unknown keys and wrong values."""
        unknown = sorted(set(data) - {each.name for each in fields(Settings)})
        if unknown:
            raise ValueError(f"unknown key {unknown[0]!r}")
        kinds = get_type_hints(Settings)
        return Settings(**{name: kinds[name](value) for name, value in data.items()})


def arrivals(settings: Settings, rng: Rng, seconds: float = HORIZON_SECONDS) -> list[Arrival]:
    """What is sent when."""
    if settings.workload == "demo" and settings.rhythm in ("azure_chat", "azure_code"):
        return demo.traffic(rng, settings.rate, seconds)
    times = _times(settings, rng, seconds)
    if settings.workload != "demo":
        limits = Limits(settings.scale, settings.scale, demo.MAX_PROMPT_TOKENS, demo.MAX_OUTPUT_TOKENS)
        return fit(WORKLOADS[settings.workload](rng, times), limits)
    weights = np.array([part.share for part in demo.PARTS])
    picks = rng.choice(len(demo.PARTS), len(times), p=weights / weights.sum())
    found: list[Arrival] = []
    for index, part in enumerate(demo.PARTS):
        limits = Limits(part.prompt_scale, part.output_scale, demo.MAX_PROMPT_TOKENS, demo.MAX_OUTPUT_TOKENS)
        fitted = fit(part.workload(rng, times[picks == index]), limits)
        found += [replace(arrival, slo_class=part.slo_class) for arrival in fitted]
    return sorted(found, key=lambda arrival: (arrival.at, arrival.round))


def _times(settings: Settings, rng: Rng, seconds: float) -> Times:
    rate = settings.rate
    if settings.rhythm == "poisson":
        return poisson(rng, rate, seconds)
    if settings.rhythm == "onoff":
        return onoff_bursts(rng, rate, seconds, period=settings.period)
    if settings.rhythm == "step":
        later = poisson(rng, rate, seconds)
        return np.sort(np.concatenate([poisson(rng, rate, seconds), later[later > settings.period / 2]]))
    return replay(rng, traces.arrival_times(settings.rhythm), rate, seconds)


def line(record: Record, epoch: float) -> dict[str, Any]:
    """One ended request. Times in milliseconds; `at` is when it was sent, in seconds since 1970."""
    judged = judge(record)
    receipt, times = judged.receipt, list(judged.token_times)
    sent = record.sent_at
    late = None
    if judged.stages and judged.stages[0].slo and times:
        dues = due_times(judged.stages, judged.stage_tokens, sent)
        late = max((at - due) * 1000 for at, due in zip(times, dues, strict=False))
    promised = bool(judged.stages and judged.stages[0].slo) if judged.stages else True
    return {
        "id": record.id,
        "slo_class": record.arrival.slo_class,
        "transport": record.transport,
        "outcome": record.outcome,
        "error": record.error,
        "at": epoch + sent,
        "lag_ms": (sent - record.due_at) * 1000,
        "tokens": len(times),
        "ttft_ms": (times[0] - sent) * 1000 if times else None,
        "tpot_ms": (times[-1] - times[0]) / (len(times) - 1) * 1000 if len(times) > 1 else None,
        "gap_ms": max(((b - a) * 1000 for a, b in pairwise(times)), default=None),
        "total_ms": (times[-1] - sent) * 1000 if times else None,
        "late_ms": late,
        "attained": judged.scores()["strict"] if promised and record.arrival.slo_class != "best_effort" else None,
        "admitted": receipt.get("admitted"),
        "resumed_tokens": receipt.get("resumed_tokens", 0),
        "losses": receipt.get("losses", []),
        "instance": receipt.get("instance", ""),
        "hops": receipt.get("hops", 0),
    }


class _Lines:
    """Writes a line for every record that is new."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._told = 0
        self._epoch = time.time() - time.monotonic()

    def __call__(self, ledger: Ledger, seconds: float) -> None:
        for record in ledger.records[self._told :]:
            self._write(json.dumps(line(record, self._epoch)) + "\n")
        self._told = len(ledger.records)


async def callers(settings: Settings, stack: AsyncExitStack) -> list[tuple[str, Caller, float]]:
    """The clients that requests go through, and their shares."""
    addresses = [address.strip() for address in settings.addresses.split(",") if address.strip()]
    grpc: SlosClient | RoutedClient
    if settings.via in ("place", "forward"):
        grpc = RoutedClient(addresses, placement=settings.via == "place")
    else:
        grpc = SlosClient(addresses[0], "slos_ensemble" if settings.via == "ensemble" else "slos_llm")
    found: list[tuple[str, Caller, float]] = [("grpc", await stack.enter_async_context(grpc), 1.0)]
    if settings.http:
        model = "slos_llm" if settings.via == "direct" else "slos_ensemble"
        http = await stack.enter_async_context(HttpClient(settings.http, model))
        found = [("grpc", found[0][1], 1.0 - settings.http_share), ("http", http, settings.http_share)]
    return found


async def generate(settings: Settings, write: Callable[[str], object], enough: asyncio.Event) -> Ledger:
    """Play until `enough` is set or the horizon is reached, and write a line per request."""
    rng = np.random.default_rng(settings.seed)
    async with AsyncExitStack() as stack:
        ways = await callers(settings, stack)
        ready = shots(arrivals(settings, rng), ways, rng, prefix=f"{secrets.token_hex(3)}-")
        lines = _Lines(write)
        ledger = await play(ready, grace=settings.grace, on_tick=lines, tick=TICK_SECONDS, enough=enough)
        lines(ledger, 0.0)
        return ledger


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m slos_serve.loadtest.player JSON`: lines on standard output until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", help=f"JSON object, keys of {json.dumps(asdict(Settings()))}")
    settings = Settings.from_json(json.loads(parser.parse_args(argv).settings))

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    async def run() -> None:
        enough = asyncio.Event()
        loop = asyncio.get_running_loop()
        reader = loop.run_in_executor(None, sys.stdin.read)
        reader.add_done_callback(lambda _: enough.set())
        await generate(settings, write, enough)
        if not reader.done():
            os_exit()

    asyncio.run(run())
    return 0


def os_exit() -> None:
    """Leave although a thread still reads standard input."""
    import os

    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
