"""Exact admission against brute force: every subset, and a token-level schedule written for clarity alone."""

from __future__ import annotations

import functools
import gzip
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slos_serve.scheduler.exact import AdmissionProblem, Speculation, admit_exact

EPS = 1e-9


def seconds(problem: AdmissionProblem, tokens: float, steps: float) -> float:
    return max(base + per_token * tokens + per_step * steps for per_token, per_step, base in problem.pieces)


def room(problem: AdmissionProblem, within: float, steps: float) -> float:
    """The most tokens (a real number) whose batch takes at most `within`; negative when even none is too slow."""
    if seconds(problem, 0, steps) > within:
        return -1.0
    lines = [(within - base - k_step * steps) / k for k, k_step, base in problem.pieces if k > 0]
    return min(problem.max_batch_tokens, *lines) if lines else problem.max_batch_tokens


def tokens_of(problem: AdmissionProblem, length: int) -> float:
    """What a decode item of `length` yields on average."""
    return sum(problem.speculation.alpha**k for k in range(length)) if problem.speculation else 1.0


def longest_item(problem: AdmissionProblem) -> int:
    return problem.speculation.max_length if problem.speculation else 1


def serves_for_ever(problem: AdmissionProblem, members: list[int], longest: int) -> bool:
    """Earliest deadline first, one batch after the other, each as long as the earliest due time allows."""
    streams = []
    for i in members:
        start = max(float(problem.deadlines[i]), problem.now) - problem.now
        streams.append({"due0": start, "left": int(problem.prompts[i]), "pace": problem.tpots[problem.tiers[i]], "got": 0.0})

    def due(stream: dict[str, Any]) -> float:
        done = math.floor(stream["got"] + EPS) + 1 if stream["left"] == 0 else 0
        return float(stream["due0"] + done * stream["pace"])

    now, quiet = 0.0, 0
    while streams and quiet < 150:
        streams.sort(key=due)
        end = due(streams[0])
        length, space = 0, 0
        for v in range(longest, 0, -1):
            urgent = [s for s in streams if due(s) <= end + EPS]
            needed = sum(s["left"] or v for s in urgent)
            space = math.floor(room(problem, end - now, v if v > 1 else 0) + 1e-6)
            if needed <= space:
                length = v
                break
        if length == 0:
            return False
        used, drafted = 0, 0
        for stream in streams:
            if stream["left"] > 0:
                part = min(stream["left"], space - used)
                stream["left"] -= part
                used += part
            elif used + length <= space:
                stream["got"] += tokens_of(problem, length)
                used += length
                drafted = length if length > 1 else 0
        now += seconds(problem, used, drafted)
        quiet += all(s["left"] == 0 for s in streams)
    return True


def constructive(problem: AdmissionProblem, members: list[int]) -> bool:
    return any(serves_for_ever(problem, members, v) for v in range(1, longest_item(problem) + 1))


@functools.lru_cache(maxsize=4096)
def prefill_rate(problem: AdmissionProblem, counts: tuple[int, ...]) -> float | None:
    """Best prefill tokens per second beside the decodes, over every choice of item lengths; None when too many."""
    present = [tier for tier, count in enumerate(counts) if count]
    best: float | None = None
    for lengths in itertools.product(range(1, longest_item(problem) + 1), repeat=len(present)):
        paces = [problem.tpots[tier] * tokens_of(problem, v) for tier, v in zip(present, lengths, strict=True)]
        steps = max(lengths) if max(lengths) > 1 else 0
        period = min(*paces, seconds(problem, problem.max_batch_tokens, steps))
        load = sum(counts[tier] * v / pace for tier, v, pace in zip(present, lengths, paces, strict=True))
        rate = room(problem, period, steps) / period - load
        if rate >= -1e-6 and (best is None or rate > best):
            best = max(rate, 0.0)
    return best


def within_fluid(problem: AdmissionProblem, members: list[int]) -> bool:
    """The prompts fit in what the rates leave, gap by gap in order of deadlines, and the decodes can be kept up."""
    due = {i: max(float(problem.deadlines[i]), problem.now) - problem.now for i in members}
    counts = [0] * len(problem.tpots)
    left = at = 0.0
    for i in sorted(members, key=lambda i: due[i]):
        if any(counts):
            rate = prefill_rate(problem, tuple(counts))
            if rate is None:
                return False
            left += rate * (due[i] - at)
        else:
            full = seconds(problem, problem.max_batch_tokens, 0)
            whole = math.floor(due[i] / full + EPS)
            rest = max(0.0, room(problem, max(due[i] - whole * full, 0.0), 0))
            left = whole * problem.max_batch_tokens + rest
        at = due[i]
        left -= int(problem.prompts[i])
        counts[problem.tiers[i]] += 1
        if left < -EPS:
            return False
    return not any(counts) or prefill_rate(problem, tuple(counts)) is not None


def optimum(problem: AdmissionProblem, *tests: Any) -> float | None:
    """The best summed value over all subsets that fit in memory and pass the tests; None when not even () does."""
    kept = np.flatnonzero(problem.running).tolist()
    new = np.flatnonzero(~problem.running).tolist()
    subsets = [s for r in range(len(new) + 1) for s in itertools.combinations(new, r)]
    worth = {s: float(sum(problem.values[i] for i in s)) for s in subsets}
    for subset in sorted(subsets, key=lambda s: -worth[s]):
        fits = sum(int(problem.blocks[i]) for i in subset) <= problem.free_blocks
        if fits and all(test(problem, [*kept, *subset]) for test in tests):
            return worth[subset]
    return None


def random_problem(rng: np.random.Generator, speculative: bool) -> AdmissionProblem:
    """Up to 9 new requests that compete for time, sometimes for memory, beside up to 40 running ones."""
    tpots = tuple(np.sort(rng.choice([0.02, 0.03, 0.05, 0.075, 0.1, 0.2], int(rng.integers(1, 4)), replace=False)).tolist())
    base = tpots[0] * float(rng.uniform(0.1, 0.7))
    token = (tpots[0] - base) / float(rng.integers(20, 800))
    step = base * float(rng.uniform(0.02, 0.15)) if speculative else 0.0
    pieces = [(token, step, base)]
    if rng.random() < 0.3:
        pieces.append((token * 1.2, step, base * 0.7))
    new, decodes, prefills = int(rng.integers(1, 10)), int(rng.integers(0, 41)), int(rng.integers(0, 3))
    count = new + decodes + prefills
    running = np.arange(count) < decodes + prefills
    due = rng.uniform(0.5, 12.0, count) * tpots[-1]
    due[:decodes] = 0.0
    # Some requests come from one burst: the same deadline and length.
    prompts = np.maximum(1, rng.exponential(0.4, count) * due / token * 0.7).astype(np.int64)
    prompts[:decodes] = 0
    prompts[decodes : decodes + prefills] //= 3
    values = np.ones(count) if rng.random() < 0.4 else rng.integers(1, 11, count).astype(float)
    if rng.random() < 0.2:
        values *= rng.uniform(0.5, 2.0, count)
    tiers = rng.integers(0, len(tpots), count)
    for i in range(count - new + 1, count):
        if rng.random() < 0.25:
            for column in (due, prompts, values, tiers):
                column[i] = column[i - 1]
    blocks = -(-(prompts + rng.integers(1, 400, count)) // 16)
    free = int(blocks[~running].sum() * rng.uniform(0.2, 1.0)) if rng.random() < 0.5 else int(blocks.sum())
    now = float(rng.uniform(0, 100))
    speculation = Speculation(float(rng.uniform(0.3, 0.9)), int(rng.integers(2, 5))) if speculative else None
    most = int(rng.choice([64, 512, 16384]))
    return AdmissionProblem(
        now, tuple(pieces), most, tpots, free, now + due, prompts, blocks, tiers, values, running, speculation
    )
