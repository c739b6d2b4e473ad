"""The report draws what the results hold; studies are presets of the same cells; a burst has the arrivals it says."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import pytest

from slos_serve.loadtest import exam, exam_report
from slos_serve.loadtest.burst import FACTOR, SECONDS, STARTS, burst_sessions, burst_table
from slos_serve.loadtest.exam import cells_of
from slos_serve.loadtest.examine import Cell, scene
from slos_serve.loadtest.settings import ABLATIONS, SETTINGS
from slos_serve.scheduler import PlannerConfig

ONE = ("--workload", "coding", "--arrivals", "bursts", "--requests", "20", "--burst-period", "5", "--jobs", "1")
PNG = b"\x89PNG"


def asked(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    exam.add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The smallest matrix with a curve, one setting of ours, and two worlds that differ in one thing each."""
    folder = tmp_path_factory.mktemp("results")
    narrow = ("--target", "0.9", "--rule", "strict")
    runs = {"matrix": ("--policy", "slos_serve,vllm"), "ablation": ("--setting", "no_overcommit")}
    profile = "a100-llama-3-8b"
    runs |= {"noiseless": ("--noise", "0"), "roomy": ("--profile", f"{profile}-double-kv,{profile}")}
    for name, arguments in runs.items():
        assert exam.run(asked(*ONE, *narrow, *arguments, "--json", str(folder / f"{name}.json"))) == 0
    return [folder / f"{name}.json" for name in runs]


def test_the_page_needs_nothing_else(results: list[Path], tmp_path: Path) -> None:
    """Every picture lies beside the page as PNG and inside it; nothing is loaded from anywhere."""
    out = tmp_path / "report"
    parser = argparse.ArgumentParser()
    exam_report.add_arguments(parser)
    assert exam_report.run(parser.parse_args([*map(str, results), "--out", str(out)])) == 0
    page = (out / "index.html").read_text()
    names = {path.stem for path in out.glob("*.png")}
    assert {
        "capacity-a100-llama-3-8b-bursts-0-1",
        "curve-coding-a100-llama-3-8b-bursts-0-1",
        "ablation",
        "limits",
    } <= names
    assert all(path.read_bytes().startswith(PNG) for path in out.glob("*.png"))
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(sources) == len(names)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert page.count("<tr") == 1 + 5
    assert "noise 0<" in page


def test_every_capacity_has_its_bound(results: list[Path]) -> None:
    """The bound is that of the cell, whoever plans; twice the memory can only raise it."""
    cells = [cell for path in results for cell in json.loads(path.read_text())["cells"]]
    found = {cell["profile"]: cell["bound"] for cell in cells}
    assert all(cell["bound"] == found[cell["profile"]] for cell in cells)
    assert found["a100-llama-3-8b-double-kv"]["least"] >= found["a100-llama-3-8b"]["least"]
    for cell in cells:
        assert 0 < exam_report.headline(cell) <= cell["bound"]["least"]


@pytest.mark.parametrize("content", ["", "[]", '{"cells": 3}', '{"cells": []}'])
def test_a_file_without_results(tmp_path: Path, content: str) -> None:
    """The message names the file, and nothing is written."""
    path, out = tmp_path / "other.json", tmp_path / "out"
    path.write_text(content)
    parser = argparse.ArgumentParser()
    exam_report.add_arguments(parser)
    with pytest.raises(ValueError, match=r"other\.json"):
        exam_report.run(parser.parse_args([str(path), "--out", str(out)]))
    assert not out.exists()


@pytest.mark.parametrize("study", exam.STUDIES)
def test_studies_are_cells(study: str) -> None:
    """A study differs from the plain exam by its defaults only, and takes the same options."""
    cells = cells_of(asked("--study", study, "--workload", "coding", "--seed", "0,1"))
    assert {cell.workload for cell in cells} == {"coding"}
    assert {cell.seed for cell in cells} == {0, 1}
    assert len(cells) == len(set(cells)) > 2


def test_the_matrix_has_each_cell_once() -> None:
    """All workloads, both synthetic arrivals and the recorded ones, both TTFT rules."""
    cells = cells_of(asked("--all"))
    assert len(cells) == len(set(cells))
    assert {cell.ttft_floor_ms for cell in cells} == {0.0, 250.0}
    assert {cell.arrivals for cell in cells} == {"poisson", "bursts", "azure_code", "azure_chat"}


def test_settings_change_one_thing() -> None:
    """Each ablation is another planner than the shipped one; only ours has settings."""
    assert all(setting.config() != PlannerConfig() for setting in ABLATIONS.values())
    assert SETTINGS[""].config() == PlannerConfig()
    with pytest.raises(ValueError, match="only slos_serve has settings"):
        cells_of(asked("--policy", "vllm", "--setting", "no_margin"))
    with pytest.raises(ValueError, match="unknown setting 'nothing'; known"):
        cells_of(asked("--setting", "nothing"))


def test_a_burst_is_five_times_its_surroundings() -> None:
    """The rate inside the burst is the factor times the rate outside."""
    ready = scene(Cell("coding", "poisson", "a100-llama-3-8b", "slos_serve", 1, 0))
    times = [first.request.arrived_at for seed in range(5) for first in burst_sessions(ready, 4.0, seed)]
    inside = sum(STARTS <= at < STARTS + SECONDS for at in times) / SECONDS
    before = sum(at < STARTS for at in times) / STARTS
    assert inside / before == pytest.approx(FACTOR, rel=0.15)


def test_a_burst_s_table_names_every_policy() -> None:
    """A line for each, after what was asked, and one for what nobody could exceed."""
    shares = {"before": 1.0, "inside": 0.7, "right after": 0.99, "later": 1.0}
    about = {"workload": "coding", "profile": "p", "base_rate": 2.0}
    lines = burst_table({**about, "policies": {"vllm": {"attained": shares}}, "bound": shares}).splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [["vllm", "before", "100.0"], ["bound", "before", "100.0"]]
