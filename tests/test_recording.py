"""A recorded run replays to equal plans: of the simulator, of a worker, of the real server."""

from __future__ import annotations

import asyncio
import gzip
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from slos_serve.backend.cli import main
from slos_serve.backend.launcher import Server
from slos_serve.backend.replay_file import Tape, read_recordings
from slos_serve.client.client import SlosClient
from slos_serve.scheduler import POLICIES, Capabilities, PerfModel, Piece, Request, Slo, Stage
from slos_serve.scheduler.recording import Cancelled, Header, Planned, Recorder, Recording, read, replay
from slos_serve.scheduler.simulator import SimulatedEngine, simulate

CAPABILITIES = Capabilities(
    num_blocks=150, block_tokens=16, max_batch_tokens=256, max_batch_requests=16, max_context=1024, max_draft=3
)
PERF = PerfModel((Piece(0.004, 0.00002, 0.001), Piece(0.001, 0.00008, 0.001)), 1e-8, 1e-9)


def traffic(count: int, seed: int) -> list[Request]:
    """Requests of several classes and stages, more than can all be kept."""
    chance = np.random.default_rng(seed)
    arrivals = np.cumsum(chance.exponential(0.03, count)).tolist()
    requests = []
    for index, at in enumerate(arrivals):
        slo = None if chance.random() < 0.3 else Slo(float(chance.uniform(0.05, 2)), float(chance.uniform(0.01, 0.1)))
        stages = [Stage(int(chance.integers(1, 40)), slo) for _ in range(int(chance.integers(1, 3)))]
        prompt = int(chance.integers(1, 500))
        requests.append(
            Request(
                f"r{index}", at, prompt, tuple(stages), slo_class=str(chance.choice(["a", "b"])),
                weight=float(chance.choice([1.0, 2.5])), session="s" if index % 5 == 0 else None,
                cached_tokens=int(chance.integers(0, prompt)) if index % 3 == 0 else 0,
                expected_new_tokens=0.0 if index % 7 == 0 else None,
            )
        )  # fmt: skip
    return requests


def recorded(policy: str, lines: list[str], requests: list[Request]) -> tuple[Recording, list[Request]]:
    """A simulated run, written to `lines` and read back; and the requests as the planner was given them."""
    recorder = Recorder(POLICIES[policy](CAPABILITIES, PERF), Header(policy, CAPABILITIES, PERF), lines.append)
    engine = SimulatedEngine(CAPABILITIES, PERF, noise=0.1, rng=np.random.default_rng(0))
    outcomes = simulate(requests, {each.id: each.max_new_tokens for each in requests}, recorder, engine, acceptance=0.7)
    (recording,) = read(lines)
    return recording, [outcome.request for outcome in outcomes.values()]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_recording_replays_to_equal_plans(policy: str) -> None:
    """Every request comes back as it was, and a fresh planner makes every plan again, bit for bit."""
    requests = traffic(80, seed=1)
    lines: list[str] = []
    recording, given = recorded(policy, lines, requests)
    assert recording.header == Header(policy, CAPABILITIES, PERF)
    assert recording.requests == given
    assert [replace(each, cached_tokens=0) for each in given] == [replace(each, cached_tokens=0) for each in requests]
    assert any(each.cached_tokens for each in given)
    assert recording.plans > 100
    assert replay(recording, POLICIES[policy](CAPABILITIES, PERF)) is None


def test_a_plan_that_differs_is_found() -> None:
    """Another time model plans otherwise from some plan on; the first such plan is told."""
    recording, _ = recorded("slos_serve", [], traffic(40, seed=2))
    slower = replace(PERF, per_context=1e-5)
    difference = replay(recording, POLICIES["slos_serve"](CAPABILITIES, slower))
    assert difference is not None
    plans = [call for call in recording.calls if isinstance(call, Planned)]
    assert (difference.now, difference.recorded) == (plans[difference.index].now, plans[difference.index].plan)
    assert difference.replayed != difference.recorded


def test_an_id_used_again_is_another_request() -> None:
    """Cancelled while it ran and sent anew under the same id: the recording keeps the two apart."""
    lines: list[str] = []
    recorder = Recorder(
        POLICIES["slos_serve"](CAPABILITIES, PERF), Header("slos_serve", CAPABILITIES, PERF), lines.append
    )
    engine = SimulatedEngine(CAPABILITIES, PERF)
    for turn in range(3):
        request = Request("same", float(turn), 10 + turn, (Stage(5),))
        engine.add(request, 5)
        recorder.add(request, float(turn))
        for _ in range(2):
            recorder.report(engine.step(recorder.plan(float(turn)), float(turn)))
        assert recorder.cancel("same")
        assert not recorder.cancel("never seen")
        engine.release("same")
    (recording,) = read(lines)
    assert [each.prompt_tokens for each in recording.requests] == [10, 11, 12]
    assert sum(isinstance(call, Cancelled) for call in recording.calls) == 3
    assert replay(recording, POLICIES["slos_serve"](CAPABILITIES, PERF)) is None


def test_a_cut_off_recording_is_read_up_to_the_cut() -> None:
    """A killed server may leave half a line; a wrong line elsewhere is refused with its number."""
    lines: list[str] = []
    whole, _ = recorded("slos_serve", lines, traffic(5, seed=3))
    (cut,) = read([*lines[:-1], lines[-1][:10]])
    assert cut.calls == whole.calls[:-1]
    with pytest.raises(ValueError, match="line 3 is not of a recording"):
        read([*lines[:2], '["x",1]\n', *lines[2:]])
    with pytest.raises(ValueError, match="line 1 is not of a recording"):
        read(lines[1:])


def test_the_command_replays_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two runs in a file, which may be gzipped: equal is exit code 0, a difference 1 with both plans, a bad file 2."""
    lines: list[str] = []
    recorded("slos_serve", lines, traffic(20, seed=4))
    path = tmp_path / "run.jsonl"
    for _ in range(2):
        tape = Tape(path)
        for line in lines:
            tape.write(line)
    assert main(["replay", str(path)]) == 0
    assert len(re.findall(r"slos_serve: \d+ plans for 20 requests, all equal", capsys.readouterr().out)) == 2
    changed = [json.loads(line) for line in lines]
    first = next(index for index, call in enumerate(changed) if isinstance(call, list) and call[0] == "p" and call[2])
    changed[first][5] *= 1 + 1e-15
    packed = tmp_path / "changed.jsonl.gz"
    packed.write_bytes(gzip.compress("".join(json.dumps(call) + "\n" for call in changed).encode()))
    assert main(["replay", str(packed)]) == 1
    assert re.search(
        r"the replay differs at plan \d+, second 0\.\d+\n  recorded Plan.*\n  replayed Plan", capsys.readouterr().out
    )
    path.write_text("{}\n")
    assert main(["replay", str(path)]) == 2
    assert f"{path}: line 1 is not of a recording" in capsys.readouterr().err


def test_a_full_disk_stops_the_recording_only() -> None:
    """The server goes on without it."""
    tape = Tape(Path("/dev/full"))
    tape.write("a line\n")
    tape.write("another\n")


def test_a_run_of_the_real_server_replays(tiny_repository: Path, tmp_path: Path) -> None:
    """Streams, a cancel and an SLO through tritonserver with `--record`: every plan is made again, and the settings
    of the repository stay as they were."""
    settings = (tiny_repository / "slos_llm/1/engine.json").read_bytes()
    path = tmp_path / "run.jsonl"
    options = [f"--record={path}", "--set=max_requests=50"]
    with Server(tiny_repository, models=["slos_llm"], extra_args=options) as server:
        asyncio.run(_traffic(server.grpc))
    (recording,) = read_recordings(path)
    assert len(recording.requests) == 20
    assert any(isinstance(call, Cancelled) for call in recording.calls)
    header = recording.header
    assert replay(recording, POLICIES[header.policy](header.capabilities, header.perf)) is None
    assert (tiny_repository / "slos_llm/1/engine.json").read_bytes() == settings


async def _traffic(address: str) -> None:
    async with SlosClient(address) as client:

        async def leave() -> None:
            stream = client.generate("def left(x):", max_tokens=400, ignore_eos=True)
            async for _ in stream:
                break
            await stream.aclose()

        await asyncio.gather(*(leave() for _ in range(8)))
        streams = [client.generate("def f(x):" * index, max_tokens=20, slo_class="coding") for index in range(1, 13)]
        results = await asyncio.gather(*(stream.drain() for stream in streams))
    assert all(math.isfinite(result.receipt["ttft_ms"]) for result in results)
