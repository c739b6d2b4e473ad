"""Live against simulated: the comparison on runs whose outcome is known, and the command on the real server."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from slos_serve.backend.cli import main
from slos_serve.scheduler import POLICIES, Capabilities, PerfModel, Piece, Request, Slo, Stage
from slos_serve.scheduler.comparison import ALL, compare, gap, lives
from slos_serve.scheduler.observed import observe, phase
from slos_serve.scheduler.recording import Header, Recorder, Recording, read
from slos_serve.scheduler.simulator import Outcome, SimulatedEngine, Turnaround, simulate

ROOT = Path(__file__).parent.parent
CAPABILITIES = Capabilities(
    num_blocks=400, block_tokens=16, max_batch_tokens=256, max_batch_requests=32, max_context=1024, max_draft=3
)
PERF = PerfModel((Piece(0.004, 0.00002, 0.001), Piece(0.001, 0.00008, 0.001)), 1e-8, 1e-9)


def traffic(prefix: str, start: float, count: int, seed: int) -> list[Request]:
    """Two classes and best effort, from second `start` on, at about what the engine can do."""
    chance = np.random.default_rng(seed)
    arrivals = start + np.cumsum(chance.exponential(0.04, count))
    kinds = {"chat": Slo(0.5, 0.05), "code": Slo(0.3, 0.02), "free": None}
    picks = chance.choice(list(kinds), count).tolist()
    return [
        Request(f"{prefix}{index}", at, int(chance.integers(1, 400)), (Stage(30, kinds[kind]),), slo_class=kind)
        for index, (at, kind) in enumerate(zip(arrivals.tolist(), picks, strict=True))
    ]


def probing(name: str) -> bool:
    return name.startswith("probe-")


def run(slowness: float, pause: Turnaround, seed: int) -> tuple[Recording, dict[str, Outcome]]:
    """A recorded run on an engine that is `slowness` times as slow as the header's time model says."""
    lines: list[str] = []
    real = PerfModel(
        tuple(Piece(slowness * p.base, slowness * p.per_token, slowness * p.per_step) for p in PERF.pieces),
        slowness * PERF.per_context, slowness * PERF.per_area,
    )  # fmt: skip
    recorder = Recorder(
        POLICIES["slos_serve"](CAPABILITIES, PERF), Header("slos_serve", CAPABILITIES, PERF), lines.append
    )
    engine = SimulatedEngine(CAPABILITIES, real, noise=0.02, rng=np.random.default_rng(seed))
    requests = [*traffic("probe-", 0.0, 120, seed), *traffic("load-", 60.0, 250, seed + 1)]
    chance = np.random.default_rng(seed)
    output = {each.id: int(chance.integers(1, 31)) for each in requests}
    outcomes = simulate(requests, output, recorder, engine, acceptance=0.7, turnaround=pause)
    (recording,) = read(lines)
    return recording, outcomes


def test_the_live_side_is_what_was_recorded() -> None:
    """Token times, verdicts and pauses read from the recording are those of the run itself."""
    recording, outcomes = run(1.0, Turnaround(0.003), seed=0)
    found = lives(recording.calls)
    assert {name: life.token_times for name, life in found.items()} == {
        name: outcome.token_times for name, outcome in outcomes.items()
    }
    assert all(life.ended for life in found.values())
    world = observe([phase(recording.calls, probing)])
    rows = compare(recording, POLICIES["slos_serve"], {"load": lambda name: name.startswith("load-")}, world)
    assert [row.slo_class for row in rows] == ["chat", "code", "free", ALL]
    promised = [
        outcome for name, outcome in outcomes.items() if name.startswith("load-") and outcome.request.stages[0].slo
    ]
    assert rows[-1].live.attained == sum(outcome.attained for outcome in promised) / len(promised)
    assert rows[-1].live.requests == rows[-1].simulated.requests == 250
    assert rows[2].live.attained is None


@pytest.mark.parametrize("slowness", [0.7, 1.0, 1.6])
def test_the_simulation_is_as_slow_as_the_run_was(slowness: float) -> None:
    """A machine that is slower or faster than its profile, pausing in its own way, is predicted from a minute."""
    recording, _ = run(slowness, Turnaround(0.002, 0.0001), seed=3)
    world = observe([phase(recording.calls, probing)])
    assert world.noise == pytest.approx(0.02, rel=0.5)
    assert world.turnaround.base == pytest.approx(0.002, rel=0.05)
    assert world.turnaround.per_chunk == pytest.approx(0.0001, rel=0.05)
    (*_, whole) = compare(recording, POLICIES["slos_serve"], {"load": lambda name: name.startswith("load-")}, world)
    live, model = whole.live, whole.simulated
    assert model.attained == pytest.approx(live.attained, abs=0.05)
    assert model.ttft_ms == pytest.approx(live.ttft_ms, rel=0.1)
    assert model.tpot_ms == pytest.approx(live.tpot_ms, rel=0.1)
    assert re.search(r"attained [+-]\d\.\d points, TTFT [+-]\d\.\d %, TPOT [+-]\d\.\d %", gap([whole]))


def test_the_command_compares_the_real_server(tmp_path: Path) -> None:
    """Profile, serve, record, simulate: a table, numbers as JSON and a picture; the recording can be compared again."""
    files = {name: tmp_path / f"run.{name}" for name in ("jsonl", "json", "png")}
    command = [
        "reality",
        f"--model-repository={ROOT / 'model_repository'}",
        "--loads",
        "0.4",
        "--seconds=3",
        "--fit-seconds=2",
    ]
    options = [f"--keep={files['jsonl']}", f"--json={files['json']}", f"--plot={files['png']}"]
    options += ["--profile-seconds=1", "--fit-seconds=2", "--seconds=3"]
    assert main([*command, *options, "--set=max_requests=90"]) == 0
    rows = json.loads(files["json"].read_text())
    assert {row["load"] for row in rows} == {"40 %"}
    assert rows[-1]["class"] == ALL
    assert rows[-1]["live"]["requests"] == rows[-1]["simulated"]["requests"] > 0
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert main(["reality", f"--recording={files['jsonl']}"]) == 0
