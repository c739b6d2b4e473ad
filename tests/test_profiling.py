"""The time model is measured on the engine that it is about, and a profile is used only where it belongs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from slos_serve.backend.build import build_engine
from slos_serve.backend.cli import main
from slos_serve.backend.config import read_config
from slos_serve.backend.loading import load_engine
from slos_serve.backend.profiling import Profile, fit_samples, measure


@pytest.fixture
def version_dir(tiny_repository: Path, tmp_path: Path) -> Path:
    """The version folder of a private copy of the tiny model."""
    shutil.copytree(tiny_repository, tmp_path / "repository")
    return tmp_path / "repository" / "slos_llm" / "1"


def test_measuring_leaves_the_engine_empty(version_dir: Path) -> None:
    """Batches of prompts, decodes and drafts are timed; afterwards no request and no block is held."""
    loaded = load_engine(read_config(version_dir), version_dir)
    samples = measure(loaded.engine, loaded.vocab_size, 0.5)
    assert {sample.shape.draft_steps > 0 for sample in samples} == {True, False}
    assert any(sample.shape.prefill_area > 0 for sample in samples)
    assert all(sample.seconds > 0 for sample in samples)
    perf, score = fit_samples(samples)
    assert perf.tokens_within(10.0) > 0
    assert score.samples == len(samples) // 4
    assert measure(loaded.engine, loaded.vocab_size, 0.0)  # request ids and memory are free again


def test_the_command_writes_what_the_server_uses(
    version_dir: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """`slos-serve profile` reports the fit; the next start plans with it, unless the model is another."""
    assert main(["profile", str(version_dir), "--seconds", "0.5"]) == 0
    assert "MAPE" in capsys.readouterr().out
    path = version_dir / "profile.json"
    profile = Profile.read(path)
    assert Profile.read(path).to_json() == json.loads(path.read_text())
    assert build_engine(read_config(version_dir), version_dir).perf == profile.perf
    config = json.loads((version_dir / "target" / "config.json").read_text())
    (version_dir / "target" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    build_engine(read_config(version_dir), version_dir)
    assert "is about another host or model" in caplog.text


def test_a_broken_profile_is_named(version_dir: Path) -> None:
    """A file that is no profile stops the start with its path."""
    (version_dir / "profile.json").write_text("{}")
    with pytest.raises(ValueError, match=r"profile\.json: not a profile: KeyError"):
        build_engine(read_config(version_dir), version_dir)
