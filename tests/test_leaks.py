"""Nothing grows with the number of requests served: neither the scheduler nor the engine nor its pool."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from slos_serve.backend.generation import Generation, SamplingParams
from slos_serve.backend.hf_model import load_model
from slos_serve.backend.torch_engine import TorchEngine
from slos_serve.scheduler import Capabilities, PerfModel, Piece, PlannerConfig, Request, Scheduler, Slo, Stage
from slos_serve.scheduler.recording import Header, Recorder
from slos_serve.scheduler.simulator import SimulatedEngine

PERF = PerfModel((Piece(0.004, 0.00002, 0.001), Piece(0.001, 0.00008, 0.001)), 1e-8, 1e-9)
REQUESTS = 100_000
AT_ONCE = 48
GROWTH_MB = 48


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def random_request(chance: np.random.Generator, number: int, now: float, most: int) -> Request:
    slo = Slo(float(chance.uniform(0.02, 2)), float(chance.uniform(0.01, 0.1))) if chance.random() < 0.7 else None
    prompt, new = int(chance.integers(1, most)), int(chance.integers(1, 9))
    return Request(f"r{number}", now, prompt, (Stage(new, slo),), slo_class=f"class-{number % 5}")


def test_a_hundred_thousand_requests_leave_nothing_behind() -> None:
    """Random arrivals, cancels and preemptions through scheduler and simulated engine: all counts end at zero, and
    the second half needs no more memory than the first."""
    caps = Capabilities(150, 16, 1024, AT_ONCE, 1024, max_draft=2)
    scheduler = Scheduler(caps, PERF, PlannerConfig(patience=1.0))
    planner = Recorder(scheduler, Header("slos_serve", caps, PERF), len)
    chance = np.random.default_rng(5)
    engine = SimulatedEngine(caps, PERF, chance, 0.05)
    live: dict[str, None] = {}
    now, arrived, cancelled, halfway = 0.0, 0, 0, 0.0
    while arrived < REQUESTS or live:
        while arrived < REQUESTS and len(live) < AT_ONCE and chance.random() < 0.9:
            request = random_request(chance, arrived, now, 300)
            engine.add(request, request.max_new_tokens, acceptance=0.6)
            planner.add(request, now)
            live[request.id] = None
            arrived += 1
            if arrived == REQUESTS // 2:
                halfway = resident_mb()
        if live and chance.random() < 0.05:
            victim = next(iter(live))
            planner.cancel(victim)
            engine.release(victim)
            del live[victim]
            cancelled += 1
        report = engine.step(planner.plan(now), now)
        if len(report.advances):
            planner.report(report)
        for advance in report.advances:
            if advance.done:
                del live[advance.request_id]
        now = report.finished_at
    snapshot = scheduler.snapshot()
    assert cancelled > 100
    assert snapshot.preempted_total > 100
    assert snapshot.admitted_total > 1000
    assert (snapshot.waiting, snapshot.prefilling, snapshot.decoding, snapshot.best_effort) == (0, 0, 0, 0)
    assert scheduler.free_blocks == engine.free_blocks == caps.num_blocks
    assert len(scheduler.table) == 0
    assert len(engine.slot_of) == 0
    assert scheduler.table.real.shape[1] <= 2 * AT_ONCE
    assert resident_mb() - halfway < GROWTH_MB


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def test_thousands_of_requests_leave_the_engine_s_pool_whole(folder: Path) -> None:
    """The real engine under the real scheduler, which compares both block counts at every step: shared prefixes,
    guesses, cancels and preemptions; in the end every block is free and at most one key a block is remembered."""
    torch.set_num_threads(1)
    model = load_model(folder, device="cpu")
    blocks = 60
    engine = TorchEngine(
        model, None, kv_cache_bytes=model.kv_bytes_per_token * 16 * (blocks + 2), max_batch_tokens=512,
        max_batch_requests=24, max_context=200, max_draft=2,
    )  # fmt: skip
    caps = engine.capabilities
    scheduler = Scheduler(caps, PERF, PlannerConfig(patience=0.2))
    chance = np.random.default_rng(8)
    openings = [chance.integers(2, 96, 64) for _ in range(4)]
    live: dict[str, None] = {}
    now, arrived = 0.0, 0
    while arrived < 3000 or live:
        while arrived < 3000 and len(live) < 24:
            opening = openings[int(chance.integers(4))][: int(chance.integers(1, 64))]
            prompt = np.concatenate([opening, chance.integers(2, 96, int(chance.integers(1, 40)))])
            slo = Slo(float(chance.uniform(0.05, 2)), 0.05) if chance.random() < 0.6 else None
            name, new = f"r{arrived}", int(chance.integers(1, 9))
            cached = engine.add(Generation(name, prompt, (new,), SamplingParams(seed=arrived)))
            scheduler.add(Request(name, now, len(prompt), (Stage(new, slo),), cached_tokens=cached), now)
            live[name] = None
            arrived += 1
        if chance.random() < 0.05:
            victim = next(reversed(live))
            scheduler.cancel(victim)
            engine.release(victim)
            del live[victim]
        plan = scheduler.plan(now)
        report = engine.step(plan, now)
        if plan.chunks or plan.evicted:
            scheduler.report(report)
        for advance in report.advances:
            if advance.done:
                del live[advance.request_id]
        now += 0.01
    engine._pool.check()
    report = engine.step(scheduler.plan(now), now)
    assert report.free_blocks == scheduler.free_blocks == blocks
    assert scheduler.snapshot().preempted_total > 10
    assert len(engine._sequences) == 0
    assert len(engine._pool._key_of) <= blocks
