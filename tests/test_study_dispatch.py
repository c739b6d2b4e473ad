"""The study of dispatching: its search, its books, and that no simulated request is lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from slos_serve.loadtest.cells import TARGETS, Load, draw, load_profile, turns
from slos_serve.loadtest.study_dispatch import (
    POLICIES,
    SCENARIOS,
    Service,
    attainment,
    averaged,
    capacity,
    decision_micros,
    lines,
    plot,
    same,
)


@pytest.mark.parametrize("guess", [3.0, 20.0, 90.0])
def test_the_search_finds_where_the_share_falls_below_the_target(guess: float) -> None:
    """From below, from near and from above, with few runs."""
    asked: list[float] = []

    def share(rate: float) -> float:
        asked.append(rate)
        return min(1.0, 1.0 - (rate - 15.0) / 50.0)

    assert capacity(share, guess) == pytest.approx(20.0, rel=0.01)
    assert len(asked) < 9


@pytest.mark.parametrize("policy", POLICIES)
def test_every_simulated_request_ends_under_every_policy(policy: str) -> None:
    """Declined, held back or moved: all sessions run to their end, each token once."""
    scenario = replace(SCENARIOS["sessions"], sites=same(3), routers=2)
    firsts, _ = turns(draw(Load("tool_calling"), 30.0, 30.0, 3.0, 0), load_profile("a100-llama-3-8b"), TARGETS, 0.25)
    service = Service(scenario, policy, 0)
    outcomes = service.run(firsts, 600.0)
    assert firsts
    for turn in firsts:
        each = turn
        while each is not None:
            assert len(outcomes[each.request.id].token_times) == each.output_tokens
            each = each.following
    assert not any(site.live for site in service.sites)


def test_a_straggler_is_spared_by_the_ranking() -> None:
    """At a load that the others could carry alone, round-robin fails its share of the sessions, the ranking few."""
    scenario = replace(SCENARIOS["straggler"], seconds=6.0)
    assert attainment(scenario, "ranked", 11.0, 0) > attainment(scenario, "round_robin", 11.0, 0)


def test_what_was_found_is_averaged_shown_and_drawn(tmp_path: Path) -> None:
    """Only seeds that all policies of a scenario have; ratios to round-robin, its own or that of the like scenario."""
    found = averaged(
        {
            "equal": {"round_robin": {"0": 16.0, "1": 25.0}, "ranked": {"0": 16.0, "1": 36.0}},
            "loads 1 s old": {"ranked": {"0": 10.0}},
            "8 replicas": {"round_robin": {"0": 40.0}, "ranked": {}},
        }
    )
    assert found == {
        "equal": {"round_robin": pytest.approx(20.0), "ranked": pytest.approx(24.0)},
        "loads 1 s old": {"ranked": pytest.approx(10.0)},
    }
    header, equal, old = lines(found)
    assert header.split()[0] == "scenario"
    assert equal.split()[1:] == ["20.00", "1.20"]
    assert old.split()[-2:] == ["20.00", "0.50"]
    plot(found, {"all": {"1": 5.0, "64": 9.0}}, tmp_path / "study.png")
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
    assert decision_micros(4, 2, repeats=3) > 0
