"""`slos-serve plan`: as few replicas as keep the promises of a trace."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from slos_serve.loadtest import plan


def asked(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    return parser.parse_args(["--gpu", "a100", "--model", "llama-3-8b", *arguments])


def trace(tmp_path: Path, per_second: int, prompt: int = 3000) -> Path:
    path = tmp_path / "own.csv"
    lines = [f"{i / per_second:.3f},{prompt},20" for i in range(20 * per_second)]
    path.write_text("arrival_s,prompt_tokens,output_tokens\n" + "\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("edge", [1, 2, 3, 7, 8, 9])
def test_the_fewest_are_found(edge: int) -> None:
    """Doubling and bisection end at the edge, or say that there is none."""
    assert plan.fewest(lambda n: n >= edge, 16) == edge
    assert plan.fewest(lambda n: False, 16) is None


def test_a_trace_gets_its_replicas(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One replica computes some ten such prompts a second: 25 a second take several, a stricter target no fewer."""
    out = tmp_path / "plan.json"
    arguments = ("--trace", str(trace(tmp_path, 25)), "--slo", "chatbot=2000/100", "--json", str(out))
    assert plan.run(asked(*arguments)) == 0
    targets = json.loads(out.read_text())["targets"]
    needs = [targets[target]["replicas"] for target in ("0.9", "0.95", "0.99")]
    assert needs == sorted(needs)
    assert 2 <= needs[0] <= 6
    assert "a100-llama-3-8b" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu", "abacus"), "unknown profile 'abacus-llama-3-8b'; known: a100-40gb-opt-13b, a100-llama-3-8b"),
        (("--slo", "chatbot=1/100"), "class chatbot: TTFT: 1 ms is impossible"),
        (("--slo-class", "poets"), "line 2: slo_class: unknown class 'poets'"),
        (("--policy", "magic"), "unknown policy 'magic'"),
        (("--rule", "kind"), "unknown rule 'kind'"),
        (("--max-replicas", "0"), "--max-replicas: must be in"),
    ],
)
def test_wrong_questions(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    """Each is named before anything is played."""
    with pytest.raises(ValueError, match=r"^\S") as caught:
        plan.run(asked("--trace", str(trace(tmp_path, 1)), *arguments))
    assert message in str(caught.value)
