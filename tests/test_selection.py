"""The live admission against every subset, where values differ and memory binds."""

from __future__ import annotations

import itertools

import numpy as np

from slos_serve.scheduler import Capabilities, PerfModel, Piece, Request, Scheduler, Slo, Stage, selection, table
from slos_serve.scheduler.admission import admit

PERF = PerfModel((Piece(0.010, 2e-5), Piece(0.004, 6e-5)), per_context=3e-8)
NOW = 10.0


def problem(seed: int) -> tuple[Scheduler, np.ndarray, float]:  # type: ignore[type-arg]
    """A scheduler with up to eight waiting requests of different value, size, deadline and pace; the free blocks."""
    rng = np.random.default_rng(seed)
    caps = Capabilities(int(rng.integers(60, 400)), 16, 2048, 64, 4096)
    scheduler = Scheduler(caps, PERF)
    for i in range(int(rng.integers(2, 9))):
        slo = Slo(float(rng.uniform(0.05, 0.6)), float(rng.choice([0.03, 0.05, 0.1])))
        prompt = int(rng.integers(16, min(900, caps.num_blocks * 16 - 200)))
        scheduler.add(
            Request(f"r{i}", NOW, prompt, (Stage(100, slo),), weight=float(rng.choice([1.0, 1.0, 2.0, 5.0]))), NOW
        )
    active = scheduler.table.active
    order = active[np.argsort(scheduler.table.real[table.DUE][active], kind="mergesort")]
    return scheduler, order, float(caps.num_blocks)


def admitted(scheduler: Scheduler, order: np.ndarray, room: float) -> tuple[np.ndarray, np.ndarray, int]:  # type: ignore[type-arg]
    """What plain set-back accepts of `order`: the slots, the verdicts, how many."""
    accepted, verdict = np.zeros(order.size + 1, np.int64), np.zeros(order.size, np.int64)
    real, whole = scheduler.table.real, scheduler.table.whole
    count = admit(
        real, whole, order, accepted, verdict, scheduler.model, NOW, 0.08, 0.0, 0.0, 0.0, 0.0, np.inf, np.inf, room, 16,
        False,
    )  # fmt: skip
    return accepted, verdict, count


def test_values_and_memory_are_weighed() -> None:
    """The set kept is never worth less than plain set-back's, and nearly the best of all subsets that pass its test."""
    worth = {"plain": 0.0, "kept": 0.0, "best": 0.0}
    for seed in range(300):
        scheduler, order, room = problem(seed)
        weight = scheduler.table.real[table.WEIGHT]
        accepted, verdict, count = admitted(scheduler, order, room)
        plain = weight[accepted[:count]].sum()
        count = selection.refine(
            scheduler.table.real, scheduler.table.whole, order, accepted, count, verdict, np.zeros(0, np.int64),
            scheduler.model, NOW, 0.08, 0.0, 0.0, 0.0, np.inf, np.inf, room, 16,
        )  # fmt: skip
        kept = weight[accepted[:count]].sum()
        assert kept >= plain
        assert set(order[verdict == 1]) == set(accepted[:count])
        best = 0.0
        for mask in itertools.product((False, True), repeat=order.size):
            some = order[np.array(mask)]
            if weight[some].sum() > best and admitted(scheduler, some, room)[2] == some.size:
                best = weight[some].sum()
        assert kept <= best + 1e-9
        worth["plain"] += plain
        worth["kept"] += kept
        worth["best"] += best
    assert worth["kept"] >= 0.99 * worth["best"]
    assert worth["kept"] > 1.01 * worth["plain"]
