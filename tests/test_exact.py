"""Exact admission against brute force: every subset, and a token-level schedule written for clarity alone."""

from __future__ import annotations

import argparse
import functools
import gzip
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slos_serve.backend import admit_file as admit_command
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
        streams.append(
            {"due0": start, "left": int(problem.prompts[i]), "pace": problem.tpots[problem.tiers[i]], "got": 0.0}
        )

    def due(stream: dict[str, Any]) -> float:
        done = math.floor(stream["got"] + EPS) + 1 if stream["left"] == 0 else 0
        return float(stream["due0"] + done * stream["pace"])

    now, quiet = 0.0, 0
    while streams and quiet < 150:
        streams.sort(key=due)
        end = due(streams[0])
        for length in range(longest, 0, -1):
            urgent = sum(s["left"] or length for s in streams if due(s) <= end + EPS)
            space = math.floor(room(problem, end - now, length if length > 1 else 0) + 1e-6)
            if space >= min(urgent, problem.max_batch_tokens):
                break
        if space < 1:
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
    tpots = tuple(
        np.sort(rng.choice([0.02, 0.03, 0.05, 0.075, 0.1, 0.2], int(rng.integers(1, 4)), replace=False)).tolist()
    )
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


SETTLED = 80  # problems of each kind; `python tests/bench/bench_admission.py --oracle N` checks as many as wanted


def check(problem: AdmissionProblem) -> None:
    """The production code against brute force: fluid optimum, constructive optimum, feasibility of what is accepted."""
    kept = np.flatnonzero(problem.running).tolist()
    fluid = admit_exact(problem, constructive=False)
    proved = admit_exact(problem)
    best = optimum(problem, within_fluid)
    both = optimum(problem, within_fluid, constructive)
    assert (fluid.value if fluid.kept else None) == pytest.approx(best)
    assert (proved.value if proved.kept else None) == pytest.approx(both)
    assert not problem.running[list(proved.accepted)].any()
    assert int(problem.blocks[list(proved.accepted)].sum()) <= problem.free_blocks
    if proved.kept:
        assert constructive(problem, [*kept, *proved.accepted])
        assert proved.bound >= proved.value - EPS


@pytest.mark.parametrize("seed", range(SETTLED))
def test_plain_problems_are_solved_as_by_brute_force(seed: int) -> None:
    """Several tiers, running requests, bursts of equals, values and memory that bind."""
    check(random_problem(np.random.default_rng([1, seed]), speculative=False))


@pytest.mark.parametrize("seed", range(SETTLED // 4))
def test_speculative_problems_are_solved_as_by_brute_force(seed: int) -> None:
    """The same with draft lengths to choose."""
    check(random_problem(np.random.default_rng([2, seed]), speculative=True))


def test_without_the_compiler_the_results_are_the_same() -> None:
    """Plain Python runs the same loops to the same last bit."""
    problems = [random_problem(np.random.default_rng([4, seed]), speculative=seed % 2 == 1) for seed in range(6)]
    script = (
        "import numpy as np\nfrom test_exact import admit_exact, random_problem\n"
        "for seed in range(6):\n"
        "    print(admit_exact(random_problem(np.random.default_rng([4, seed]), speculative=seed % 2 == 1)))\n"
    )
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parent,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [repr(admit_exact(problem)) for problem in problems]


def many(waiting: int, tiers: int = 2, identical: bool = False) -> AdmissionProblem:
    """A burst far beyond what one replica can promise."""
    rng = np.random.default_rng(waiting)
    count = waiting + 32
    running = np.arange(count) < 32
    prompts = np.where(running, 0, 500 if identical else rng.integers(50, 4000, count))
    deadlines = np.where(running, 0.0, 0.4 if identical else rng.uniform(0.1, 3.0, count))
    values = np.ones(count) if identical else rng.integers(1, 11, count)
    tpots = tuple((0.05 + 0.01 * np.arange(tiers)).tolist())
    tier = np.zeros(count, np.int64) if identical else rng.integers(0, tiers, count)
    columns = (deadlines, prompts, prompts // 16 + 10, tier, values, running)
    return AdmissionProblem(0.0, ((5e-5, 0.0, 0.014),), 16384, tpots, 10**6, *columns)


def test_twenty_paces_and_two_thousand_waiting_requests_stay_within_the_bounds_on_work() -> None:
    """What is accepted stays feasible and near the proven bound, and the work counted stays bounded."""
    for problem in (many(2000), many(2000, tiers=20), many(64, tiers=20)):
        result = admit_exact(problem)
        assert result.kept
        assert result.expanded < 10 * 50_000
        assert result.value >= 0.85 * result.bound
        assert constructive(problem, [*range(32), *result.accepted])


def test_identical_requests_are_one_class() -> None:
    """Two thousand equal requests cost no more states than there are copies that fit, and as many as fit are taken."""
    result = admit_exact(many(2000, identical=True))
    few = admit_exact(many(len(result.accepted) + 1, identical=True))
    assert result.exact
    assert result.value == few.value == len(result.accepted)
    assert 0 < result.expanded < 2000


def test_more_effort_is_never_worse_and_the_same_call_repeats() -> None:
    """Results depend on the problem and the bounds on work alone."""
    problem = many(40, tiers=4)
    once, again, more = admit_exact(problem), admit_exact(problem), admit_exact(problem, effort=8)
    assert once == again
    assert more.value >= once.value
    with pytest.raises(ValueError, match="effort: must be >= 1, got 0"):
        admit_exact(problem, effort=0)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("prompts", np.array([-1]), "prompts: must be >= 0"),
        ("prompts", np.array([1.5]), "prompts: must be int64"),
        ("tiers", np.array([1]), "tiers: must be < 1"),
        ("values", np.array([np.nan]), "values: must be finite"),
        ("running", np.array([True, False]), r"running: must have shape \[1\]"),
        ("pieces", (), "pieces: must not be empty"),
        ("pieces", ((0.0, 0.0, 0.1),), "pieces: one must grow with tokens"),
        ("tpots", (0.0,), "tpots: must be finite and > 0"),
        ("now", float("inf"), "now: must be finite"),
        ("max_batch_tokens", 0, "max_batch_tokens: must be >= 1"),
        ("free_blocks", -1, "free_blocks: must be >= 0"),
    ],
)
def test_an_impossible_problem_names_the_field(field: str, value: Any, message: str) -> None:
    """Construction refuses what no planner could read."""
    fields: dict[str, Any] = {
        "now": 0.0,
        "pieces": ((1e-4, 0.0, 0.01),),
        "max_batch_tokens": 512,
        "tpots": (0.05,),
        "free_blocks": 10,
        "deadlines": np.array([1.0]),
        "prompts": np.array([10]),
        "blocks": np.array([1]),
        "tiers": np.array([0]),
        "values": np.array([1.0]),
        "running": np.array([False]),
    }
    assert admit_exact(AdmissionProblem(**fields)).accepted == (0,)
    with pytest.raises(ValueError, match=message):
        AdmissionProblem(**{**fields, field: value})


def instance(**changes: Any) -> dict[str, Any]:
    """One problem in the file format: a running decode, a request that fits and one that cannot."""
    new = {"running": False, "mem_blocks": 4, "tier": 0, "profit": 1.0}
    requests = [
        {"id": "r", "running": True, "deadline": 5.0, "remaining_prompt": 0, "mem_blocks": 9, "tier": 0, "profit": 1},
        {"id": "a", "deadline": 5.5, "remaining_prompt": 300, **new},
        {"id": "b", "deadline": 5.01, "remaining_prompt": 3000, **new},
    ]
    pieces = [[1e-4, 0.0, 0.01]]
    model = {"perf_pieces": pieces, "max_batch_tokens": 512, "tpots": [0.05], "sd": None}
    return {"id": "one", "now": 5.0, "mem_free_blocks": 8, **model, "requests": requests, **changes}


def admit_file(tmp_path: Path, content: Any, *options: str) -> tuple[int, Path]:
    source, target = tmp_path / "problems.json.gz", tmp_path / "answer.json"
    data = content if isinstance(content, bytes) else gzip.compress(json.dumps(content).encode())
    source.write_bytes(data)
    parser = argparse.ArgumentParser()
    admit_command.add_arguments(parser)
    return admit_command.run(parser.parse_args([str(source), "--json", str(target), *options])), target


def test_a_file_of_problems_is_answered_with_ids(tmp_path: Path) -> None:
    """The accepted ids include the running ones; seconds, value and bound are told."""
    sd = {"alpha": 0.7, "max_len": 4}
    code, target = admit_file(tmp_path, {"instances": [instance(), instance(id="two", sd=sd)]}, "--effort", "2")
    answers = json.loads(target.read_text())["instances"]
    assert code == 0
    assert [(each["id"], each["accepted"]) for each in answers] == [("one", ["r", "a"]), ("two", ["r", "a"])]
    assert all(each["seconds"] > 0 and each["value"] == each["bound"] == 1.0 for each in answers)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answer.json", "problems.json.gz"]


def damaged(**changes: Any) -> dict[str, Any]:
    """The first request of the instance changed; a value of ... removes the field."""
    one = instance()
    one["requests"][0].update(changes)
    one["requests"][0] = {name: value for name, value in one["requests"][0].items() if value is not ...}
    return {"instances": [one]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"\x1f\x8b\x08", "is not a whole gzip file"),
        (gzip.compress(b"[1, 2"), "is not JSON"),
        ([], "must be an object with `instances`"),
        ({}, "instances: is missing"),
        ({"instances": [instance(), instance()]}, "instances: id: 'one' occurs twice"),
        ({"instances": [instance(tpots=[0.05, -1])]}, "instance 'one': tpots: must be finite and > 0"),
        ({"instances": [instance(tpots="fast")]}, "instance 'one': tpots: must be a list, got 'fast'"),
        ({"instances": [instance(perf_pieces=[[1, 2]])]}, r"instance 'one': perf_pieces\[0\]: must be"),
        ({"instances": [instance(sd={"alpha": 2, "max_len": 3})]}, "instance 'one': alpha: must be within 0..1, got 2"),
        ({"instances": [instance(now=float("nan"))]}, "instance 'one': now: must be a finite number, got nan"),
        (damaged(tier=1), "instance 'one': request 'r': tier: must be below the number of tpots, 1, got 1"),
        (damaged(remaining_prompt=-3), "request 'r': remaining_prompt: must be a whole number >= 0, got -3"),
        (damaged(deadline=...), "instance 'one': request 'r': deadline: is missing"),
        (damaged(running="yes"), "request 'r': running: must be true or false, got 'yes'"),
        (damaged(profit=True), "request 'r': profit: must be a finite number, got True"),
        (damaged(id="a"), "instance 'one': requests: id: 'a' occurs twice"),
        (damaged(id=None), r"instance 'one': requests\[0\]: id: must be a string or a whole number, got None"),
    ],
)
def test_a_malformed_file_is_refused_by_name_and_nothing_is_written(tmp_path: Path, content: Any, message: str) -> None:
    """File, instance and field are named, and an older answer stays as it was."""
    (tmp_path / "answer.json").write_text("older")
    with pytest.raises(ValueError, match=message) as raised:
        admit_file(tmp_path, content)
    assert str(tmp_path / "problems.json.gz") in str(raised.value)
    assert (tmp_path / "answer.json").read_text() == "older"
