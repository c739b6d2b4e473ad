"""vLLM as a peer: its client against a server that speaks as vLLM does, the judging, and the command's errors.

With SLOS_SERVE_VLLM_PYTHON set to a Python that has vLLM and this package, also the planner inside the real vLLM.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from slos_serve.backend.cli import main
from slos_serve.client.stream import Lost, Refused, Result
from slos_serve.loadtest.bench_vllm import BURST, OURS, PROMISES, Asking, Machine, burst, loads, shots, summary, table
from slos_serve.loadtest.play import Ledger, Record
from slos_serve.loadtest.vllm_peer import SCHEDULER, VllmClient, peer
from slos_serve.loadtest.workload import Arrival

MACHINE = Machine((0.02, 0.03, 0.06, 0.12), 5.0)
VLLM_PYTHON = os.environ.get("SLOS_SERVE_VLLM_PYTHON", "")


def event(ids: Sequence[int], end: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": "x" * len(ids), "token_ids": list(ids), "finish_reason": end}]}


@asynccontextmanager
async def scripted(*events: dict[str, Any], status: int = 200) -> AsyncIterator[tuple[VllmClient, list[Any]]]:
    """A server that answers every completion with these events; the bodies it was sent."""
    bodies: list[Any] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        bodies.append(await request.json())
        response = web.StreamResponse(status=status, headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for each in events:
            await response.write(b"data: " + json.dumps(each).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    app = web.Application()
    app.router.add_post("/v1/completions", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        async with VllmClient(f"127.0.0.1:{port}", {"coding": 1}) as client:
            yield client, bodies
    finally:
        await runner.cleanup()


def test_tokens_are_counted_by_their_ids() -> None:
    """Two tokens in one event are two tokens; SLO and priority are in the body, other fields of ours are not."""

    async def run() -> None:
        async with scripted(event([5]), event([6, 7]), event([8], "length")) as (client, bodies):
            fields = {"max_tokens": 4, "ignore_eos": True, "slo_class": "coding", "thinking_tokens": None}
            result = await Asking(client, MACHINE, 0.01).generate("a" * 512, **fields).drain()
            assert result.token_ids == (5, 6, 7, 8)
            assert len(result.token_times) == 4
            (body,) = bodies
            assert body["vllm_xargs"] == {"slo_class": "coding", "slo_ttft_ms": pytest.approx(290), "slo_tpot_ms": 50}
            assert body["priority"] == 1
            assert "thinking_tokens" not in body

    asyncio.run(run())


@pytest.mark.parametrize(
    ("events", "status", "error", "text"),
    [
        ([{"error": {"code": 503, "message": "queue is full"}}], 200, Refused, "OVERLOADED: queue is full"),
        ([], 400, Refused, "UNKNOWN"),
        ([event([1])], 200, Lost, "without a finish_reason"),
    ],
)
def test_what_went_wrong_is_told_apart(
    events: list[dict[str, Any]], status: int, error: type[Exception], text: str
) -> None:
    """A refusal inside a stream of status 200, a plain refusal, and a stream that breaks off."""

    async def run() -> None:
        async with scripted(*events, status=status) as (client, _):
            with pytest.raises(error, match=text):
                await client.generate("a", max_tokens=3).drain()

    asyncio.run(run())


def test_the_same_seed_is_the_same_load() -> None:
    """All contenders get equal arrivals and prompts, one letter a token; the burst has `BURST` times the rate."""
    once, again = (loads(50.0, (1.0,), 20.0, seed=3) for _ in range(2))
    assert once == again
    assert list(once) == ["1x", "burst"]
    assert {each.slo_class for each in once["1x"]} == {promise.name for promise in PROMISES}
    assert max(each.prompt_tokens for each in once["1x"]) <= 1000
    (shot, *_) = shots(once["1x"], None, "")  # type: ignore[arg-type]
    assert len(shot.text) == shot.arrival.prompt_tokens
    times = burst(np.random.default_rng(0), 100.0, 20.0)
    inside = ((times >= 6) & (times < 10)).sum()
    assert inside / 4 == pytest.approx(BURST * ((times < 6).sum() / 6), rel=0.1)


def record(name: str, first: float, gap: float, outcome: str = "done") -> Record:
    """A chatbot request of 100 tokens that answers 5 tokens."""
    times = tuple(10.0 + first + gap * number for number in range(5))
    arrival = Arrival(0.0, "chatbot", 100, 5)
    result = Result("", (1,) * 5, times, "length", {}) if outcome == "done" else None
    return Record(name, arrival, "stream", outcome, 10.0, 10.0, result)  # type: ignore[arg-type]


def test_goodput_counts_what_was_in_time_throughout() -> None:
    """By the client's clock: on time, late once, late on average, and not answered."""
    ledger = Ledger()
    slip = Result("", (1,) * 5, (10.1, 10.15, 10.46, 10.47, 10.48), "length", {})
    records = [
        record("in time", 0.2, 0.09),
        Record("late once", Arrival(0.0, "chatbot", 100, 5), "stream", "done", 10.0, 10.0, slip),
        record("late", 0.4, 0.05),
        record("gone", 0.1, 0.05, "hanging"),
    ]
    for each in records:
        ledger.open(each.id)
        ledger.close(each)
    found = summary(ledger, MACHINE, 2.0)
    assert found["attained"] == {"strict": 0.25, "blocks": 0.5, "mean": 0.5}
    assert found["goodput"] == 0.5
    assert (found["requests"], found["done"]) == (4, 3)
    assert found["classes"]["chatbot"] == 0.25
    shown = table({"vLLM": {"1x": found}, OURS: {"1x": {**found, "goodput": 1.0}}}, OURS)
    assert "2.00" in shown.splitlines()[1]


def test_a_python_without_vllm_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """So is one that is not there."""
    assert main(["bench-vllm", "--vllm-python", str(tmp_path / "none")]) == 1
    assert "there is no such file" in capfd.readouterr().err
    assert main(["bench-vllm", "--vllm-python", sys.executable]) == 1
    assert "No module named 'vllm'" in capfd.readouterr().err


def test_a_server_that_dies_and_a_port_in_use_are_told(tmp_path: Path) -> None:
    """With the end of its log, and with the number."""

    async def run(port: int) -> None:
        async with peer(Path(sys.executable), tmp_path, [], tmp_path / "log", port):
            raise AssertionError

    with pytest.raises(Exception, match=r"(?s)vLLM ended with code 1.*No module named vllm|No module named 'vllm'"):
        asyncio.run(run(0))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(Exception, match=f"--port {taken.getsockname()[1]}: Address already in use"):
            asyncio.run(run(taken.getsockname()[1]))


def test_the_whole_command_on_a_stand_in(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Tunes, plays every load on every scheduler, writes table and JSON, and leaves no process behind."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).parent / "standin" / "vllm_python.py"} "$@"\n')
    python.chmod(0o755)
    found, logs = tmp_path / "found.json", tmp_path / "logs"
    command = ["bench-vllm", f"--vllm-python={python}", f"--json={found}", f"--logs={logs}", "--loads", "0.3"]
    command += ["--budgets", "256", "512", "--seconds=2", "--tune-seconds=1", "--probe-seconds=1", "--warm-seconds=1"]
    assert main([*command, "--capacity=10", "--grace=60"]) == 0
    data = json.loads(found.read_text())
    assert set(data["tuning"]) == {"256", "512"}
    names = list(data["results"])
    assert names[1:] == ["vLLM, priority", OURS]
    assert {load for each in data["results"].values() for load in each} == {"0.3x", "burst"}
    requests = [each["0.3x"]["requests"] for each in data["results"].values()]
    assert requests[0] > 0
    assert len(set(requests)) == 1
    assert all(each["0.3x"]["done"] == each["0.3x"]["requests"] for each in data["results"].values())
    said = capfd.readouterr().out
    assert all(name in said for name in names)
    started = "".join(path.read_text() for path in logs.glob("*.log"))
    assert f"--scheduler-cls={SCHEDULER}" in started
    assert "--scheduling-policy=priority" in started
    children = [int(line.split()[1]) for line in started.splitlines() if line.startswith("child ")]
    assert len(children) == len(list(logs.glob("*.log"))) >= 4
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by vLLM's Python."""
    if not VLLM_PYTHON:
        pytest.skip("SLOS_SERVE_VLLM_PYTHON is not set to a Python with vLLM")
    folder = tmp_path_factory.mktemp("vllm") / "model"
    subprocess.run([VLLM_PYTHON, "-m", "slos_serve.backend.random_model", folder, "--layers=2"], check=True)
    return folder


def test_the_planner_steers_the_real_scheduler(small_model: Path) -> None:
    """What is planned is what vLLM's own class schedules, preempts and counts in blocks, at every step."""
    drive = Path(__file__).parent / "standin" / "vllm_drive.py"
    found = subprocess.run([VLLM_PYTHON, drive, small_model], capture_output=True, text=True, check=False, timeout=600)
    assert found.returncode == 0, found.stderr[-3000:]
    counts = json.loads(found.stdout.splitlines()[-1])
    assert counts["done"] + counts["aborted"] == counts["added"] == 60
    assert min(counts["aborted"], counts["evicted"]) > 0


def test_the_planner_runs_inside_vllm(small_model: Path, tmp_path: Path) -> None:
    """Twenty requests at once, one cancelled, some without an SLO or one that nobody can keep: all others end in full
    with the text that they have alone, and the planner never failed."""
    log = tmp_path / "log"
    options = ["--enforce-eager", "--dtype=float32", "--max-num-seqs=6", "--max-num-batched-tokens=200"]
    options += ["--num-gpu-blocks-override=24", f"--scheduler-cls={SCHEDULER}"]  # the longest need 9 blocks of 128

    async def run() -> None:
        async with (
            peer(Path(VLLM_PYTHON), small_model, options, log, VLLM_CPU_OMP_THREADS_BIND="0") as address,
            VllmClient(address) as client,
        ):
            rng = np.random.default_rng(0)
            prompts = ["".join(rng.choice(list("abcdefgh"), n)) for n in rng.integers(5, 1000, 20)]
            asked = [{"slo_ttft_ms": 2000.0, "slo_tpot_ms": 200.0}, {}, {"slo_ttft_ms": 1.0, "slo_tpot_ms": 1.0}]
            fields = [{"max_tokens": 40, "ignore_eos": True, **asked[n % 3]} for n in range(20)]
            alone = [await client.generate(prompts[n], **fields[n]).drain() for n in range(3)]
            streams = [client.generate(prompt, **each) for prompt, each in zip(prompts, fields, strict=True)]
            gone = streams.pop()
            async for _ in gone:
                break
            await gone.aclose()
            results = await asyncio.gather(*(stream.drain() for stream in streams))
            assert [len(each.token_ids) for each in results] == [40] * 19
            assert [each.token_ids for each in results[:3]] == [each.token_ids for each in alone]

    asyncio.run(run())
    said = log.read_text()
    assert "slos_serve plans" in said
    assert "the planner failed" not in said
