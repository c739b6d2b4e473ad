"""The demonstration: its traffic, and the command itself with the real server and the real model."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from slos_serve.loadtest.demo import MAX_OUTPUT_TOKENS, MAX_PROMPT_TOKENS, PARTS, traffic

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "slos_serve.backend.cli", "demo"]
CLASSES = {part.slo_class for part in PARTS}


def test_traffic_has_every_class_at_about_the_rate_asked_for() -> None:
    """A short window holds the asked number of arrivals, in order, and its lengths fit a small context."""
    arrivals = traffic(np.random.default_rng(0), rate=8.0, seconds=60.0)
    assert {arrival.slo_class for arrival in arrivals} == CLASSES
    assert sum(arrival.round == 0 for arrival in arrivals) == pytest.approx(480, rel=0.1)
    assert [arrival.at for arrival in arrivals] == sorted(arrival.at for arrival in arrivals)
    assert all(arrival.prompt_tokens <= MAX_PROMPT_TOKENS for arrival in arrivals)
    assert all(arrival.output_tokens <= MAX_OUTPUT_TOKENS for arrival in arrivals)


def test_the_demonstration_loses_nothing(tmp_path: Path) -> None:
    """Eight seconds of mixed traffic over gRPC and HTTP: exit code 0, every request ended, every class shown."""
    file = tmp_path / "report.json"
    done = subprocess.run(
        [*COMMAND, "--seconds", "8", "--json", file], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    measured = json.loads(file.read_text())
    assert measured["faults"] == []
    assert set(measured["outcomes"]) <= {"done", "refused"}
    assert sum(measured["outcomes"].values()) == measured["requests"]
    assert set(measured["transports"]) == {"grpc", "http"}
    for name, row in measured["classes"].items():
        assert row["tokens"] > 0, name
        assert f"\n{name} " in done.stdout
        assert f"  {name}: '" in done.stdout or f'  {name}: "' in done.stdout


def test_interrupting_the_demonstration_stops_its_server() -> None:
    """Ctrl-C in mid-run: exit code 130 and nobody listens on the server's port any more."""
    process = subprocess.Popen(
        [*COMMAND, "--seconds", "120", "--rate", "2"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env=_unbuffered(),
        preexec_fn=_interruptible,
    )
    assert process.stdout is not None
    port = 0
    for line in process.stdout:
        if "gRPC " in line:
            port = int(line.rpartition(":")[2])
        if "sent" in line:
            break
    process.send_signal(signal.SIGINT)
    process.stdout.read()
    assert process.wait(timeout=120) == 130
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def _interruptible() -> None:
    """A shell's background job ignores Ctrl-C and hands that down; a person's terminal does not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _unbuffered() -> dict[str, str]:
    return {**os.environ, "PYTHONUNBUFFERED": "1"}


def test_a_repository_that_is_not_there_ends_with_a_message(tmp_path: Path) -> None:
    """The server's own explanation is shown, and the exit code is not 0."""
    done = subprocess.run(
        [*COMMAND, "--model-repository", tmp_path / "nowhere"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert "nowhere" in done.stderr


@pytest.mark.parametrize("wrong", [["--seconds", "0"], ["--rate", "-1"], ["--seconds", "nan"], ["--rate", "x"]])
def test_wrong_numbers_are_refused(wrong: list[str]) -> None:
    """The option is named and nothing is started."""
    done = subprocess.run([*COMMAND, *wrong], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert wrong[0] in done.stderr
