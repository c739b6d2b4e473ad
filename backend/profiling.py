"""Measures an engine over a grid of batches and fits the time model that the scheduler plans with.

    slos-serve profile MODEL_REPOSITORY/MODEL/1

A profile file holds the measured batches, the fitted coefficients, the quality of the fit on batches it
was not fitted to, and which host and model it is about; a server uses it only where these are its own.
The engine is left without requests. Timings are of the engine alone, without scheduling and sending.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from slos_serve.scheduler.core import Chunk, Plan
from slos_serve.scheduler.observed import shape_of
from slos_serve.scheduler.perf import BatchShape, FitQuality, PerfModel, fit, quality

from .generation import Generation, SamplingParams
from .worker import ServingEngine

log = logging.getLogger(__name__)

FULL_SECONDS: Final = 60.0
SHORT_SECONDS: Final = 3.0
LEAST_SAMPLES: Final = 20
HELD_OUT: Final = 0.25
OUTLIER: Final = 4.0


@dataclass(frozen=True, slots=True)
class Stage:
    """Batches around `count` decodes at `context` tokens: alone, with guesses, and beside a chunk of a prompt.

    `prefills` are chunk lengths; where there is no decode they come alone, after `past` tokens of their prompt.
    """

    count: int
    context: int
    prefills: tuple[int, ...]
    past: int = 0


# In this order, so that a few seconds already see every term of the model; each round draws its sizes anew.
STAGES: Final = (
    Stage(1, 32, (32,)),
    Stage(0, 0, (16, 64, 256, 512)),
    Stage(8, 64, (16, 128)),
    Stage(32, 64, (64,)),
    Stage(0, 0, (512, 128), past=512),
    Stage(16, 256, (32, 256)),
    Stage(4, 512, (64, 512)),
    Stage(32, 256, (128,)),
    Stage(0, 0, (1024, 2048), past=1024),
    Stage(64, 128, (64, 512)),
)


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
        """A request with a random prompt, of which nothing is computed unless it was seen before."""
        self.count += 1
        request_id = f"profile-{self.count}"
        ids = tuple(self.chance.randrange(self.vocab_size) for _ in range(prompt_tokens))
        limit = self.engine.capabilities.max_context - prompt_tokens
        sampling = SamplingParams(ignore_eos=True)
        self.computed[request_id] = self.engine.add(Generation(request_id, ids, (limit,), sampling))
        return request_id

    def drop(self, request_id: str) -> None:
        self.engine.release(request_id)
        del self.computed[request_id]

    def drop_all(self) -> None:
        for request_id in list(self.computed):
            self.drop(request_id)

    def step(self, chunks: Sequence[Chunk]) -> None:
        """Run one batch, which is one more sample."""
        report = self.engine.step(Plan(tuple(chunks)), time.monotonic())
        for advance in report.advances:
            self.computed[advance.request_id] = advance.computed
        self.samples.append(Sample(shape_of(chunks), report.finished_at - report.started_at))

    def chunk(self, request_id: str, length: int, draft: int = 0) -> Chunk:
        """The next `length` tokens of a request, the last `draft` of them guesses."""
        return Chunk(request_id, self.computed[request_id], length, draft)

    def prefill(self, prompts: Mapping[str, int]) -> Iterator[None]:
        """Compute whole prompts of so many tokens, as many in a batch as it holds."""
        left = dict(prompts)
        while left:
            room = self.engine.capabilities.max_batch_tokens
            chunks = []
            for request_id in list(left)[: self.engine.capabilities.max_batch_requests]:
                length = min(left[request_id] - self.computed[request_id], room)
                if length > 0:
                    chunks.append(self.chunk(request_id, self._legal(length, left[request_id])))
                    room -= length
            self.step(chunks)
            left = {name: tokens for name, tokens in left.items() if self.computed[name] < tokens}
            yield

    def _legal(self, length: int, whole: int) -> int:
        multiple = self.engine.capabilities.chunk_multiple
        return length if length == whole else max(length - length % multiple, min(multiple, length))

    def batches(self, stage: Stage) -> Iterator[None]:
        """The batches of a stage, as far as the engine can run them."""
        limits = self.engine.capabilities
        room = limits.num_blocks * limits.block_tokens // 2
        past = self._vary(min(stage.past, limits.max_context // 2))
        context = self._vary(min(stage.context, limits.max_context // 2))
        count = min(stage.count, limits.max_batch_requests - 1, limits.max_batch_tokens, room // max(context, 1))
        decodes = [self.add(context) for _ in range(count)]
        yield from self.prefill(dict.fromkeys(decodes, context))
        if decodes:
            yield from self._decode(decodes)
        for most in stage.prefills:
            length = self._vary(min(most, limits.max_batch_tokens - count, limits.max_context - past - 2, room - past))
            if length > 0:
                yield from self._prefill_beside(decodes, past, length)
        self.drop_all()

    def _decode(self, decodes: Sequence[str]) -> Iterator[None]:
        limits = self.engine.capabilities
        for draft in (0, *range(1, limits.max_draft + 1), 0):
            if len(decodes) * (1 + draft) <= limits.max_batch_tokens:
                self.step([self.chunk(name, 1 + draft, draft) for name in decodes])
                yield

    def _prefill_beside(self, decodes: Sequence[str], past: int, length: int) -> Iterator[None]:
        fresh = self.add(past + length)
        if past:
            yield from self.prefill({fresh: past})
        left = past + length - self.computed[fresh]
        self.step([*(self.chunk(name, 1) for name in decodes), self.chunk(fresh, left)])
        self.drop(fresh)
        yield

    def _vary(self, most: int) -> int:
        """A size a little below `most`, so that no two rounds measure the same batches."""
        return most - self.chance.randrange(most // 4 + 1) if most > 0 else 0


def measure(engine: ServingEngine, vocab_size: int, seconds: float, seed: int = 0) -> tuple[Sample, ...]:
    """Run batches of all kinds for about `seconds`, but not fewer than a fit needs.

    All requests are released.
    """
    run = _Run(engine, vocab_size, random.Random(seed))
    until = time.monotonic() + seconds
    try:
        for _ in run.batches(STAGES[0]):
            run.samples.clear()  # the first batches pay for what is set up once
        run.drop_all()
        while True:
            for _ in (None for stage in STAGES for _ in run.batches(stage)):
                if time.monotonic() > until and len(run.samples) >= LEAST_SAMPLES:
                    return tuple(run.samples)
    finally:
        run.drop_all()


def fit_samples(samples: Sequence[Sample], seed: int = 0) -> tuple[PerfModel, FitQuality]:
    """The time model of all samples, and how well one fitted to three quarters predicts the others."""
    mixed = list(samples)
    random.Random(seed).shuffle(mixed)
    held_out = mixed[: max(1, int(len(mixed) * HELD_OUT))]
    score = quality(_robust_fit(mixed[len(held_out) :]), *_columns(held_out))
    return _robust_fit(samples), score


def _robust_fit(samples: Sequence[Sample]) -> PerfModel:
    """Fit twice, the second time without the batches that something else on the machine held up."""
    trial = fit(*_columns(samples))
    errors = [abs(trial.seconds(sample.shape) / sample.seconds - 1) for sample in samples]
    limit = OUTLIER * max(statistics.median(errors), 0.01)
    return fit(*_columns([sample for sample, error in zip(samples, errors, strict=True) if error <= limit]))


def _columns(samples: Sequence[Sample]) -> tuple[list[BatchShape], list[float]]:
    return [sample.shape for sample in samples], [sample.seconds for sample in samples]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("version_dir", type=Path, help="the version folder of a model, with engine.json in it")
    parser.add_argument("--seconds", type=float, default=FULL_SECONDS, help="how long to measure (default 60)")
    parser.add_argument("--output", type=Path, help="profile file to write (default VERSION_DIR/profile.json)")


def run(args: argparse.Namespace) -> int:
    """Measure, write the profile file and print the fit."""
    from .config import read_config
    from .loading import load_engine

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
