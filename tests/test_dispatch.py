"""Which instance a request goes to, decided from loads alone."""

from __future__ import annotations

import math

import pytest

from slos_serve.scheduler.core import Capabilities, Snapshot
from slos_serve.scheduler.dispatch import Ask, Fleet, Load, drawn, home, is_hopeless, load_of, predict, prefix, rank
from slos_serve.scheduler.perf import BatchShape, PerfModel, Piece

IDLE = Load(step=0.005, per_token=0.0001, free_blocks=1000, num_blocks=1000)
CHAT = Ask(100, 100, ttft=0.5, tpot=0.1)


def fleet_of(**loads: Load) -> Fleet:
    fleet = Fleet(list(loads))
    for name, load in loads.items():
        fleet.tell(name, load)
    return fleet


def order(fleet: Fleet, ask: Ask, turn: int = 0) -> list[str]:
    return [fleet.names[index] for index in rank(fleet, ask, turn=turn).tolist()]


def busy(**changes: float) -> Load:
    return Load(**{**{name: getattr(IDLE, name) for name in IDLE.__slots__}, **changes})


def test_equal_instances_take_turns() -> None:
    """Nobody is the first choice for ever."""
    fleet = fleet_of(a=IDLE, b=IDLE, c=IDLE)
    assert [order(fleet, CHAT, turn)[0] for turn in range(6)] == ["a", "b", "c", "a", "b", "c"]


@pytest.mark.parametrize(
    "worse",
    [
        busy(queued_tokens=3000.0, requests=9.0),
        busy(step=0.09, requests=60.0),
        busy(free_blocks=3.0),
        busy(tightest=0.004),
        busy(requests=40.0),
        busy(requests=2.0, slots=2.0),
    ],
    ids=["queue", "pace", "memory", "tight neighbours", "more requests", "full batch"],
)
def test_the_less_able_instance_comes_last(worse: Load) -> None:
    """Whatever makes a promise harder to keep counts, at every turn."""
    fleet = fleet_of(worse=worse, idle=IDLE)
    assert all(order(fleet, CHAT, turn) == ["idle", "worse"] for turn in range(4))


def test_a_session_goes_home_unless_home_is_late() -> None:
    """A cached prefix is worth its prefill time, and no more than that."""
    ask = Ask(2000, 50, ttft=0.5, tpot=0.1, cached={"home": 1900.0})
    assert order(fleet_of(other=IDLE, home=busy(queued_tokens=500.0, requests=1.0)), ask)[0] == "home"
    assert order(fleet_of(other=IDLE, home=busy(queued_tokens=9000.0, requests=9.0)), ask)[0] == "other"


def test_a_session_stays_at_home_where_all_are_late() -> None:
    """To compute its prefix once more would make everybody later; so it is without a promise, too."""
    cached = {"home": 1900.0}
    fleet = fleet_of(other=busy(queued_tokens=9000.0, requests=9.0), home=busy(queued_tokens=9500.0, requests=9.0))
    assert order(fleet, Ask(2000, 50, ttft=0.1, tpot=0.1, cached=cached))[0] == "home"
    assert order(fleet, Ask(2000, 50, cached=cached))[0] == "home"


def test_it_is_hopeless_where_nobody_can_keep_the_promise() -> None:
    """One that can is enough; with no instance there is no hope either."""
    late = busy(queued_tokens=9000.0)
    assert is_hopeless(fleet_of(a=late, b=busy(free_blocks=1.0)), CHAT)
    assert not is_hopeless(fleet_of(a=late, b=IDLE), CHAT)
    assert is_hopeless(Fleet(), CHAT)


def test_a_choice_of_some_is_drawn_anew_at_each_turn_and_has_the_home() -> None:
    """No instance is left out for long; ranking among those drawn names only those."""
    fleet = fleet_of(**{f"i{number}": IDLE for number in range(40)})
    ask = Ask(100, 100, ttft=0.5, tpot=0.1, cached={"i7": 50.0, "gone": 9.0})
    draws = [drawn(fleet, ask, 4, turn).tolist() for turn in range(400)]
    assert all(len(set(draw)) == 4 and 7 in draw for draw in draws)
    counts = [sum(number in draw for draw in draws) for number in range(40) if number != 7]
    assert min(counts) > 10
    assert set(rank(fleet, ask, among=drawn(fleet, ask, 4, 9)).tolist()) == set(draws[9])
    assert sorted(drawn(fleet, ask, 99, 0).tolist()) == list(range(40))


def test_what_was_sent_counts_before_the_next_load() -> None:
    """A burst between two loads is spread over the instances."""
    fleet = fleet_of(a=IDLE, b=IDLE, c=IDLE, d=IDLE)
    places = []
    for turn in range(40):
        places.append(order(fleet, CHAT, turn)[0])
        fleet.sent(places[-1], CHAT)
    assert {places.count(name) for name in "abcd"} <= {9, 10, 11}


def test_an_instance_that_misses_its_predictions_is_avoided_and_forgiven() -> None:
    """Slowness shows in first tokens that come late; later loads let it be tried again."""
    fleet = fleet_of(a=IDLE, b=IDLE)
    for _ in range(10):
        fleet.observed("a", 0.02, 0.6)
    assert fleet.slowness("a") > 3
    assert all(order(fleet, CHAT, turn)[0] == "b" for turn in range(4))
    for _ in range(400):
        fleet.tell("a", IDLE)
    assert fleet.slowness("a") < 1.01


def test_an_old_load_is_trusted_less() -> None:
    """The same queue counts more when it was told long ago."""
    fleet = Fleet(["fresh", "stale"])
    fleet.tell("fresh", busy(queued_tokens=1000.0), 10.0)
    fleet.tell("stale", busy(queued_tokens=1000.0), 8.0)
    fresh, stale = predict(fleet, CHAT, 10.0)
    assert stale > fresh


def test_best_effort_keeps_away_from_promises() -> None:
    """Without an SLO the instance with the least promised work is best, whatever waits for idle time there."""
    tight = busy(step=0.03, tightest=0.05, requests=8.0, decodes=8.0)
    assert order(fleet_of(tight=tight, idle=IDLE), Ask(100))[0] == "idle"


def test_an_instance_that_left_and_came_back_starts_anew() -> None:
    """Resizing keeps what is known of those that stay."""
    fleet = fleet_of(a=busy(queued_tokens=7.0), b=busy(queued_tokens=8.0))
    fleet.resize(["b", "c"])
    assert fleet.table[0].tolist() == [8.0, 0.0]
    with pytest.raises(ValueError, match="named once"):
        fleet.resize(["b", "b"])


def test_a_load_survives_json_and_an_absurd_one_is_refused() -> None:
    """Infinity goes as null; negative, missing and non-numeric values are told by name."""
    assert Load.from_json(IDLE.to_json()) == IDLE
    assert Load.from_json(Load().to_json()).tightest == math.inf
    for field, value in (("queued_tokens", -1), ("step", 0), ("step", None), ("requests", "many"), ("decodes", True)):
        with pytest.raises(ValueError, match=field):
            Load.from_json({**IDLE.to_json(), field: value})


def test_the_load_of_a_planner_follows_its_time_model() -> None:
    """An idle one has a free step; queued tokens that are not promised are idle work."""
    perf = PerfModel((Piece(0.004, 0.0001),))
    limits = Capabilities(num_blocks=100, block_tokens=16, max_batch_tokens=512, max_batch_requests=64, max_context=512)
    snapshot = Snapshot(3, 1, 10, 2, 60, 100, 700, 5, 1, 0)
    load = load_of(snapshot, limits, perf.seconds, queued_tokens=500, decode_context=900, tightest=0.05)
    assert (load.queued_tokens, load.idle_tokens, load.requests) == (500.0, 200.0, 14.0)
    assert load.step == pytest.approx(perf.seconds(BatchShape(10, 900, 0.0, 0)))
    assert load.per_token == pytest.approx(0.0001, rel=0.05)


def test_every_router_sends_a_session_to_the_same_home() -> None:
    """By name alone, whatever the order; when an instance leaves only its own sessions move."""
    names = [f"10.0.0.{i}:8001" for i in range(8)]
    homes = {f"session-{i}": home(Fleet(names), f"session-{i}") for i in range(800)}
    assert homes == {session: home(Fleet(names[::-1]), session) for session in homes}
    counts = [sum(1 for value in homes.values() if value == name) for name in names]
    assert 70 < min(counts) < max(counts) < 130
    left = Fleet(names[:3] + names[4:])
    moved = {session: home(left, session) for session, was in homes.items() if was == names[3]}
    assert all(home(left, session) == was for session, was in homes.items() if was != names[3])
    assert len(set(moved.values())) == 7
    assert home(Fleet(), "anything") is None


def test_what_is_cached_of_a_session_is_known_or_guessed() -> None:
    """Where it was last, while that instance is there; else half of it at its home by name; nobody: nothing."""
    fleet = fleet_of(a=IDLE, b=IDLE)
    assert prefix(fleet, "s", ("a", 90), 60) == {"a": 59.0}
    assert prefix(fleet, "s", ("gone", 90), 60) == {home(fleet, "s"): 30.0}
    assert prefix(fleet, "s", None, 60) == {home(fleet, "s"): 30.0}
    assert prefix(Fleet(), "s", None, 60) == {}
