"""How long one plan takes: median and p99 over running and waiting requests, TPOT tiers, and speculation.

    python tests/bench/bench_planner.py [--calls 200] [--json FILE]

Each call plans over a state of its own: `running` promised decodes with random contexts and slack, `waiting`
prompts that have just arrived with random sizes, deadlines and values, too many for all to be promised. A
plan that is not carried out is undone by cancelling nothing: the state is built anew for every call.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path

import numpy as np

from slos_serve.loadtest.cells import load_profile
from slos_serve.scheduler import Capabilities, PerfModel, Piece, Request, Scheduler, Slo, Stage, table

RUNNING = (0, 64, 256, 512)
WAITING = (1, 8, 16, 32, 64)
TIERS = (1, 2, 4)
DRAFTS = (0, 4)
TPOTS = (0.05, 0.1, 0.15, 0.2)


def state(rng: np.random.Generator, running: int, waiting: int, tiers: int, draft: int) -> Scheduler:
    """A scheduler with so many promised decodes and so many prompts without a first token, at second 0."""
    profile = load_profile("a100-llama-3-8b")
    caps = profile.capabilities
    caps = Capabilities(
        caps.num_blocks, caps.block_tokens, caps.max_batch_tokens, 1024, caps.max_context, max_draft=draft
    )
    pieces = tuple(Piece(p.base, p.per_token, 0.0015) for p in profile.perf.pieces)
    scheduler = Scheduler(caps, PerfModel(pieces, profile.perf.per_context, profile.perf.per_area))
    for i in range(running):
        slo = Slo(0.5, TPOTS[i % tiers])
        request = Request(f"r{i}", 0.0, int(rng.integers(50, 600)), (Stage(400, slo),))
        scheduler.add(request, 0.0)
        slot = scheduler.table.slot_of[request.id]
        known = request.prompt_tokens + 1
        whole, real = scheduler.table.whole, scheduler.table.real
        whole[table.KNOWN, slot], whole[table.COMPUTED, slot], whole[table.EMITTED, slot] = known, known - 1, 1
        whole[table.HELD, slot] = -(-known // caps.block_tokens)
        whole[table.KIND, slot] = table.PROMISED
        real[table.DUE, slot] = float(rng.uniform(0.05, 0.3))
        scheduler.books[0] += whole[table.HELD, slot]
    for i in range(waiting):
        slo = Slo(float(rng.uniform(0.1, 1.5)), TPOTS[i % tiers])
        prompt, weight = int(rng.integers(50, 4000)), float(rng.choice([1.0, 2.0]))
        scheduler.add(Request(f"w{i}", 0.0, prompt, (Stage(400, slo),), weight=weight), 0.0)
    return scheduler


def measure(calls: int, running: int, waiting: int, tiers: int, draft: int) -> dict[str, float]:
    """Milliseconds of CPU of `calls` plans."""
    rng = np.random.default_rng([running, waiting, tiers, draft])
    seconds = []
    for _ in range(calls):
        scheduler = state(rng, running, waiting, tiers, draft)
        started = time.thread_time()
        scheduler.plan(0.0)
        seconds.append(time.thread_time() - started)
    return {"median_ms": float(np.median(seconds)) * 1e3, "p99_ms": float(np.percentile(seconds, 99)) * 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    measure(1, 1, 1, 1, 4)  # compiles
    rows = []
    print("running  waiting  tiers  draft  median ms  p99 ms")
    for running, waiting, tiers, draft in itertools.product(RUNNING, WAITING, TIERS, DRAFTS):
        result = measure(args.calls, running, waiting, tiers, draft)
        rows.append({"running": running, "waiting": waiting, "tiers": tiers, "draft": draft, **result})
        print(f"{running:7}  {waiting:7}  {tiers:5}  {draft:5}  {result['median_ms']:9.3f}  {result['p99_ms']:6.3f}")
    inside = [row["p99_ms"] for row in rows if row["running"] <= 256 and row["waiting"] <= 32]
    print(f"worst p99: {max(inside):.2f} ms up to 256 running and 32 waiting, "
          f"{max(row['p99_ms'] for row in rows):.2f} ms in the grid")  # fmt: skip
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
