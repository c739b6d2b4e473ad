"""From the settings to a running set: model, engine, time model, scheduler. The one place that knows them all."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from slos_serve.scheduler import POLICIES, Advance, BatchShape, PerfModel, Request, Scheduler, Slo, Stage, StepReport
from slos_serve.scheduler.engine import Planner
from slos_serve.scheduler.recording import Header, Recorder

from .config import EngineConfig
from .herald import Meter
from .loading import Loaded, load_engine, weights_fingerprint
from .metrics import Metrics
from .profiling import SHORT_SECONDS, Profile, fit_samples, measure
from .replay_file import Tape
from .responder import Reply
from .roster import Roster
from .sessions import Sessions
from .tickets import Tickets
from .tokenizer import Codec
from .worker import Observer, ServingEngine, Voice, Worker

log = logging.getLogger(__name__)


class AnyWorker(Protocol):
    """What takes the requests of one replica, whoever owns the engine's loop."""

    @property
    def tickets(self) -> Tickets: ...
    def start(self) -> None: ...
    def submit(self, reply: Reply) -> None: ...
    def cancel(self, reply: Reply) -> None: ...
    def cancel_id(self, request_id: str) -> None: ...
    def close(self, drain: float) -> None: ...


class Replica(Protocol):
    """A loaded engine with what its callers need to know, and how to put a worker on it."""

    @property
    def codec(self) -> Codec: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def perf(self) -> PerfModel: ...
    @property
    def max_context(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def think_end_id(self) -> int | None: ...
    def prefill_seconds(self, tokens: int) -> float: ...
    def worker(
        self,
        voice: Voice,
        observer: Metrics,
        roster: Roster,
        sessions: Sessions,
        failed: Callable[[BaseException], None],
    ) -> tuple[AnyWorker, Meter]: ...


@dataclass(frozen=True, slots=True)
class Built:
    """A replica on the PyTorch engine."""

    engine: ServingEngine
    codec: Codec
    vocab_size: int
    scheduler: Planner
    perf: PerfModel
    fingerprint: str = ""  # equal for instances whose answers go on where another's ended
    think_end_id: int | None = None

    @property
    def max_context(self) -> int:
        """The longest prompt plus output, by the engine's positions and by its memory."""
        limits = self.engine.capabilities
        return min(limits.max_context, limits.num_blocks * limits.block_tokens)

    def batch_seconds(self, shape: BatchShape) -> float:
        """The time of a batch, as corrected by what was measured while serving."""
        raw = self.perf.seconds(shape)
        return self.scheduler.batch_seconds(shape) if isinstance(self.scheduler, Scheduler) else raw

    def prefill_seconds(self, tokens: int) -> float:
        """The time that a prompt of so many tokens takes on an idle machine, in batches as large as they may be."""
        whole = self.engine.capabilities.max_batch_tokens
        starts = range(0, tokens, whole)
        sizes = [min(whole, tokens - start) for start in starts]
        areas = [size * (start + 0.5 * size) for start, size in zip(starts, sizes, strict=True)]
        return math.fsum(self.perf.seconds(BatchShape(n, 0, area)) for n, area in zip(sizes, areas, strict=True))

    def worker(
        self,
        voice: Voice,
        observer: Observer,
        roster: Roster,
        sessions: Sessions,
        failed: Callable[[BaseException], None],
    ) -> tuple[Worker, Meter]:
        meter = Meter(self.engine.capabilities, self.batch_seconds)
        return Worker(self.scheduler, self.engine, voice, observer, roster, sessions, failed, meter), meter


def build_engine(config: EngineConfig, version_dir: Path) -> Replica:
    """Load, warm up and time everything. Raises ValueError or OSError naming what is wrong."""
    if config.engine == "tensorrt_llm":
        from .trtllm_engine import build

        return build(config, version_dir)
    if config.policy not in POLICIES:
        raise ValueError(f"policy: must be one of {', '.join(POLICIES)}, got {config.policy!r}")
    started = time.monotonic()
    loaded = load_engine(config, version_dir)
    log.info("model %s loaded in %.1f s", version_dir / config.model, time.monotonic() - started)
    perf = _time_model(config, version_dir, loaded)
    scheduler: Planner = POLICIES[config.policy](loaded.engine.capabilities, perf)
    warm_up(POLICIES[config.policy](loaded.engine.capabilities, perf))
    if config.record:
        header = Header(config.policy, loaded.engine.capabilities, perf)
        scheduler = Recorder(scheduler, header, Tape(version_dir / config.record).write)
        log.info("recording to %s", version_dir / config.record)
    log.info("%s is ready after %.1f s: %s", config.policy, time.monotonic() - started, loaded.engine.capabilities)
    fingerprint = weights_fingerprint(version_dir / config.model, config.dtype)
    return Built(loaded.engine, loaded.codec, loaded.vocab_size, scheduler, perf, fingerprint, loaded.think_end_id)


def _time_model(config: EngineConfig, version_dir: Path, loaded: Loaded) -> PerfModel:
    """That of the profile file where it is about this host and model, else one measured now."""
    path = version_dir / (config.profile or "profile.json")
    if path.exists():
        profile = Profile.read(path)
        if profile.is_about(loaded.host, loaded.model):
            measure(loaded.engine, loaded.vocab_size, 0.0)  # warms up
            log.info("time model from %s, MAPE %.1f %%", path, profile.fit.mape)
            return profile.perf
        log.warning("%s is about another host or model: measuring for %.0f s instead", path, SHORT_SECONDS)
    elif config.profile:
        raise ValueError(f"profile: there is no file {path}; write one with `slos-serve profile`, or set null")
    samples = measure(loaded.engine, loaded.vocab_size, SHORT_SECONDS)
    perf, score = fit_samples(samples)
    log.info("time model from %d batches measured now, R2 %.2f, MAPE %.1f %%", len(samples), score.r2, score.mape)
    return perf


def warm_up(scheduler: Planner) -> None:
    """Plan and report for a request with and one without an SLO, so that the first real ones compile nothing."""
    for name, slo in (("promised", Slo(10.0, 1.0)), ("free", None)):
        scheduler.add(Request(name, 0.0, 1, (Stage(1, slo),)), 0.0)
    plan = scheduler.plan(0.0)
    scheduler.report(StepReport(0.0, 1.0, tuple(Advance(each.request_id, 1, 1, done=True) for each in plan.chunks)))
