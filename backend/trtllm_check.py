"""`slos-serve trtllm-check`: is the planner safe and worth it inside this TensorRT-LLM, on this GPU?

    slos-serve trtllm-check MODEL_REPOSITORY/MODEL/1 --out check.json

Loads the model as the server would, runs the probe, then the ten checks that only a GPU can decide, fits the time
model to what ran, and plays one mixed workload under the stock scheduler, in shadow, trimmed and in full. Then it loads
the model again: with overlap the other way, for the checks that it matters to, and in a process of its own whose
engine is in others again, for texts that nobody has tampered with and for the price of one process. Prints a table,
writes everything as JSON, and ends with 0 when nothing failed. The checks compare token ids: batches of other
composition round differently on a GPU, so the stock is first compared with itself and sets the bar.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from slos_serve.scheduler import BatchShape, PerfModel, Slo, Stage
from slos_serve.scheduler.attainment import attained
from slos_serve.scheduler.perf import FitQuality

from .config import EngineConfig, read_config
from .profiling import Profile, Sample
from .trtllm_engine import build
from .trtllm_lab import Erratic, Job, Lab, Ran, alike
from .trtllm_pilot import Mode, Pilot
from .trtllm_speed import fit_observed

log = logging.getLogger(__name__)

CHECKS: Final[Mapping[str, str]] = {
    "G1": "random chunks, holds and pauses",
    "G2": "pause beyond 2048 tokens",
    "G3": "holds of many iterations",
    "G4": "same prefix after a prompt was given up in its middle",
    "G5": "pauses with a draft model",
    "G6": "prompts that fill max_batch_tokens exactly",
    "G7": "more requests than slots",
    "G8": "KV exhaustion",
    "G9": "time model",
    "G10": "engine in this process or in its own",
}
MODES: Final = ("stock", "shadow", "trim", "full")
LOAD: Final = 0.7
CLASSES: Final = (Slo(0.5, 0.05), Slo(1.0, 0.1), Slo(0.25, 0.03), None)
LEAST_ALIKE: Final = 0.1  # so much worse than the stock against itself may a check be
MOST_MAPE: Final = 15.0
ALONE_SECONDS: Final = 3600.0


@dataclass(frozen=True, slots=True)
class Result:
    """One check. `passed` None: it could not be tried here, and `detail` says why."""

    name: str
    what: str
    passed: bool | None
    detail: str


class Checks:
    """G1 to G8, on one loaded engine."""

    def __init__(self, lab: Lab, note: str = "") -> None:
        """`note` is added to the names."""
        self.lab = lab
        self.results: list[Result] = []
        self.untampered: dict[str, Ran] = {}  # texts that an engine with an empty cache must give too
        self._note = note

    def run(self) -> list[Result]:
        """All of them."""
        if not self._is_ready():
            for name in ("G1", "G2", "G3", "G5", "G6", "G7", "G8"):
                self._add(name, None, f"mode {self._mode().value} only: {'; '.join(self.lab.built.findings.reasons)}")
            return self.results
        lab = self.lab
        self.overlap_matters()
        self._long_pause()
        self._given_up()
        self._with_drafts()
        whole = min(lab.config.max_batch_tokens, lab.built.max_context - 9)
        self._ends("G6", [Job(0.0, lab.prompt(whole), 8) for _ in range(4)])
        self._ends("G7", lab.jobs(lab.config.max_batch_requests + 8, 16, 24))
        self._exhaustion()
        return self.results

    def overlap_matters(self) -> list[Result]:
        """Those that can go wrong in one way with overlap, in another without."""
        if self._is_ready():
            size = min(self.lab.config.max_batch_requests, 16)
            self._texts("G1", self.lab.jobs(size, 600, 48), evicts=0.03, runs=0.6)
            self._texts("G3", self.lab.jobs(size, 64, 64), evicts=0.0, runs=0.3)
        return self.results

    def _mode(self) -> Mode:
        return self.lab.built.findings.mode

    def _is_ready(self) -> bool:
        return self.lab.engine is not None and self._mode() is Mode.FULL

    def _add(self, name: str, passed: bool | None, detail: str) -> None:
        self.results.append(Result(name + self._note, CHECKS[name], passed, detail))
        log.info("%s%s %s: %s (%s)", name, self._note, CHECKS[name], STATE[passed], detail)

    def _has_kept(self) -> bool:
        """Whether the planner was left in charge and did not fail."""
        pilot = self.lab.pilot
        return pilot is not None and pilot.mode is Mode.FULL and not pilot.counts["fault"]

    def _counts(self) -> dict[str, int]:
        return dict(self.lab.pilot.counts) if self.lab.pilot is not None else {}

    def _texts(self, name: str, jobs: Sequence[Job], evicts: float, runs: float) -> None:
        """The same texts under an erratic planner as under the stock, as far as the stock agrees with itself."""
        lab = self.lab
        lab.fly("stock")
        reference = lab.run(jobs)
        turned = lab.run(list(reversed(jobs)))
        bar = alike(reference, reversed(turned))
        lab.fly("full", lambda: Erratic(1, evicts, runs))
        score = alike(reference, lab.run(jobs))
        text = f"alike {score:.3f}, stock with itself {bar:.3f}, {lab.watch.pauses} pauses, {self._counts()}"
        self._add(name, self._has_kept() and score >= bar - LEAST_ALIKE, text)

    def _ends(self, name: str, jobs: Sequence[Job]) -> None:
        """Under the real planner everybody gets all tokens."""
        self.lab.fly("full")
        ran = self.lab.run(jobs)
        whole = all(len(each.ids) == each.job.new for each in ran)
        self._add(name, whole and self._has_kept(), f"{len(jobs)} requests, {self._counts()}")

    def _long_pause(self) -> None:
        if self.lab.built.max_context < 2400:
            self._add("G2", None, f"max_context is {self.lab.built.max_context}")
        else:
            self._texts("G2", self.lab.jobs(4, 2300, 48), evicts=0.05, runs=0.9)

    def _given_up(self) -> None:
        """One prompt is given up in its middle by its caller, another one paused there; then both are sent again."""
        lab, block = self.lab, self.lab.config.block_tokens
        size = max(4, min(64, (lab.built.max_context - 40) // block)) * block
        for name, evicts_at, gives_up in (("cancelled", 0, 3), ("paused", 4, 0)):
            job = Job(0.0, lab.prompt(size), 24)
            lab.fly("full", partial(Erratic, 2, 0.0, 1.0, size=block, evicts_at=evicts_at))
            if evicts_at and lab.pilot is not None:
                lab.pilot.risk_pauses_in_prompts()
            lab.run([job], gives_up)
            lab.fly("full")
            self.untampered[name] = lab.run([Job(0.0, (*job.prompt, 5), 24)])[0]

    def _with_drafts(self) -> None:
        if self.lab.config.tensorrt_llm.speculation == "draft_target":
            self._texts("G5", self.lab.jobs(8, 200, 48), evicts=0.1, runs=0.8)
        else:
            self._add("G5", None, "no draft model is set")

    def _exhaustion(self) -> None:
        """More context than there are blocks."""
        lab = self.lab
        room = lab.built.capabilities.num_blocks * lab.built.capabilities.block_tokens
        each = max(2, lab.built.max_context // 2)
        count = 2 + room // each
        if count > 4 * lab.config.max_batch_requests or count * each > 4_000_000:
            self._add("G8", None, f"{room} tokens fit: set kv_fraction lower to try")
        else:
            self._ends("G8", lab.jobs(int(count), each, min(64, each // 2)))


# With an engine of its own


def alone(version_dir: Path, jobs: Sequence[Job], paced: Sequence[Job]) -> tuple[list[Ran], dict[str, float]] | None:
    """`jobs` one after the other, and the pace of `paced`, on a fresh engine in processes of its own; None: it failed.

    In a child process: TensorRT-LLM decides only once in a process where its engine goes.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, said = Path(folder) / "asked.json", Path(folder) / "said.json"
        asked.write_text(json.dumps([[[job.prompt, job.new] for job in each] for each in (jobs, paced)]))
        command = [sys.executable, "-m", __name__, str(version_dir), str(asked), str(said)]
        environment = {**os.environ, "TLLM_WORKER_USE_SINGLE_PROCESS": "0"}
        done = subprocess.run(command, env=environment, timeout=ALONE_SECONDS, check=False)
        if done.returncode:
            return None
        texts, paces = json.loads(said.read_text())
    return [Ran(job, ids) for job, ids in zip(jobs, texts, strict=True)], paces


def _answer(version_dir: Path, asked: Path, said: Path) -> None:
    """What `alone` does, in the child."""
    config = _governed(read_config(version_dir))
    built = build(config, version_dir)
    try:
        lab = Lab(config, built)
        jobs, paced = ([Job(0.0, tuple(p), new) for p, new in each] for each in json.loads(asked.read_text()))
        texts = [lab.run([job])[0].ids for job in jobs]
        said.write_text(json.dumps([texts, pace(lab, paced)]))
    finally:
        built.front.shutdown()


def _governed(config: EngineConfig) -> EngineConfig:
    return replace(config, tensorrt_llm=replace(config.tensorrt_llm, mode="governor"))


def pace(lab: Lab, jobs: Sequence[Job]) -> dict[str, float]:
    """Median milliseconds to the first token and per later one, of the second time that they are played."""
    lab.run(jobs)
    ran = [each for each in lab.run(jobs) if len(each.times) > 1]
    first = [each.times[0] for each in ran]
    later = [(each.times[-1] - each.times[0]) / (len(each.times) - 1) for each in ran]
    return {"ttft_ms": 1000 * float(np.median(first)), "tpot_ms": 1000 * float(np.median(later))}


def compare(version_dir: Path, first: First) -> list[Result]:
    """G4 and G10: against an engine that nobody has tampered with, in processes of its own."""
    names = list(first.untampered)
    there = alone(version_dir, [first.untampered[name].job for name in names], first.paced)
    if there is None:
        return [Result(name, CHECKS[name], False, "the engine in its own process failed") for name in ("G4", "G10")]
    texts = dict(zip(names, there[0], strict=True))
    scores = {name: alike([first.untampered[name]], [texts[name]]) for name in names}
    where = "this process" if first.is_here else "processes of its own"
    detail = ", ".join(
        f"{key} {value:.2f} in {where}, {there[1][key]:.2f} in its own" for key, value in first.pace.items()
    )
    return [_prefixes(scores, first.report["settings"]), Result("G10", CHECKS["G10"], True, detail)]


def _prefixes(scores: Mapping[str, float], settings: Mapping[str, Any]) -> Result:
    """That ours does not give prompts up in their middle is what is checked; what would happen else is told."""
    if not scores:
        return Result("G4", CHECKS["G4"], None, "the planner is not in the engine's place")
    least = 1 - 2 * LEAST_ALIKE
    bears = "bears" if scores["paused"] > least else "does not bear"
    text = f"alike {scores['cancelled']:.3f} after a cancel (reuse {settings['tensorrt_llm']['block_reuse']})"
    text += f"; this release {bears} a pause there ({scores['paused']:.3f}), which is never made with reuse"
    return Result("G4", CHECKS["G4"], scores["cancelled"] > least, text)


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
    report, samples = check(config, args.version_dir, args.seconds)
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.profile and report["fit"]:
        write_profile(args.profile, report, samples)
    print(table(report["workload"]))
    for result in report["checks"]:
        print(f"{result['name']:12} {STATE[result['passed']]:10} {result['what']}: {result['detail']}")
    print(f"probe: mode {report['probe']['mode']}; " + ("; ".join(report["probe"]["reasons"]) or "every check passed"))
    print(f"all of it is in {args.out}")
    return 1 if any(result["passed"] is False for result in report["checks"]) else 0


STATE: Final = {True: "passed", False: "FAILED", None: "not tried"}


@dataclass(frozen=True, slots=True)
class First:
    """What the engine with the planner in it gave. `pace`: of `paced` under the stock; `is_here`: in this process."""

    report: dict[str, Any]
    results: list[Result]
    samples: list[Sample]
    untampered: dict[str, Ran]
    paced: list[Job]
    pace: dict[str, float]
    is_here: bool


def check(config: EngineConfig, version_dir: Path, seconds: float) -> tuple[dict[str, Any], list[Sample]]:
    """Everything, in order. Each engine is gone before the next one is loaded."""
    first = first_engine(config, version_dir, seconds)
    _let_go()
    results = [*first.results, *compare(version_dir, first), *_other_overlap(config, version_dir)]
    results.sort(key=lambda result: list(CHECKS).index(result.name.partition(" ")[0]))
    return {**first.report, "checks": [asdict(result) for result in results]}, first.samples


def _let_go() -> None:
    """Give back the GPU's memory of an engine that nobody refers to any more."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def first_engine(config: EngineConfig, version_dir: Path, seconds: float) -> First:
    """Start, probe, check, play the workload in every mode, and fit."""
    started = time.monotonic()
    built = build(config, version_dir)
    ready = time.monotonic() - started
    try:
        lab = Lab(config, built)
        checks = Checks(lab)
        results = checks.run()
        rows, seen, fitted = play(lab, seconds)
        lab.fly("stock")
        paced = lab.jobs(8, 128, 48)
        paces, is_here = pace(lab, paced), lab.engine is not None
    finally:
        built.front.shutdown()
    report = {
        "tensorrt_llm": built.version,
        "gpu": built.gpu,
        "settings": config.to_json(),
        "start": {"seconds": ready, "mode": built.mode.value},
        "probe": {"mode": built.findings.mode.value, "reasons": list(built.findings.reasons)},
        "capabilities": asdict(built.capabilities),
        "fit": None if fitted is None else {"perf": fitted[0].to_json(), "mape": fitted[1]},
        "decode_ms": {mode: 1000 * value for mode, value in host_time(seen).items()},
        "workload": rows,
    }
    samples = [Sample(shape, value) for each in seen.values() for shape, value in each]
    return First(report, [*results, _fit_result(fitted)], samples, checks.untampered, paced, paces, is_here)


def play(
    lab: Lab, seconds: float
) -> tuple[list[dict[str, Any]], dict[str, list[tuple[BatchShape, float]]], tuple[PerfModel, float] | None]:
    """One workload in every mode that the probe allows; the batches that were seen, and the time model of the last."""
    rows, seen, fitted = [], {}, None
    jobs = workload(lab, lab.built.perf, seconds)
    allowed = {Mode.FULL: 4, Mode.TRIM: 3, Mode.GOVERNOR: 1}[lab.built.findings.mode]
    for mode in MODES[:allowed]:
        lab.fly(mode)
        rows.append(summary(mode, lab.run(jobs), lab.pilot))
        if lab.pilot is not None:
            seen[mode] = list(lab.pilot.samples)
            fitted = fit_observed(seen[mode]) or fitted
    return rows, seen, fitted


def _fit_result(fitted: tuple[PerfModel, float] | None) -> Result:
    if fitted is None:
        return Result("G9", CHECKS["G9"], None, "too few batches were seen")
    return Result("G9", CHECKS["G9"], fitted[1] < MOST_MAPE, f"MAPE {fitted[1]:.1f} % on batches left out")


def _other_overlap(config: EngineConfig, version_dir: Path) -> list[Result]:
    """The checks that overlap matters to, with it the other way."""
    own = config.tensorrt_llm
    note = " plain" if own.overlap else " overlap"
    try:
        turned = replace(config, tensorrt_llm=replace(own, overlap=not own.overlap))
        built = build(turned, version_dir)
    except ValueError as error:
        return [Result(name + note, CHECKS[name], None, str(error)) for name in ("G1", "G3")]
    try:
        return Checks(Lab(turned, built), note).overlap_matters()
    finally:
        built.front.shutdown()


def write_profile(path: Path, report: Mapping[str, Any], samples: Sequence[Sample]) -> None:
    """A profile file as `profile` in engine.json takes it."""
    perf = PerfModel.from_json(report["fit"]["perf"])
    fit = FitQuality(float("nan"), report["fit"]["mape"], len(samples))
    host = {"gpu": report["gpu"], "tensorrt_llm": report["tensorrt_llm"]}
    profile = Profile(host, {"model": report["settings"]["model"]}, perf, fit, tuple(samples))
    path.write_text(json.dumps(profile.to_json()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    _answer(*map(Path, sys.argv[1:]))
