"""From the settings to a running set: model, engine, time model, scheduler. The one place that knows them all."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

from slos_serve.scheduler import POLICIES, BatchShape, PerfModel, Request, Scheduler, Slo, Stage
from slos_serve.scheduler.engine import Planner

from .config import EngineConfig
from .loading import Loaded, load_engine, weights_fingerprint
from .profiling import SHORT_SECONDS, Profile, fit_samples, measure
from .tokenizer import Codec
from .worker import ServingEngine

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Built:
    """Everything one replica runs with."""

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
        return self.scheduler.correction.apply(raw) if isinstance(self.scheduler, Scheduler) else raw

    def prefill_seconds(self, tokens: int) -> float:
        """The time that a prompt of so many tokens takes on an idle machine, in batches as large as they may be."""
        whole = self.engine.capabilities.max_batch_tokens
        starts = range(0, tokens, whole)
        sizes = [min(whole, tokens - start) for start in starts]
        areas = [size * (start + 0.5 * size) for start, size in zip(starts, sizes, strict=True)]
        return math.fsum(self.perf.seconds(BatchShape(n, 0, area)) for n, area in zip(sizes, areas, strict=True))


def build_engine(config: EngineConfig, version_dir: Path) -> Built:
    """Load, warm up and time everything. Raises ValueError or OSError naming what is wrong."""
    if config.policy not in POLICIES:
        raise ValueError(f"policy: must be one of {', '.join(POLICIES)}, got {config.policy!r}")
    started = time.monotonic()
    loaded = load_engine(config, version_dir)
    log.info("model %s loaded in %.1f s", version_dir / config.model, time.monotonic() - started)
    perf = _time_model(config, version_dir, loaded)
    scheduler = POLICIES[config.policy](loaded.engine.capabilities, perf)
    _warm_up(POLICIES[config.policy](loaded.engine.capabilities, perf))
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


def _warm_up(scheduler: Planner) -> None:
    """Plan once for a request with and one without an SLO, so that the first real plan compiles nothing."""
    for name, slo in (("promised", Slo(10.0, 1.0)), ("free", None)):
        scheduler.add(Request(name, 0.0, 1, (Stage(1, slo),)), 0.0)
    scheduler.plan(0.0)
