"""The exam: cells are fair and repeatable, definitions hold, and wrong questions get clear answers."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slos_serve.loadtest import exam, examine
from slos_serve.loadtest.capacity import EXAMINED, Fleet, Search, play, rate_at, rounds, score
from slos_serve.loadtest.cells import (
    ARRIVALS,
    TARGETS,
    Load,
    check_targets,
    draw,
    load_profile,
    parse_targets,
    profiles,
    resampled,
    turns,
)
from slos_serve.loadtest.workload import WORKLOADS, Arrival
from slos_serve.scheduler import POLICIES, BatchShape, Capabilities, Request, Scheduler, Stage
from slos_serve.scheduler.attainment import RULES
from slos_serve.scheduler.distserve import Link
from slos_serve.scheduler.simulator import SimulatedEngine, simulate

PROFILE = load_profile("a100-llama-3-8b")
SHORT = ("--workload", "coding", "--arrivals", "poisson", "--requests", "60")


def asked(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    exam.add_arguments(parser)
    return parser.parse_args(["--jobs", "1", *arguments])


def examined(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    path = tmp_path / "exam.json"
    assert exam.run(asked(*arguments, "--json", str(path))) == 0
    cells: list[dict[str, Any]] = json.loads(path.read_text())["cells"]
    return cells


def untimed(cell: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in cell.items() if name not in ("planner_ms", "real_seconds")}


def test_reused_prefixes_are_less_to_prefill(tmp_path: Path) -> None:
    """With --prefix-reuse more sessions of several rounds are in time at the same rate, and no block is lost."""
    cell = ("--workload", "tool_calling", "--arrivals", "poisson", "--requests", "60", "--rate", "1.5")
    without, with_reuse = examined(tmp_path, *cell)[0], examined(tmp_path, *cell, "--prefix-reuse")[0]
    assert (without["prefix_reuse"], with_reuse["prefix_reuse"]) == (False, True)
    assert without["sessions"] == with_reuse["sessions"]
    assert with_reuse["attainment"]["strict"] > without["attainment"]["strict"]


def test_a_cached_prefix_is_limited_by_free_memory() -> None:
    """A prefix that no free block holds any more is computed again; every request still ends."""
    capabilities = Capabilities(40, 16, 512, 8, 640)
    requests = [Request(f"r{i}", 0.0, 200, (Stage(20),), cached_tokens=190) for i in range(6)]
    engine = SimulatedEngine(capabilities, PROFILE.perf)
    scheduler = Scheduler(capabilities, PROFILE.perf)
    outcomes = simulate(requests, {each.id: 20 for each in requests}, scheduler, engine)
    assert [len(each.token_times) for each in outcomes.values()] == [20] * 6
    assert [each.request.cached_tokens for each in outcomes.values()] == [190, 190, 190, 64, 0, 0]
    assert engine.free_blocks == scheduler.free_blocks == 40


def test_a_point_is_repeatable_and_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same cell twice gives the same JSON but for timings, with everything a report needs."""
    arguments = (*SHORT, "--rate", "5")
    first, second = (examined(tmp_path, *arguments)[0] for _ in range(2))
    assert untimed(first) == untimed(second)
    assert first["attainment"].keys() == RULES.keys()
    assert 0 <= first["token_weighted_attainment"] <= 1
    assert first["sessions"] >= 50
    assert first["planner_ms"]["calls"] > 5
    assert "coding" in capsys.readouterr().out


def test_capacity_is_the_edge_of_attainment(tmp_path: Path) -> None:
    """At the capacity found enough sessions attain, at the next rate of the grid too few."""
    cell = examined(tmp_path, *SHORT, "--target", "0.9,0.99", "--rule", "strict")[0]
    capacity = cell["capacity_per_gpu"]["strict"]
    assert capacity["0.9"] >= capacity["0.99"] > 0
    assert cell["at_rate"] == capacity["0.9"]
    by_rate = {point["rate"]: point["attainment"]["strict"] for point in cell["curve"]}
    assert by_rate[capacity["0.9"]] >= 0.9
    assert min(share for rate, share in by_rate.items() if rate > capacity["0.9"]) < 0.9


def test_every_policy_meets_the_same_sessions(tmp_path: Path) -> None:
    """A list of policies gives one result each, over equally many sessions in an equal horizon."""
    cells = examined(tmp_path, *SHORT, "--rate", "3", "--policy", "slos_serve,vllm")
    assert [cell["policy"] for cell in cells] == ["slos_serve", "vllm"]
    assert cells[0]["sessions"] == cells[1]["sessions"]
    assert cells[0]["horizon_s"] == cells[1]["horizon_s"]


def test_processes_change_nothing(tmp_path: Path) -> None:
    """Two processes give the same results in the same order as one."""
    arguments = (*SHORT, "--rate", "2", "--policy", "slos_serve,sarathi")
    one, two = (examined(tmp_path, *arguments, "--jobs", jobs) for jobs in ("1", "2"))
    assert list(map(untimed, one)) == list(map(untimed, two))


def test_resume_plays_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells that are in the file already are kept and not played again."""
    before = examined(tmp_path, *SHORT, "--rate", "3")
    monkeypatch.setattr(examine, "examine", None)
    assert examined(tmp_path, *SHORT, "--rate", "3", "--resume") == before


def test_two_replicas_serve_twice_the_rate(tmp_path: Path) -> None:
    """Two replicas at twice the rate attain about what one attains at the rate."""
    one = examined(tmp_path, *SHORT, "--rate", "4")[0]
    two = examined(tmp_path, *SHORT, "--rate", "8", "--replicas", "2")[0]
    assert two["attainment"]["strict"] == pytest.approx(one["attainment"]["strict"], abs=0.05)


def test_every_policy_is_examined() -> None:
    """What the policy table offers, the exam can compare; only distserve is no planner of a single replica."""
    assert EXAMINED.keys() == {*POLICIES, "distserve"}


@pytest.mark.parametrize("name", profiles())
def test_profiles_are_usable(name: str) -> None:
    """Every shipped profile has a source and a licence, and its SLOs are possible."""
    profile = load_profile(name)
    assert profile.source
    assert profile.licence
    assert 0.005 < profile.iteration_seconds < 0.05
    assert profile.prefill_seconds(9000) > profile.prefill_seconds(8192) > profile.perf.seconds(BatchShape(8192))
    check_targets(TARGETS, profile)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_requests_carry_their_slos_and_hide_their_length(workload: str) -> None:
    """Every session has the class's SLO from the profile, its real tokens to be judged by, and a hidden length."""
    arrivals = draw(Load(workload), 2.0, 4.0, 20.0, seed=1)
    firsts, dropped = turns(arrivals, PROFILE, TARGETS, floor=0.25)
    assert dropped == 0
    assert 20 < len(firsts) < 60
    for turn in firsts:
        target = TARGETS[turn.request.slo_class]
        assert turn.request.max_new_tokens > turn.output_tokens
        assert sum(stage.max_new_tokens for stage in turn.stages) == turn.output_tokens
        slo = turn.stages[0].slo
        assert slo is not None
        assert slo.ttft == max(0.25, (target.factor or 0) * PROFILE.prefill_seconds(turn.request.prompt_tokens))
        assert slo.tpot in (target.tpot, target.answer_tpot)


def test_the_last_tool_round_has_the_answer_pace() -> None:
    """Rounds in the loop are tight, the last answer is loose, and each waits for the one before and its tool."""
    rounds = [
        Arrival(1.0, "tool_calling", 100 * (i + 1), 5, session="s", round=i, tool_delay=0.5 * i) for i in range(3)
    ]
    (first,), _ = turns(rounds, PROFILE, TARGETS, 0.0)
    second = first.following
    assert second is not None
    third = second.following
    assert third is not None
    assert [turn.stages[0].slo.tpot for turn in (first, second, third) if turn.stages[0].slo] == [0.05, 0.05, 0.1]
    played = play(Fleet(PROFILE, Scheduler, noise=0.0), [first])
    arrived = [played.outcomes[f"0.{i}"].request.arrived_at for i in range(3)]
    ended = [played.outcomes[f"0.{i}"].token_times[-1] for i in range(3)]
    assert arrived == pytest.approx([1.0, ended[0] + 0.5, ended[1] + 1.0])
    assert score([first], played, rate=1.0, seconds=1.0, dropped=0).attainment["strict"] == 1.0


def test_a_session_attains_when_all_its_rounds_do() -> None:
    """One late round makes the whole session a miss; an unfinished request is one too."""
    (turn,), _ = turns([Arrival(0.0, "chatbot", 100, 5)], PROFILE, TARGETS, 0.0)
    played = play(Fleet(PROFILE, Scheduler, noise=0.0), [turn])
    about = {"rate": 1.0, "seconds": 1.0, "dropped": 0}
    assert set(score([turn], played, **about).attainment.values()) == {1.0}
    played.outcomes["0.0"].token_times.pop()
    assert set(score([turn], played, **about).attainment.values()) == {0.0}


def test_thinking_and_answer_are_two_stages() -> None:
    """Thinking tokens are paced at 50 ms, the answer at 100 ms, from one arrival."""
    (turn,), _ = turns([Arrival(0.0, "reasoning", 50, 30, thinking_tokens=20)], PROFILE, TARGETS, 0.0)
    assert [(stage.max_new_tokens, stage.slo.tpot) for stage in turn.stages if stage.slo] == [(20, 0.05), (10, 0.1)]
    assert isinstance(turn.stages[0], Stage)


def test_the_search_takes_the_best_parameters() -> None:
    """Of candidates with known edges the one with the highest is found, exactly, with its index."""
    edges = [5, 17, 11]
    template = _score()

    def evaluate(parameters: Any, step: int) -> Any:
        return template(1.0 if step <= edges[parameters["index"]] else 0.5)

    search = Search([{"index": i} for i in range(3)], evaluate, start=0)
    assert search.capacity("strict", 0.9) == (1, 17)
    assert rate_at(24) == pytest.approx(2 * rate_at(0))


def _score() -> Any:
    (turn,), _ = turns([Arrival(0.0, "chatbot", 100, 5)], PROFILE, TARGETS, 0.0)
    played = play(Fleet(PROFILE, Scheduler, noise=0.0), [turn])
    base = score([turn], played, rate=1.0, seconds=1.0, dropped=0)
    return lambda share: type(base)(
        **{name: getattr(base, name) for name in base.__slots__ if name != "attainment"},
        attainment=dict.fromkeys(RULES, share),
    )


def test_giving_up_changes_no_verdict() -> None:
    """A run given up for late first tokens would have missed the target when played to its end, by every rule."""
    arrivals = draw(Load("coding"), 14.0, 14.0, 10.0, seed=0)
    firsts, _ = turns(arrivals, PROFILE, TARGETS, 0.0)
    fleet = Fleet(PROFILE, Scheduler)
    about = {"rate": 14.0, "seconds": 10.0, "dropped": 0}
    short, whole = (score(firsts, play(fleet, firsts, target), **about) for target in (0.9, 0.0))
    assert not short.complete
    assert whole.complete
    for rule in RULES:
        assert whole.attainment[rule] <= short.attainment[rule] < 0.9


def test_resampling_keeps_the_time_scale() -> None:
    """A trace at twice its rate has twice the sessions; at half, half; gaps are never stretched."""
    times = np.cumsum(np.random.default_rng(0).exponential(1.0, 2000))
    trace = [Arrival(float(at), "chatbot", 10, 5) for at in times]
    for rate in (0.5, 1.0, 2.5):
        drawn = resampled(np.random.default_rng(1), trace, rate, 1000.0)
        assert len(drawn) == pytest.approx(1000 * rate, rel=0.1)
        assert all(0 <= arrival.at < 1000 for arrival in drawn)
    own_rate = (len(times) - 1) / (times[-1] - times[0])
    copy = np.sort([arrival.at for arrival in resampled(np.random.default_rng(1), trace, own_rate, 1000.0)])
    assert len(np.setdiff1d(np.diff(copy).round(9), np.diff(times).round(9))) <= 2


def test_a_trace_of_ones_own(tmp_path: Path) -> None:
    """A CSV with sessions is examined like a workload."""
    lines = ["arrival_s,prompt_tokens,output_tokens,slo_class,session_id,round,tool_delay_s"]
    for i in range(30):
        lines.append(f"{i},200,10,chatbot,,0,0")
        lines.append(f"{i}.5,100,5,tool_calling,s{i},0,0")
        lines.append(f"{i}.5,150,5,tool_calling,s{i},1,0.2")
    path = tmp_path / "own.csv"
    path.write_text("\n".join(lines) + "\n")
    cell = examined(tmp_path, "--trace", str(path), "--rate", "1", "--requests", "20")[0]
    assert cell["workload"] == "own.csv"
    assert cell["arrivals"] == "trace"
    assert cell["attainment"]["strict"] > 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--policy", "magic"), "unknown policy 'magic'; known: distserve, qoserve, sarathi"),
        (("--workload", "poetry"), "unknown workload 'poetry'; known: chatbot"),
        (("--arrivals", "never"), "unknown arrivals 'never'; known: azure_chat"),
        (("--profile", "abacus"), "unknown profile 'abacus'; known: a100-40gb-opt-13b, a100-llama-3-8b"),
        (("--rule", "kind"), "unknown rule 'kind'; known: blocks"),
        (("--rate", "fast"), "--rate: must be numbers"),
        (("--rate", "0"), "--rate: must be numbers in"),
        (("--replicas", "1.5"), "--replicas: must be whole numbers"),
        (("--target", "2"), "--target"),
        (("--requests", "1"), "--requests"),
        (("--slo", "chatbot=5/100"), "class chatbot: TTFT: 5 ms is impossible: one iteration on a100-llama-3-8b"),
        (("--slo", "chatbot=5x/1"), "class chatbot: TPOT: 1 ms is impossible"),
        (("--slo", "chatbot=0.5x/100"), "class chatbot: TTFT: 0.5x"),
        (("--slo", "chatbot"), "--slo: must be CLASS="),
        (("--policy", "distserve", "--prefix-reuse"), "--prefix-reuse: distserve"),
        (("--json", "/nowhere/at/all.json"), "--json: no such folder"),
    ],
)
def test_wrong_questions(arguments: tuple[str, ...], message: str) -> None:
    """Each wrong argument is named with what would be right, before anything is played."""
    with pytest.raises(ValueError, match=r"^\S") as caught:
        exam.run(asked(*arguments))
    assert message in str(caught.value)


def test_a_policy_that_keeps_no_promise_at_any_rate_has_no_capacity(tmp_path: Path) -> None:
    """The search ends at rates so low that nobody comes."""
    cell = ("--workload", "tool_calling", "--arrivals", "poisson", "--requests", "20", "--rule", "blocks")
    slow = ("--slo", "tool_calling=1x/14.5", "--policy", "sarathi", "--untuned", "--target", "1")
    (found,) = examined(tmp_path, *cell, *slow)
    assert found["capacity_per_gpu"] == {"blocks": {"1": 0.0}}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("1,500000,10,chatbot", "line 3: prompt_tokens: 500000 and 10 output tokens do not fit the KV memory"),
        ("1,100,10,poets", "line 3: slo_class: unknown class 'poets'; known: chatbot"),
        ("1,-5,10,chatbot", "line 3: prompt_tokens: must be a whole number"),
    ],
)
def test_traces_that_cannot_be_served(tmp_path: Path, row: str, message: str) -> None:
    """The file, the line and the field are named, and no JSON is written."""
    path, out = tmp_path / "own.csv", tmp_path / "out.json"
    path.write_text(f"arrival_s,prompt_tokens,output_tokens,slo_class\n0,10,10,chatbot\n{row}\n")
    with pytest.raises(ValueError, match=r"own\.csv") as caught:
        exam.run(asked("--trace", str(path), "--json", str(out)))
    assert message in str(caught.value)
    assert not out.exists()


@pytest.mark.parametrize("arrivals", ARRIVALS)
def test_a_higher_rate_only_adds_sessions(arrivals: str) -> None:
    """The sessions of a lower rate are all among those of a higher one, at the same times."""
    low, high = (draw(Load("coding", arrivals), rate, 4.0, 120.0, seed=0) for rate in (2.0, 7.0))
    assert {(a.at, a.prompt_tokens) for a in low} < {(a.at, a.prompt_tokens) for a in high}


def test_own_slos() -> None:
    """An SLO in milliseconds or multiples replaces the class's own."""
    targets = parse_targets(["chatbot=400/80", "mine=2.5x/60/90"])
    assert targets["chatbot"].ttft(PROFILE, 100, 0.0) == 0.4
    assert targets["mine"].ttft(PROFILE, 100, 0.0) == 2.5 * PROFILE.prefill_seconds(100)
    assert (targets["mine"].tpot, targets["mine"].answer_tpot) == (0.06, 0.09)


def test_separate_prefill_and_decode_pay_for_the_transfer() -> None:
    """Alone, a request meets no queue: its prefill, the KV's way over the link, then one decode after another."""
    (turn,), _ = turns([Arrival(0.0, "chatbot", 2000, 5)], PROFILE, TARGETS, 0.0)
    budget = {"prefill": 1, "decode": 1, "budget": 512}
    make = partial(EXAMINED["distserve"].make, parameters=budget)
    played = play(Fleet(PROFILE, make, 2, noise=0.0, prefill=1, decode=1), [turn])
    times = played.outcomes["0.0"].token_times
    link = Link(PROFILE.kv_bytes_per_token)
    decode = PROFILE.perf.seconds(BatchShape(1, decode_context=2001))
    assert times[0] == pytest.approx(PROFILE.prefill_seconds(2000))
    assert times[1] - times[0] == pytest.approx(link.seconds(2000) + decode, rel=0.02)
    assert np.diff(times[1:]) == pytest.approx(decode, rel=0.02)


@pytest.mark.parametrize(("prefill", "decode"), [(1, 1), (1, 3), (2, 1)])
def test_separate_replicas_serve_every_session(prefill: int, decode: int) -> None:
    """Rounds follow rounds through both sides, under memory pressure too, and every token comes once."""
    arrivals = draw(Load("tool_calling", "bursts"), 3.0, 3.0, 60.0, seed=0)
    firsts, _ = turns(arrivals, PROFILE, TARGETS, 0.0)
    small = replace(PROFILE, capabilities=replace(PROFILE.capabilities, num_blocks=1000))
    make = partial(EXAMINED["distserve"].make, parameters={"budget": 512})
    played = play(Fleet(small, make, prefill + decode, prefill=prefill, decode=decode), firsts)
    for first in firsts:
        for turn in rounds(first):
            times = played.outcomes[turn.request.id].token_times
            assert len(times) == turn.output_tokens
            assert times == sorted(times)


@pytest.mark.parametrize("policy", ["slos_serve", "sarathi"])
def test_more_replicas_do_not_attain_less(policy: str) -> None:
    """On one fixed trace, twice the replicas attain at least as much, within two points."""
    rate, attained = 6.0, []
    alone = examine.Cell("coding", "bursts", "a100-llama-3-8b", policy, 1, 0, min_requests=200)
    firsts = examine.scene(alone).firsts(rate)[0]
    for replicas in (1, 2, 4):
        cell = replace(alone, replicas=replicas)
        ready = examine.scene(cell)
        played = ready.play(cell.examined().sweep[0], firsts)
        attained.append(score(firsts, played, rate=rate, seconds=1.0, dropped=0).attainment["strict"])
    assert attained[1] >= attained[0] - 0.02
    assert attained[2] >= attained[1] - 0.02
    assert attained[2] > attained[0]
