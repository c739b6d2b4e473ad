"""The GPU check, in its tiny mode: every step runs and says what it should; wrong logits are noticed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from slos_serve.backend import flash
from slos_serve.backend.cli import main
from slos_serve.backend.flash import FlashBatch
from slos_serve.backend.gpu_check import CPU, SHAPES, _config, check_logits

ROOT = Path(__file__).parent.parent


def test_every_step_runs_on_the_cpu(tmp_path: Path) -> None:
    """Both shapes, two policies: exit code 0 and all numbers in the file, with hardware and versions."""
    file = tmp_path / "result.json"
    assert main(["gpu-check", "--tiny", "--policies", "slos_serve", "sarathi", f"--json={file}"]) == 0
    result = json.loads(file.read_text())
    assert result["machine"]["torch"] == torch.__version__
    assert set(result["shapes"]) == set(SHAPES)
    for found in result["shapes"].values():
        assert found["correctness"]["right"]
        assert found["time_model"]["samples"] > 0
        assert [row["requests"] for row in found["speed"]["decode"]] == [1, 4]
        assert all(row["seconds"] > 0 for row in found["speed"]["prefill"])
        for rows in found["serving"].values():
            assert rows[-1]["class"] == "all"
            assert rows[-1]["live"]["requests"] == rows[-1]["simulated"]["requests"] > 0


def test_the_real_server_can_be_the_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model is saved as a repository, served by tritonserver and compared with its simulation."""
    monkeypatch.chdir(ROOT)
    file = tmp_path / "result.json"
    command = ["gpu-check", "--tiny", "--shape=llama-3-8b", "--through-triton", "--policies", "sarathi"]
    assert main([*command, f"--json={file}"]) == 0
    (found,) = json.loads(file.read_text())["shapes"].values()
    assert found["serving"]["sarathi"][-1]["live"]["requests"] > 0


def test_wrong_attention_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that forgets the last key of every request fails the check."""
    right = flash.reference

    def forgetful(query: torch.Tensor, batch: FlashBatch, layer: int, scaling: float) -> torch.Tensor:
        starts = batch.starts.diff()
        return right(query, replace(batch, lengths=torch.maximum(batch.lengths - 1, starts)), layer, scaling)

    config = _config("llama-3-8b", CPU)
    assert check_logits(config, CPU)["right"]
    monkeypatch.setattr(flash, "reference", forgetful)
    assert not check_logits(config, CPU)["right"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and the way out."""
    assert main(["gpu-check"]) == 2
    assert "there is no CUDA device here; --tiny" in capsys.readouterr().err
