"""Measures an engine over a grid of batches and fits the time model that the scheduler plans with.

    slos-serve profile MODEL_REPOSITORY/MODEL/1

A profile file holds the measured batches, the fitted coefficients, the quality of the fit on batches it
was not fitted to, and which host and model it is about; a server uses it only where these are its own.
The engine is left without requests. Timings are of the engine alone, without scheduling and sending.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import platform
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from slos_serve.scheduler.core import Chunk, Plan
from slos_serve.scheduler.perf import BatchShape, FitQuality, PerfModel, fit, quality

from .sampling import SamplingParams
from .torch_engine import Generation
from .worker import ServingEngine

log = logging.getLogger(__name__)

FULL_SECONDS: Final = 60.0
SHORT_SECONDS: Final = 3.0
# Decodes in the batch and their context, in the order in which they are reached: cheap ones first.
STAGES: Final = ((1, 32), (4, 64), (8, 128), (16, 128), (16, 256), (32, 256), (32, 512), (64, 512))
PREFILLS: Final = (8, 32, 64, 128, 256, 512, 1024, 2048)
DRAFTS: Final = (1, 2, 4, 8)
REPEATS: Final = 3
HELD_OUT_EVERY: Final = 4
LEAST_SAMPLES: Final = 16


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured batch."""

    shape: BatchShape
    seconds: float


@dataclass(frozen=True, slots=True)
class Profile:
    """A time model with where it comes from. `fit` scores it on held-out batches."""

    host: Mapping[str, Any]
    model: Mapping[str, Any]
    perf: PerfModel
    fit: FitQuality
    samples: tuple[Sample, ...] = ()

    def is_about(self, host: Mapping[str, Any], model: Mapping[str, Any]) -> bool:
        return dict(self.host) == dict(host) and dict(self.model) == dict(model)

    def to_json(self) -> dict[str, Any]:
        return {
            "host": dict(self.host),
            "model": dict(self.model),
            "perf": self.perf.to_json(),
            "fit": asdict(self.fit),
            "samples": [[*asdict(sample.shape).values(), sample.seconds] for sample in self.samples],
        }

    @staticmethod
    def read(path: Path) -> Profile:
        """Raises ValueError naming the file for what is not a profile."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            samples = tuple(Sample(BatchShape(*row[:-1]), row[-1]) for row in data["samples"])
            return Profile(
                data["host"], data["model"], PerfModel.from_json(data["perf"]), FitQuality(**data["fit"]), samples
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a profile: {type(error).__name__}: {error}") from error


@dataclass(slots=True)
class _Run:
    """Requests kept alive between measured batches, and what was measured."""

    engine: ServingEngine
    vocab_size: int
    chance: random.Random
    samples: list[Sample] = field(default_factory=list)
    computed: dict[str, int] = field(default_factory=dict)
    count: int = 0

    def add(self, prompt_tokens: int) -> str:
        """A request with a random prompt, of which nothing is computed yet."""
        self.count += 1
        request_id = f"profile-{self.count}"
        ids = tuple(self.chance.randrange(self.vocab_size) for _ in range(prompt_tokens))
        limit = self.engine.capabilities.max_context - prompt_tokens
        sampling = SamplingParams(ignore_eos=True)
        self.engine.add(Generation(request_id, ids, (limit,), sampling, None))
        self.computed[request_id] = 0
        return request_id

    def drop(self, request_id: str) -> None:
        self.engine.release(request_id)
        del self.computed[request_id]

    def prefill(self, request_id: str, prompt_tokens: int) -> None:
        """Compute a whole prompt in chunks, each of them a sample."""
        while self.computed[request_id] < prompt_tokens:
            start = self.computed[request_id]
            self.samples.append(self.step([], (request_id, self._whole(start, prompt_tokens - start)), 0))

    def _whole(self, start: int, left: int) -> int:
        limits = self.engine.capabilities
        length = min(left, limits.max_batch_tokens)
        return length if length == left else max(limits.chunk_multiple, length - length % limits.chunk_multiple)

    def step(self, decodes: Sequence[str], prefill: tuple[str, int] | None, draft: int) -> Sample:
        """Run one batch: one token (and `draft` guesses) of each decode, and a chunk of a prompt."""
        chunks = [Chunk(request_id, self.computed[request_id], 1 + draft, draft) for request_id in decodes]
        area = 0.0
        if prefill is not None:
            start = self.computed[prefill[0]]
            chunks.append(Chunk(prefill[0], start, prefill[1]))
            area = prefill[1] * (start + 0.5 * prefill[1])
        context = sum(chunk.start for chunk in chunks[: len(decodes)])
        report = self.engine.step(Plan(tuple(chunks)), time.monotonic())
        for advance in report.advances:
            self.computed[advance.request_id] = advance.computed
        shape = BatchShape(sum(chunk.length for chunk in chunks), context, area, draft)
        return Sample(shape, report.finished_at - report.started_at)

    def repeat(self, decodes: Sequence[str], prefill_tokens: int, draft: int) -> None:
        """The fastest of some equal batches: what disturbs a batch is learnt while serving. A fresh prompt for each."""
        samples = []
        for _ in range(REPEATS):
            fresh = self.add(prefill_tokens) if prefill_tokens else None
            samples.append(self.step(decodes, (fresh, prefill_tokens) if fresh else None, draft))
            if fresh:
                self.drop(fresh)
        self.samples.append(min(samples, key=lambda sample: sample.seconds))


def measure(engine: ServingEngine, vocab_size: int, seconds: float, seed: int = 0) -> tuple[Sample, ...]:
    """Run batches of growing size for about `seconds`, but not fewer than a fit needs. All requests are released."""
    run = _Run(engine, vocab_size, random.Random(seed))
    until = time.monotonic() + seconds
    try:
        run.repeat([], min(16, engine.capabilities.max_batch_tokens), 0)
        run.samples.clear()  # the first batches pay for what is set up once
        for _ in _stages(run):
            if time.monotonic() > until and len(run.samples) >= LEAST_SAMPLES:
                break
        return tuple(run.samples)
    finally:
        for request_id in list(run.computed):
            run.drop(request_id)


def _stages(run: _Run) -> Iterator[None]:
    """Measured batch by measured batch, so that the caller can stop between any two."""
    limits = run.engine.capabilities
    decodes: list[str] = []
    room = limits.num_blocks * limits.block_tokens
    for count, context in STAGES:
        count = min(count, limits.max_batch_requests - 1)
        context = min(context, limits.max_context // 2)
        while len(decodes) < count and room > 3 * context:
            room -= 2 * context
            decodes.append(run.add(context))
            run.prefill(decodes[-1], context)
            yield
        decodes_now = decodes[: limits.max_batch_tokens]
        for draft in (0, *(d for d in DRAFTS if d <= limits.max_draft)):
            if (1 + draft) * len(decodes_now) <= limits.max_batch_tokens:
                run.repeat(decodes_now, 0, draft)
                yield
        for tokens in PREFILLS:
            if tokens + len(decodes_now) <= limits.max_batch_tokens and tokens < min(limits.max_context, room):
                run.repeat(decodes_now, tokens, 0)
                run.repeat([], tokens, 0)
                yield
        longest = min(limits.max_context - 2, room - limits.block_tokens, 8 * context)
        if longest > 0:
            request_id = run.add(longest)
            run.prefill(request_id, longest)
            run.drop(request_id)
            yield


def fit_samples(samples: Sequence[Sample]) -> tuple[PerfModel, FitQuality]:
    """The time model of all samples, and how well one fitted to three quarters predicts the others."""
    kept = [sample for index, sample in enumerate(samples) if index % HELD_OUT_EVERY]
    held_out = samples[::HELD_OUT_EVERY]
    trial = fit([s.shape for s in kept], [s.seconds for s in kept])
    score = quality(trial, [s.shape for s in held_out], [s.seconds for s in held_out])
    return fit([s.shape for s in samples], [s.seconds for s in samples]), score


def host_facts(device: str, num_threads: int) -> dict[str, Any]:
    """What the speed of an engine depends on, as far as this machine says it."""
    import torch

    gpu = torch.cuda.get_device_name() if device.startswith("cuda") else None
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "device": device,
        "threads": num_threads,
        "torch": torch.__version__,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def model_facts(engine: str, folder: Path, draft: Path | None, dtype: str) -> dict[str, Any]:
    """What the speed of a model depends on: its shape, not its weights."""
    return {
        "engine": engine,
        "model": _fingerprint(folder),
        "draft_model": None if draft is None else _fingerprint(draft),
        "dtype": dtype,
    }


def _fingerprint(folder: Path) -> str:
    return hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()[:16]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("version_dir", type=Path, help="the version folder of a model, with engine.json in it")
    parser.add_argument("--seconds", type=float, default=FULL_SECONDS, help="how long to measure (default 60)")
    parser.add_argument("--output", type=Path, help="profile file to write (default VERSION_DIR/profile.json)")


def run(args: argparse.Namespace) -> int:
    """Measure, write the profile file and print the fit."""
    from .build import load_engine
    from .config import read_config

    if not args.seconds > 0:
        raise ValueError(f"--seconds: must be positive, got {args.seconds}")
    config = read_config(args.version_dir)
    loaded = load_engine(config, args.version_dir)
    samples = measure(loaded.engine, loaded.vocab_size, args.seconds)
    perf, score = fit_samples(samples)
    profile = Profile(loaded.host, loaded.model, perf, score, samples)
    output = args.output or args.version_dir / "profile.json"
    output.write_text(json.dumps(profile.to_json(), indent=1) + "\n", encoding="utf-8")
    print(f"{output}: {len(samples)} batches, held out {score.samples}: R2 {score.r2:.3f}, MAPE {score.mape:.1f} %")
    print(json.dumps(perf.to_json()))
    return 0
