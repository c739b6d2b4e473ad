"""How long TensorRT-LLM's iterations take: a profile, a shipped time model of this GPU and model, or a warm-up run."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final, TypeAlias

from slos_serve.scheduler import BatchShape, PerfModel, Request, Stage

from .config import EngineConfig
from .generation import Generation, SamplingParams
from .profiling import Profile, Sample, fit_samples
from .shipped import shipped_profile
from .trtllm_front import LlmFront, LlmHandle
from .trtllm_pilot import Pilot, Ticket
from .trtllm_ranks import RemotePilot
from .trtllm_worker import Tickets

log = logging.getLogger(__name__)

Timed: TypeAlias = tuple[BatchShape, float]  # a batch and its seconds

WARM_UP_SECONDS: Final = 20.0
WARM_UP_ROUNDS: Final = (
    (1, 64, 16), (4, 256, 24), (16, 128, 24), (1, 1024, 8), (32, 512, 32), (2, 2048, 8), (64, 64, 32)
)  # fmt: skip
LEAST_SAMPLES: Final = 40
# Iterations of this length are assumed until some were measured: about those of an 8 B model on an A100.
UNMEASURED: Final = {"pieces": [[2e-5, 0.0, 0.012]], "per_context": 5e-8, "per_area": 1e-9}


def known_time_model(config: EngineConfig, version_dir: Path) -> PerfModel | None:
    """The time model that needs no measuring: a profile file, else the shipped one of this GPU and model."""
    if config.profile:
        return Profile.read(version_dir / config.profile).perf
    found = shipped_profile(gpu_name(), version_dir / config.model, config.tensorrt_llm.tensor_parallel)
    if found is None:
        return None
    log.info("time model of %s", found[0])
    return found[1]


def time_model(
    config: EngineConfig,
    version_dir: Path,
    front: LlmFront,
    shadow: Callable[[], Pilot | RemotePilot | None],
    vocab_size: int,
    tickets: Tickets,
) -> PerfModel:
    """The known time model, else one measured in a warm-up run.

    `shadow` lets a pilot look on, which sees every batch. Where none can, batches are told from the outside: by the
    prompts and by the tokens as they come. Times are assumed, and it is said so, where even that brought too few.
    """
    known = known_time_model(config, version_dir)
    if known is not None:
        return known
    pilot = shadow()
    seen = asyncio.run(_exercise(front, config, vocab_size, tickets, WARM_UP_SECONDS))
    fitted = fit_observed(pilot.samples if pilot is not None else seen)
    if fitted is None:
        log.warning("iteration times are assumed, not measured: give a profile")
        return PerfModel.from_json(UNMEASURED)
    log.info("time model of a warm-up run, MAPE %.1f %%", fitted[1])
    return fitted[0]


async def _exercise(
    front: LlmFront, config: EngineConfig, vocab_size: int, tickets: Tickets, seconds: float
) -> list[Timed]:
    """Run random prompts of several sizes and numbers, for about `seconds` but every size once; what was seen of it."""
    chance = random.Random(0)
    until = time.monotonic() + seconds
    seen: list[Timed] = []
    first = True
    while first or time.monotonic() < until:
        for count, prompt, new in WARM_UP_ROUNDS:
            if not first and time.monotonic() > until:
                break
            prompt = min(prompt, config.max_context - new - 1)
            if prompt < 1:
                continue
            count = min(count, config.max_batch_requests)
            sizes = [max(1, prompt - chance.randrange(prompt // 2 + 1)) for _ in range(count)]
            started = time.monotonic()
            handles = []
            for index, size in enumerate(sizes):
                name, ids = f"warm-up-{index}", [chance.randrange(vocab_size) for _ in range(size)]
                wish = Generation(name, ids, (new,), SamplingParams(ignore_eos=True))
                ticket = Ticket(Request(name, started, size, (Stage(new),)))
                handles.append(front.generate(wish, (), tickets, ticket))
            times = await asyncio.gather(*map(_times, handles))
            seen += _told(sizes, config.max_batch_tokens, started, times)
            for handle in handles:
                tickets.pop(handle.client_id, None)
        first = False
    return seen


async def _times(handle: LlmHandle) -> list[float]:
    """When each token came."""
    times: list[float] = []
    async for fresh in handle.results():
        times += [time.monotonic()] * len(fresh.token_ids)
    return times


def _told(sizes: Sequence[int], most: int, started: float, times: Sequence[Sequence[float]]) -> list[Timed]:
    """The batches of one round, seen from outside: a lone prompt's of at most `most` tokens, and those in which
    everybody decodes."""
    seen: list[Timed] = []
    if len(sizes) == 1 and sizes[0] <= most:
        seen.append((BatchShape(sizes[0], 0, 0.5 * sizes[0] ** 2), times[0][0] - started))
    begin, end = max(each[0] for each in times), min(each[-1] for each in times)
    steps = [at for at in times[0] if begin <= at <= end]
    for index, (before, after) in enumerate(itertools.pairwise(steps), start=1):
        if after > before:
            seen.append((BatchShape(len(sizes), sum(sizes) + index * len(sizes)), after - before))
    return seen


def gpu_name() -> str:
    """What the driver calls the GPU; empty without one."""
    import torch

    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else ""


def fit_observed(samples: Iterable[Timed]) -> tuple[PerfModel, float] | None:
    """The time model of batches that were seen, and its error in percent; None for too few."""
    kept = [Sample(shape, seconds) for shape, seconds in list(samples) if seconds > 0]
    if len(kept) < LEAST_SAMPLES:
        return None
    perf, score = fit_samples(kept)
    return perf, score.mape
