"""The clairvoyant bounds: closed forms where there are some, and above what any policy reaches."""

from __future__ import annotations

import pytest

from slos_serve.loadtest.bound import bounds, stationary_rate, trace_share
from slos_serve.loadtest.capacity import EXAMINED, Fleet, play, score
from slos_serve.loadtest.cells import TARGETS, Load, Turn, draw, load_profile, turns
from slos_serve.loadtest.workload import Arrival
from slos_serve.scheduler import Scheduler

PROFILE = load_profile("a100-llama-3-8b")
KV_BOUND = load_profile("a100-opt-13b")


def sessions(rate: float, name: str = "coding") -> list[Turn]:
    return turns(draw(Load(name), rate, 4.0, 40.0, seed=0), PROFILE, TARGETS, 0.0)[0]


def test_no_policy_exceeds_the_trace_s_bound() -> None:
    """On one trace, at light and heavy load, the fluid schedule attains at least what ours does."""
    for rate in (3.0, 8.0, 14.0):
        firsts = sessions(rate)
        played = score(firsts, play(Fleet(PROFILE, Scheduler), firsts), rate=rate, seconds=40.0, dropped=0)
        assert trace_share(firsts, PROFILE, 1) >= played.attainment["strict"]
    assert "slos_serve" in EXAMINED


def test_the_largest_of_a_burst_that_does_not_fit_is_dropped() -> None:
    """Ten prompts at once with deadlines of five prompt times: about five can be in time, the short one among them."""
    burst = [Arrival(1.0 + i * 1e-6, "coding", 4000 if i else 100, 1) for i in range(10)]
    firsts, _ = turns(burst, PROFILE, TARGETS, 0.0)
    assert 0.5 <= trace_share(firsts, PROFILE, 1) <= 0.8
    assert trace_share(firsts, PROFILE, 2) == 1.0


def test_memory_binds_where_it_is_small() -> None:
    """Held KV times residence fills the memory: half the memory, half the rate."""
    firsts, _ = turns([Arrival(float(i), "chatbot", 4000, 1000) for i in range(10)], KV_BOUND, TARGETS, 0.0)
    whole = stationary_rate(firsts, KV_BOUND, 0.9)
    tokens_held = 999 * (4000 + 499.5) * 0.9
    assert whole <= KV_BOUND.kv_capacity_tokens / (tokens_held * KV_BOUND.iteration_seconds)


def test_bounds_fall_with_the_target() -> None:
    """To serve nearly all is harder than to serve most; the least of both models is the bound."""
    easy, hard = (bounds(sessions, PROFILE, 1, target, 4.0) for target in (0.5, 0.99))
    assert easy["stationary"] > hard["stationary"]
    assert easy["trace"] > hard["trace"]
    assert hard["least"] == pytest.approx(min(hard["stationary"], hard["trace"]))
