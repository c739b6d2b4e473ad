"""The load generator and its statistics: what is sent when, and what is made of how it ended."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slos_serve.backend.launcher import Server
from slos_serve.loadtest.demo_router import faults, phase, table
from slos_serve.loadtest.player import RHYTHMS, Settings, arrivals, generate

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("rhythm", RHYTHMS)
@pytest.mark.parametrize("workload", ["demo", "chatbot", "tool_calling"])
def test_every_rhythm_and_workload_plays(rhythm: str, workload: str) -> None:
    """In order of arrival, at about the rate asked for (a session counts once), the same for the same seed."""
    settings = Settings(rhythm=rhythm, workload=workload, rate=3.0)
    found = arrivals(settings, np.random.default_rng(1), 120.0)
    assert found == arrivals(settings, np.random.default_rng(1), 120.0)
    assert [arrival.at for arrival in found] == sorted(arrival.at for arrival in found)
    firsts = [arrival for arrival in found if not arrival.round]
    expected = 360 * (1.85 if rhythm == "step" else 1.0)
    assert 0.2 * expected < len(firsts) < 2.5 * expected


@pytest.mark.parametrize(
    "wrong", [{"rate": 0}, {"via": "pigeon"}, {"rhythm": "waltz"}, {"workload": "none"}, {"colour": 1}]
)
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    """By name."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings.from_json(wrong)


def test_a_generator_writes_one_line_per_request(server: Server) -> None:
    """Told that it is enough, it sends nothing new and waits for the ends."""
    lines: list[str] = []
    settings = Settings(addresses=server.grpc, rate=20.0, workload="chatbot", scale=0.02, grace=30.0)

    async def run() -> set[str]:
        enough = asyncio.Event()

        def write(text: str) -> None:
            lines.append(text)
            if len(lines) == 10:
                enough.set()

        return (await asyncio.wait_for(generate(settings, write, enough), 60.0)).sent

    sent = asyncio.run(run())
    ended = [json.loads(text) for text in lines]
    assert sorted(record["id"] for record in ended) == sorted(sent)
    assert 10 <= len(ended) < 200
    assert {record["outcome"] for record in ended} == {"done"}
    assert all(record["ttft_ms"] > 0 and record["tokens"] > 0 for record in ended)


@pytest.mark.parametrize("processes", [1, 2])
def test_locust_counts_promises_and_judges_the_run(server: Server, tmp_path: Path, processes: int) -> None:
    """A real headless run, alone or with workers: statistics by class and in Locust's own files, one record per
    request, and the exit code of a kept run."""
    command = [sys.executable, "-m", "locust", "-f", str(ROOT / "loadtest/locustfile.py"), "--headless"]
    command += ["-u", f"{processes}", "-r", "9", "-t", "10s", "--stop-timeout", "30", "--addresses", server.grpc]
    command += ["--rate", "5", "--workload", "chatbot", "--scale", "0.02", "--max-lag-ms", "60000"]
    command += ["--records", str(tmp_path / "records.jsonl"), "--slo-json", str(tmp_path / "slo.json")]
    command += ["--html", str(tmp_path / "report.html"), "--csv", str(tmp_path / "table")]
    command += ["--processes", f"{processes}"] if processes > 1 else []
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    records = [json.loads(text) for text in (tmp_path / "records.jsonl").read_text().splitlines()]
    summary = json.loads((tmp_path / "slo.json").read_text())
    assert records, done.stderr
    assert summary["classes"]["chatbot"]["requests"] == len(records)
    attained = [record["attained"] for record in records]
    assert summary["classes"]["chatbot"]["attained"] == pytest.approx(sum(attained) / len(attained))
    assert summary["faults"] == 0
    assert done.returncode == 0, done.stderr
    assert "SLO" in (tmp_path / "table_stats.csv").read_text()
    assert "TTFT" in (tmp_path / "report.html").read_text()


def test_a_generator_that_fell_behind_makes_the_run_invalid(server: Server, tmp_path: Path) -> None:
    """Whatever else it shows."""
    command = [sys.executable, "-m", "locust", "-f", str(ROOT / "loadtest/locustfile.py"), "--headless"]
    command += ["-u", "1", "-t", "3s", "--stop-timeout", "30", "--addresses", server.grpc, "--rate", "5"]
    command += ["--workload", "chatbot", "--scale", "0.02", "--max-lag-ms", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 3
    assert "INVALID" in done.stderr


def record(**changes: Any) -> dict[str, Any]:
    plain = {"id": "a", "slo_class": "chatbot", "outcome": "done", "error": "", "at": 5.0, "total_ms": 1000.0,
             "attained": True, "gap_ms": 30.0}  # fmt: skip
    return {**plain, **changes}


def test_a_request_belongs_to_the_outage_that_it_ran_in() -> None:
    """Before, during and after, by the time in which it ran."""
    assert [phase(record(at=at), 10.0, 20.0) for at in (5.0, 9.5, 15.0, 20.5)] == [
        "before",
        "during",
        "during",
        "after",
    ]
    shown = table([record(), record(attained=False), record(at=15.0, slo_class="coding")], 10.0, 20.0)
    assert "50 % of 2" in shown
    assert "100 % of 1" in shown


def test_a_request_without_a_fair_end_is_a_fault() -> None:
    """Lost, failed and ended twice."""
    found = faults([record(), record(id="b", outcome="lost", error="gone"), record(id="c"), record(id="c")])
    assert found == ["b: lost gone", "c: ended 2 times"]
