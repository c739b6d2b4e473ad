"""The queue in front of TensorRT-LLM: order, bounds, admission, and taking back."""

from __future__ import annotations

import random

from slos_serve.backend.trtllm_gate import Gate
from slos_serve.scheduler import PerfModel, Piece, Request, Slo, Stage

# One token of each of n requests takes 10 + n milliseconds.
PERF = PerfModel((Piece(0.01, 0.001),))


def request(name: str, ttft: float | None = None, tpot: float = 1.0, arrived_at: float = 0.0) -> Request:
    slo = None if ttft is None else Slo(ttft, tpot)
    return Request(name, arrived_at, 10, (Stage(5, slo),))


def gate(most: int = 4, governs: bool = False) -> Gate:
    return Gate(PERF, most, lambda tokens: tokens / 100, lambda: governs)


def test_the_most_urgent_goes_first_and_no_more_than_fit() -> None:
    """Promised ones by their due time, then best effort in order of arrival."""
    each = gate(most=3)
    for name, ttft in (("free", None), ("later", 9.0), ("first", 1.0), ("then", 2.0)):
        each.add(request(name, ttft), 10)
    assert each.turn(0.0).released == ["first", "then", "later"]
    assert each.turn(0.0).released == []
    assert each.leave("then")
    assert each.turn(0.0).released == ["free"]
    assert (each.waiting, each.running) == (0, 3)


def test_without_governing_nobody_is_judged() -> None:
    """Behind the gate somebody decides."""
    each = gate(most=2)
    each.add(request("late", 0.001), 10)
    assert each.turn(5.0).decisions == []


def test_a_governor_promises_what_can_still_be_in_time() -> None:
    """Predicted time to first token: the prompts that are in the engine, and its own."""
    each = gate(governs=True)
    each.add(request("good", 1.0), 10)
    each.add(request("hopeless", 0.05), 10)
    turn = each.turn(0.0)
    assert [(d.request_id, d.admitted) for d in turn.decisions] == [("hopeless", False), ("good", True)]
    assert set(turn.released) == {"good", "hopeless"}


def test_a_governor_runs_no_more_at_once_than_the_tightest_pace_allows() -> None:
    """An iteration of five takes 15 ms: with a pace of 15 ms, five run."""
    each = gate(most=100, governs=True)
    for i in range(20):
        each.add(request(f"r{i}", 100.0, tpot=0.015), 10)
    assert len(each.turn(0.0).released) == 5


def test_best_effort_gives_way_to_a_promise_and_comes_back() -> None:
    """The youngest is taken back, with what it has, and goes in again when there is room."""
    each = gate(most=2, governs=True)
    each.add(request("old"), 10)
    each.add(request("young"), 10)
    assert each.turn(0.0).released == ["old", "young"]
    each.grow("young", 13)
    each.add(request("promised", 5.0), 10)
    turn = each.turn(0.1)
    assert (turn.withdrawn, turn.released) == (["young"], ["promised"])
    each.leave("old")
    assert each.turn(0.2).released == ["young"]


def test_everybody_leaves_through_the_gate() -> None:
    """Random arrivals and ends: bounds hold, nobody is lost, nobody is released twice without coming back."""
    for seed in range(50):
        chance = random.Random(seed)
        each = gate(most=4, governs=seed % 2 == 0)
        inside: set[str] = set()
        sent = 0
        for step in range(300):
            if sent < 30 and chance.random() < 0.3:
                each.add(request(f"r{sent}", chance.choice([None, 0.1, 2.0]), arrived_at=step / 10), 10)
                sent += 1
            turn = each.turn(step / 10)
            inside -= set(turn.withdrawn)
            assert inside.isdisjoint(turn.released)
            inside |= set(turn.released)
            assert len(inside) == each.running <= 4
            for name in [name for name in inside if chance.random() < 0.2]:
                assert each.leave(name)
                inside.remove(name)
        assert (each.waiting, each.running) == (0, len(inside))
