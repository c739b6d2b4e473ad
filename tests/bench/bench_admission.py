"""How long one exact admission takes, and how good the beam is past the bounds on work.

    python tests/bench/bench_admission.py [--problems 200] [--out FILE.json]

Prints median, p99 and the slowest call in milliseconds over running 0..512, waiting 1..64, tiers 1..4, speculation
on and off; then for ever more waiting requests the value reached as a share of the proven upper bound.
Every call is a different problem, so nothing is warm but the code.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from typing import Final

import numpy as np

from slos_serve.scheduler.exact import AdmissionProblem, AdmissionResult, Speculation, admit_exact

RUNNING: Final = (0, 16, 64, 256, 512)
WAITING: Final = (1, 4, 16, 32, 64)
TIERS: Final = (1, 2, 3, 4)
PACES: Final = (0.05, 0.1, 0.15, 0.2)
# (per_token, per_step, base) of published fits: a 7B model, and a 13B model with a draft model.
PLAIN: Final = ((5.1e-5, 0.0, 0.014), (6.6e-5, 0.0, 0.0035))
DRAFTED: Final = ((6.878e-5, 1.25e-6, 0.0248), (7.523e-5, 0.0034646, 0.003033))


def problem(rng: np.random.Generator, running: int, waiting: int, tiers: int, speculative: bool) -> AdmissionProblem:
    """A burst: prompts log-normal around 700 tokens, TTFT three to eight times the time they take alone."""
    pieces = DRAFTED if speculative else PLAIN
    count = running + waiting
    prompts = np.clip(np.exp(rng.normal(6.5, 0.9, count)), 16, 8000).astype(np.int64)
    alone = pieces[0][2] + pieces[0][0] * prompts
    deadlines = alone * rng.uniform(3.0, 8.0, count)
    halfway = rng.integers(0, 3) if running else 0
    prompts[halfway:running] = 0
    prompts[:halfway] //= 8
    deadlines[halfway:running] = 0.0
    values = np.ones(count) if rng.random() < 0.3 else rng.integers(1, 11, count).astype(float)
    if rng.random() < 0.2:
        values = np.round(values * rng.uniform(0.5, 2.0, count), 3)
    blocks = -(-(prompts + rng.integers(8, 800, count)) // 16)
    free = int(blocks[running:].sum() * (rng.uniform(0.1, 0.7) if rng.random() < 0.3 else 1.0))
    speculation = Speculation(float(rng.choice([0.6, 0.7, 0.8])), int(rng.choice([4, 6]))) if speculative else None
    tier = rng.integers(0, tiers, count)
    paces = tuple(PACES[:tiers])
    kept = np.arange(count) < running
    return AdmissionProblem(0.0, pieces, 16384, paces, free, deadlines, prompts, blocks, tier, values, kept, speculation)


def measure(problems: Sequence[AdmissionProblem]) -> tuple[np.ndarray, list[AdmissionResult]]:
    """Seconds of each call, and its result."""
    taken, results = [], []
    for each in problems:
        start = time.thread_time()
        results.append(admit_exact(each))
        taken.append(time.thread_time() - start)
    return np.array(taken), results


def cell(running: int, waiting: int, tiers: int, speculative: bool, count: int) -> dict[str, float]:
    rng = np.random.default_rng([running, waiting, tiers, speculative])
    problems = [problem(rng, running, waiting, tiers, speculative) for _ in range(count)]
    taken, results = measure(problems)
    return {
        "running": running,
        "waiting": waiting,
        "tiers": tiers,
        "speculative": float(speculative),
        "median_ms": 1e3 * float(np.median(taken)),
        "p99_ms": 1e3 * float(np.quantile(taken, 0.99)),
        "max_ms": 1e3 * float(taken.max()),
        "exact": float(np.mean([r.exact for r in results])),
        "of_bound": sum(r.value for r in results) / max(sum(r.bound for r in results), 1e-9),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=200, help="per cell of the grid")
    parser.add_argument("--out", help="write the cells as JSON")
    args = parser.parse_args()
    measure([problem(np.random.default_rng(0), 64, 16, 2, on) for on in (False, True)])  # compile
    cells = []
    print("running waiting tiers spec   median      p99      max  exact  of fluid bound")
    for on in (False, True):
        for running in RUNNING:
            for waiting in WAITING:
                for tiers in TIERS:
                    one = cell(running, waiting, tiers, on, args.problems)
                    cells.append(one)
                    line = f"{running:7d} {waiting:7d} {tiers:5d} {'on' if on else 'off':>4s} {one['median_ms']:8.3f} "
                    print(line + f"{one['p99_ms']:8.3f} {one['max_ms']:8.3f} {one['exact']:6.3f} {one['of_bound']:7.4f}")
    for waiting in (128, 256, 512, 1024, 2000):
        one = cell(64, waiting, 2, False, 5)
        cells.append(one)
        print(f"{waiting} waiting: median {one['median_ms']:.1f} ms, max {one['max_ms']:.1f} ms, of bound {one['of_bound']:.4f}")
    if args.out:
        with open(args.out, "w", encoding="utf-8") as file:
            json.dump(cells, file)


if __name__ == "__main__":
    main()
