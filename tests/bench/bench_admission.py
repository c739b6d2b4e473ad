"""How long one exact admission takes, and how good the beam is past the bounds on work.

    python tests/bench/bench_admission.py [--problems 200] [--out FILE.json]
    python tests/bench/bench_admission.py --oracle 3000 [--speculative]

Prints median, p99 and the slowest call, in milliseconds of this thread's processor time and (p99) of the wall
clock, over running 0..512, waiting 1..64, tiers 1..4, speculation on and off; then for ever more waiting requests
the value reached as a share of the proven upper bound. Every call is a different problem: nothing is warm but
the code.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from slos_serve.scheduler.exact import AdmissionProblem, AdmissionResult, Speculation, admit_exact, warm

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
    return AdmissionProblem(
        0.0, pieces, 16384, paces, free, deadlines, prompts, blocks, tier, values, kept, speculation
    )


def measure(problems: Sequence[AdmissionProblem]) -> tuple[NDArray[np.float64], list[AdmissionResult]]:
    """Seconds of each call [2, n], of processor time and of the wall clock, and the results."""
    taken, results = [], []
    for each in problems:
        busy, wall = time.thread_time(), time.perf_counter()
        results.append(admit_exact(each))
        taken.append((time.thread_time() - busy, time.perf_counter() - wall))
    return np.array(taken).T, results


def cell(running: int, waiting: int, tiers: int, speculative: bool, count: int) -> dict[str, float]:
    rng = np.random.default_rng([running, waiting, tiers, speculative])
    problems = [problem(rng, running, waiting, tiers, speculative) for _ in range(count)]
    (taken, wall), results = measure(problems)
    return {
        "running": running,
        "waiting": waiting,
        "tiers": tiers,
        "speculative": float(speculative),
        "median_ms": 1e3 * float(np.median(taken)),
        "p99_ms": 1e3 * float(np.quantile(taken, 0.99)),
        "wall_p99_ms": 1e3 * float(np.quantile(wall, 0.99)),
        "max_ms": 1e3 * float(taken.max()),
        "exact": float(np.mean([r.exact for r in results])),
        "of_bound": sum(r.value for r in results) / max(sum(r.bound for r in results), 1e-9),
    }


def oracle(count: int, speculative: bool) -> None:
    """Counts what brute force finds wrong, and what the fluid bound hides from the construction."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from test_exact import check, constructive, optimum, random_problem

    wrong = hidden = 0
    lost = total = 0.0
    for seed in range(count):
        each = random_problem(np.random.default_rng([3, seed, speculative]), speculative)
        try:
            check(each)
        except AssertionError as error:
            wrong += 1
            print(f"problem {seed}: {error!s:.300}")
        best = optimum(each, constructive) or 0.0
        loss = best - admit_exact(each).value
        hidden += loss > 1e-6
        lost += max(loss, 0.0)
        total += best
    print(f"{count} problems: {wrong} wrong; the fluid bound forbids more in {hidden}, {lost / total:.5f} of the value")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=200, help="per cell of the grid")
    parser.add_argument("--out", help="write the cells as JSON")
    parser.add_argument("--oracle", type=int, metavar="N", help="instead, check N random problems by brute force")
    parser.add_argument("--speculative", action="store_true", help="let the oracle's problems speculate")
    args = parser.parse_args()
    if args.oracle:
        oracle(args.oracle, args.speculative)
    else:
        grid(args.problems, args.out)


def grid(problems: int, out: str | None) -> None:
    warm()
    cells = []
    print("running waiting tiers spec   median      p99      max wall-p99  exact of-fluid-bound")
    for on in (False, True):
        for running in RUNNING:
            for waiting in WAITING:
                for tiers in TIERS:
                    one = cell(running, waiting, tiers, on, problems)
                    cells.append(one)
                    head = f"{running:7d} {waiting:7d} {tiers:5d} {'on' if on else 'off':>4s}"
                    spans = (one[name] for name in ("median_ms", "p99_ms", "max_ms", "wall_p99_ms"))
                    print(head, *(f"{span:8.3f}" for span in spans), f"{one['exact']:6.3f} {one['of_bound']:7.4f}")
    for waiting in (128, 256, 512, 1024, 2000):
        one = cell(64, waiting, 2, False, 5)
        cells.append(one)
        print(f"{waiting} waiting: median {one['median_ms']:.1f} ms, value {one['of_bound']:.4f} of the fluid bound")
    if out:
        with open(out, "w", encoding="utf-8") as file:
            json.dump(cells, file)


if __name__ == "__main__":
    main()
