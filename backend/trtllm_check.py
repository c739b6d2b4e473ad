"""`slos-serve trtllm-check`: is the planner safe and worth it inside this TensorRT-LLM, on this GPU?

    slos-serve trtllm-check MODEL_REPOSITORY/MODEL/1 --out check.json

Loads the model as the server would, runs the probe, then checks that only a GPU can decide (G1 to G10), fits the
time model to what ran, and plays one mixed workload under the stock scheduler, in shadow, trimmed and in full. Prints
a table, writes everything as JSON, and ends with 0 when nothing failed. The checks compare token ids: batches of
other composition round differently on a GPU, so the stock is first compared with itself and sets the bar.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from slos_serve.scheduler import BatchShape, Chunk, PerfModel, Plan, Request, Slo, Snapshot, Stage, StepReport
from slos_serve.scheduler.attainment import attained
from slos_serve.scheduler.engine import Planner
from slos_serve.scheduler.perf import FitQuality

from .config import EngineConfig, read_config
from .generation import Generation, SamplingParams
from .profiling import Profile, Sample
from .trtllm_engine import TrtllmBuilt, build, uninstall
from .trtllm_pilot import Mode, Pilot, Ticket
from .trtllm_speed import fit_observed
from .trtllm_worker import Tickets

log = logging.getLogger(__name__)

MODES: Final = ("stock", "shadow", "trim", "full")
LOAD: Final = 0.7
CLASSES: Final = (Slo(0.5, 0.05), Slo(1.0, 0.1), Slo(0.25, 0.03), None)
LEAST_ALIKE: Final = 0.1  # so much worse than the stock against itself may a check be


class Erratic:
    """A planner without sense: runs, holds, cuts and evicts at random. Nothing it says may change a text."""

    def __init__(self, seed: int, evicts: float, runs: float) -> None:
        self._chance = random.Random(seed)
        self._evicts = evicts
        self._runs = runs
        self._live: dict[str, int] = {}

    def add(self, request: Request, now: float) -> None:
        self._live[request.id] = request.prompt_tokens

    def cancel(self, request_id: str) -> bool:
        return self._live.pop(request_id, None) is not None

    def report(self, report: StepReport) -> None:
        for advance in report.advances:
            if advance.done:
                del self._live[advance.request_id]

    def plan(self, now: float) -> Plan:
        evicted = tuple(name for name in self._live if self._chance.random() < self._evicts)
        running = [name for name in self._live if name not in evicted and self._chance.random() < self._runs]
        self._chance.shuffle(running)
        return Plan(tuple(Chunk(name, 0, self._size(self._live[name])) for name in running), evicted)

    def _size(self, prompt: int) -> int:
        return self._chance.choice([1, 64, prompt // 3 + 1, prompt])

    def snapshot(self) -> Snapshot:
        return Snapshot(len(self._live), 0, 0, 0, 0, 0, 0, 0, 0, 0)


class Watch:
    """Counts what a pilot tells."""

    def __init__(self) -> None:
        self.pauses = 0

    def stepped(self, plan: Plan, report: StepReport, planning: float) -> None: ...
    def event(self, kind: str, detail: str) -> None: ...
    def planned(self, plan: Plan, clients: Mapping[str, int]) -> None:
        self.pauses += len(plan.evicted)

    def measured(self, snapshot: Snapshot) -> None: ...


@dataclass(frozen=True, slots=True)
class Job:
    """One request to play: when it comes, its prompt, how much it wants, what it was promised."""

    at: float
    prompt: tuple[int, ...]
    new: int
    slo: Slo | None = None


@dataclass(slots=True)
class Ran:
    """What came of a job: token ids with the time of each, in seconds from the start."""

    job: Job
    ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Result:
    """One check. `passed` None: it could not be tried here, and `detail` says why."""

    name: str
    what: str
    passed: bool | None
    detail: str


class Lab:
    """A loaded engine on which planners are tried one after the other."""

    def __init__(self, config: EngineConfig, built: TrtllmBuilt, seed: int = 0) -> None:
        self.config = config
        self.built = built
        self.chance = random.Random(seed)
        self.pilot: Pilot | None = None
        self.watch = Watch()
        self.tickets = Tickets()

    @property
    def engine(self) -> Any:
        return self.built.front.engine

    def fly(self, mode: str, planner: Callable[[], Planner] | None = None) -> None:
        """Put a pilot of this mode in place, or take it away ("stock"). The engine must be idle."""
        self.watch, self.tickets = Watch(), Tickets()
        if mode == "stock":
            self.pilot = None
            if self.engine is not None:
                uninstall(self.engine)
            return
        pilot = self.built.install(Mode(mode), self.watch, self.tickets, planner)
        self.pilot = pilot if isinstance(pilot, Pilot) else None

    def run(self, jobs: Sequence[Job], abort_at: Mapping[int, int] | None = None) -> list[Ran]:
        """Play jobs at their times; `abort_at` gives some up after so many milliseconds."""
        return asyncio.run(self._run(jobs, abort_at or {}))

    async def _run(self, jobs: Sequence[Job], abort_at: Mapping[int, int]) -> list[Ran]:
        start = time.monotonic()
        return list(await asyncio.gather(*(self._play(i, job, start, abort_at.get(i)) for i, job in enumerate(jobs))))

    async def _play(self, index: int, job: Job, start: float, abort_ms: int | None) -> Ran:
        await asyncio.sleep(max(start + job.at - time.monotonic(), 0))
        request = Request(f"check-{index}", start + job.at, len(job.prompt), (Stage(job.new, job.slo),))
        wish = Generation(request.id, job.prompt, (job.new,), SamplingParams(ignore_eos=True))
        handle = self.built.front.generate(wish, (), self.tickets, Ticket(request))
        if abort_ms is not None:
            asyncio.get_running_loop().call_later(abort_ms / 1000, handle.abort)
        ran = Ran(job)
        async for fresh in handle.results():
            ran.ids += fresh.token_ids
            ran.times += [time.monotonic() - start] * len(fresh.token_ids)
        return ran

    def prompt(self, tokens: int) -> tuple[int, ...]:
        return tuple(self.chance.randrange(5, self.built.vocab_size) for _ in range(tokens))

    def jobs(self, count: int, prompt: int, new: int) -> list[Job]:
        """Requests at once, of lengths between half and all of `prompt`, as far as the context goes."""
        prompt = max(2, min(prompt, self.built.max_context - new - 1))
        return [Job(0.0, self.prompt(prompt - self.chance.randrange(prompt // 2)), new) for _ in range(count)]


def alike(first: Iterable[Ran], second: Iterable[Ran]) -> float:
    """Share of the tokens that come before two runs of the same jobs begin to differ."""
    same = total = 0
    for one, other in zip(first, second, strict=True):
        pairs = list(zip(one.ids, other.ids, strict=False))
        differs = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        same, total = same + differs, total + max(len(one.ids), len(other.ids), 1)
    return same / max(total, 1)


class Checks:
    """The checks that need the real engine, by name."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.results: list[Result] = []

    def run(self) -> list[Result]:
        lab = self.lab
        mode = lab.built.findings.mode
        if lab.engine is None or mode is not Mode.FULL:
            why = "; ".join(lab.built.findings.reasons)
            return [Result("G1-G8", "planner in the engine's place", None, f"mode {mode.value} only: {why}")]
        size = min(lab.config.max_batch_requests, 16)
        self._texts("G1", "random chunks, holds and pauses", lab.jobs(size, 600, 48), evicts=0.03, runs=0.6)
        self._long_pause()
        self._texts("G3", "holds of many iterations", lab.jobs(size, 64, 64), evicts=0.0, runs=0.3)
        self._prefix_after_abort()
        if lab.config.tensorrt_llm.speculation == "draft_target":
            self._texts("G5", "pauses with a draft model", lab.jobs(size, 200, 48), evicts=0.1, runs=0.8)
        else:
            self._add("G5", "pauses with a draft model", None, "no draft model is set")
        whole = lab.config.max_batch_tokens
        self._ends("G6", "prompts that fill max_batch_tokens exactly", [
            Job(0.0, lab.prompt(min(whole, lab.built.max_context - 9)), 8) for _ in range(4)
        ])  # fmt: skip
        many = lab.config.max_batch_requests + 8
        self._ends("G7", "more requests than slots", lab.jobs(many, 16, 24))
        self._exhaustion()
        return self.results

    def _add(self, name: str, what: str, passed: bool | None, detail: str) -> None:
        self.results.append(Result(name, what, passed, detail))
        log.info("%s %s: %s (%s)", name, what, {True: "passed", False: "FAILED", None: "not tried"}[passed], detail)

    def _texts(self, name: str, what: str, jobs: Sequence[Job], evicts: float, runs: float) -> None:
        """The same texts under an erratic planner as under the stock, as far as the stock agrees with itself."""
        lab = self.lab
        lab.fly("stock")
        reference = lab.run(jobs)
        turned = lab.run(list(reversed(jobs)))
        bar = alike(reference, reversed(turned))
        lab.fly("full", lambda: Erratic(1, evicts, runs))
        score = alike(reference, lab.run(jobs))
        assert lab.pilot is not None
        kept = lab.pilot.mode is Mode.FULL and not lab.pilot.counts["fault"]
        text = f"alike {score:.3f}, stock with itself {bar:.3f}, {lab.watch.pauses} pauses, {dict(lab.pilot.counts)}"
        self._add(name, what, kept and score >= bar - LEAST_ALIKE, text)

    def _ends(self, name: str, what: str, jobs: Sequence[Job]) -> None:
        """Under the real planner everybody gets all tokens."""
        lab = self.lab
        lab.fly("full")
        ran = lab.run(jobs)
        assert lab.pilot is not None
        whole = all(len(each.ids) == each.job.new for each in ran)
        kept = lab.pilot.mode is Mode.FULL and not lab.pilot.counts["fault"]
        self._add(name, what, whole and kept, f"{len(jobs)} requests, {dict(lab.pilot.counts)}")

    def _long_pause(self) -> None:
        if self.lab.built.max_context < 2400:
            self._add("G2", "pause beyond 2048 tokens", None, f"max_context is {self.lab.built.max_context}")
            return
        self._texts("G2", "pause beyond 2048 tokens", self.lab.jobs(4, 2300, 48), evicts=0.05, runs=0.9)

    def _prefix_after_abort(self) -> None:
        """A prompt is given up in its middle by its caller; another with the same beginning must not notice."""
        lab = self.lab
        tokens = lab.prompt(min(3000, lab.built.max_context - 40))
        job = Job(0.0, tokens, 24)
        lab.fly("stock")
        bar = lab.run([Job(0.0, tokens[:-1], 24)])
        fresh = Job(0.0, lab.prompt(len(tokens)), 24)
        lab.fly("full")
        lab.run([fresh], {0: 5})
        after = lab.run([Job(0.0, fresh.prompt[:-1], 24)])
        lab.fly("stock")
        again = lab.run([Job(0.0, fresh.prompt[:-1], 24)])
        score = alike(after, again)
        text = f"alike {score:.3f} ({len(job.prompt)} tokens, reuse {lab.config.tensorrt_llm.block_reuse})"
        self._add("G4", "same prefix after a prompt was given up", bool(bar) and score > 1 - 2 * LEAST_ALIKE, text)

    def _exhaustion(self) -> None:
        """More context than there are blocks."""
        lab = self.lab
        room = lab.built.capabilities.num_blocks * lab.built.capabilities.block_tokens
        each = max(2, lab.built.max_context // 2)
        count = 2 + room // each
        if count > 4 * lab.config.max_batch_requests or count * each > 4_000_000:
            self._add("G8", "KV exhaustion", None, f"{room} tokens fit: set kv_fraction lower to try")
            return
        self._ends("G8", "KV exhaustion", lab.jobs(int(count), each, min(64, each // 2)))


# The workload


def workload(lab: Lab, perf: PerfModel, seconds: float) -> list[Job]:
    """Poisson arrivals of four classes at 0.7 of what the time model says the engine can do."""
    prompt = min(512, lab.built.max_context // 2)
    new = min(64, lab.built.max_context // 4)
    decode = perf.seconds(BatchShape(16, 16 * prompt)) / 16 * new
    rate = LOAD / (lab.built.prefill_seconds(prompt) + decode)
    chance = random.Random(3)
    jobs, at = [], 0.0
    while (at := at + chance.expovariate(rate)) < seconds:
        wanted = max(2, chance.randrange(2 * new))
        size = int(prompt * chance.lognormvariate(-0.3, 0.7))
        size = max(2, min(size, lab.built.max_context - wanted - 1))
        jobs.append(Job(at, lab.prompt(size), wanted, chance.choice(CLASSES)))
    return jobs


def summary(mode: str, ran: Sequence[Ran], pilot: Pilot | None) -> dict[str, Any]:
    """The numbers of one run."""
    promised = [each for each in ran if each.job.slo is not None]
    kept = [
        attained((Stage(each.job.new, each.job.slo),), [len(each.times)], each.job.at, each.times) for each in promised
    ]
    first = [each.times[0] - each.job.at for each in ran if each.times]
    pace = [(each.times[-1] - each.times[0]) / (len(each.times) - 1) for each in ran if len(each.times) > 1]
    end = max((each.times[-1] for each in ran if each.times), default=1.0)
    return {
        "mode": mode,
        "requests": len(ran),
        "attained": sum(kept) / max(len(kept), 1),
        "ttft_ms": [1000 * float(np.percentile(first, q)) for q in (50, 99)] if first else None,
        "tpot_ms": [1000 * float(np.percentile(pace, q)) for q in (50, 99)] if pace else None,
        "tokens_per_second": sum(len(each.ids) for each in ran) / end,
        "events": dict(pilot.counts) if pilot else {},
        "mode_at_end": pilot.mode.value if pilot else "stock",
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The workload in each mode, one line each."""
    lines = ["| mode | requests | attained | TTFT p50 / p99 ms | TPOT p50 / p99 ms | tokens/s | ended in |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        ttft, tpot = (" / ".join(f"{v:.0f}" for v in row[key] or ()) for key in ("ttft_ms", "tpot_ms"))
        lines.append(
            f"| {row['mode']} | {row['requests']} | {100 * row['attained']:.1f} % | {ttft} | {tpot} | "
            f"{row['tokens_per_second']:.0f} | {row['mode_at_end']} |"
        )
    return "\n".join(lines)


def host_time(samples: Mapping[str, Sequence[tuple[Any, float]]]) -> dict[str, float]:
    """Median seconds of a decode-only iteration, by mode."""
    medians = {}
    for mode, seen in samples.items():
        decodes = [seconds for shape, seconds in seen if shape.prefill_area == 0]
        if decodes:
            medians[mode] = float(np.median(decodes))
    return medians


# The command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("version_dir", type=Path, help="a model's version folder, with engine.json in it")
    parser.add_argument("--out", type=Path, default=Path("trtllm-check.json"), help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=60.0, help="of workload in each mode; default: %(default)s")
    parser.add_argument("--profile", type=Path, help="write the fitted time model here, for `profile` in engine.json")


def run(args: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    config = read_config(args.version_dir)
    if config.engine != "tensorrt_llm":
        raise ValueError(f"engine: must be tensorrt_llm, got {config.engine!r}")
    config = replace(config, tensorrt_llm=replace(config.tensorrt_llm, mode="auto"))
    built = build(config, args.version_dir)
    try:
        report, samples = check(Lab(config, built), args.seconds)
    finally:
        built.front.shutdown()
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.profile and report["fit"]:
        write_profile(args.profile, report, samples)
    print(table(report["workload"]))
    for result in report["checks"]:
        print(f"{result['name']:6} {STATE[result['passed']]:10} {result['what']}: {result['detail']}")
    print(f"probe: mode {report['probe']['mode']}; " + ("; ".join(report["probe"]["reasons"]) or "every check passed"))
    print(f"all of it is in {args.out}")
    return 1 if any(result["passed"] is False for result in report["checks"]) else 0


STATE: Final = {True: "passed", False: "FAILED", None: "not tried"}


def check(lab: Lab, seconds: float) -> tuple[dict[str, Any], list[Sample]]:
    """Everything, in order."""
    checks = Checks(lab)
    results = checks.run()
    perf = lab.built.perf
    rows, seen, fitted = [], {}, None
    jobs = workload(lab, perf, seconds)
    allowed = {Mode.FULL: 4, Mode.TRIM: 3, Mode.GOVERNOR: 1}[lab.built.findings.mode]
    for mode in MODES[:allowed]:
        lab.fly(mode)
        rows.append(summary(mode, lab.run(jobs), lab.pilot))
        if lab.pilot is not None:
            seen[mode] = list(lab.pilot.samples)
            fitted = fit_observed(seen[mode]) or fitted
    if fitted is None:
        results.append(Result("G9", "time model", None, "too few batches were seen"))
    else:
        results.append(Result("G9", "time model", fitted[1] < 15.0, f"MAPE {fitted[1]:.1f} % on batches left out"))
    medians = host_time(seen)
    text = ", ".join(f"{mode} {1000 * value:.2f} ms" for mode, value in medians.items())
    results.append(Result("G10", "time of a decode iteration, planner included", None if not medians else True, text))
    samples = [Sample(shape, value) for each in seen.values() for shape, value in each]
    return {
        "tensorrt_llm": lab.built.version,
        "gpu": lab.built.gpu,
        "settings": lab.config.to_json(),
        "probe": {"mode": lab.built.findings.mode.value, "reasons": list(lab.built.findings.reasons)},
        "capabilities": asdict(lab.built.capabilities),
        "checks": [asdict(result) for result in results],
        "fit": None if fitted is None else {"perf": fitted[0].to_json(), "mape": fitted[1]},
        "workload": rows,
    }, samples


def write_profile(path: Path, report: Mapping[str, Any], samples: Sequence[Sample]) -> None:
    """A profile file as `profile` in engine.json takes it."""
    perf = PerfModel.from_json(report["fit"]["perf"])
    fit = FitQuality(float("nan"), report["fit"]["mape"], len(samples))
    host = {"gpu": report["gpu"], "tensorrt_llm": report["tensorrt_llm"]}
    profile = Profile(host, {"model": report["settings"]["model"]}, perf, fit, tuple(samples))
    path.write_text(json.dumps(profile.to_json()) + "\n", encoding="utf-8")
