"""The planner in vLLM's scheduler, without vLLM: requests like its own, and an engine that carries out the orders."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from slos_serve.backend.vllm_seat import FIT_SAMPLES, UNMEASURED, Orders, Seat, read_slo
from slos_serve.scheduler import Capabilities, PerfModel, Piece, Scheduler, Slo

CAPABILITIES = Capabilities(num_blocks=20, block_tokens=16, max_batch_tokens=128, max_batch_requests=8, max_context=256)
WALL = 1e9  # what the wall clock showed when the other began


@dataclass
class Sampling:
    extra_args: dict[str, Any] | None


@dataclass
class VllmRequest:
    """The attributes of `vllm.v1.request.Request` that are read."""

    request_id: str
    arrival_time: float
    num_prompt_tokens: int
    max_tokens: int
    sampling_params: Sampling
    num_computed_tokens: int = 0
    generated: int = 0
    aborted: bool = False

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + self.generated

    def is_finished(self) -> bool:
        return self.aborted or self.generated == self.max_tokens


@dataclass
class Engine:
    """What vLLM does between `schedule` and `update_from_output`, with one clock for both sides."""

    seat: Seat
    now: list[float]
    requests: dict[str, VllmRequest] = field(default_factory=dict)
    ended: dict[str, VllmRequest] = field(default_factory=dict)

    def add(self, name: str, prompt: int, output: int, **asked: Any) -> VllmRequest:
        request = VllmRequest(name, WALL + self.now[0], prompt, output, Sampling(asked or None))
        self.requests[name] = request
        return request

    def abort(self, name: str) -> None:
        self.requests[name].aborted = True
        self.ended[name] = self.requests.pop(name)
        self.seat.cancel(name)

    def step(self, share: float = 1.0, between: Callable[[], None] = lambda: None) -> Orders:
        """One batch; `share` of each chunk is run, as when a prefix was found or blocks were short."""
        orders = self.seat.orders(self.requests)
        for name in orders.evicted:
            self.requests[name].num_computed_tokens = 0
        for name, most in orders.tokens.items():
            request = self.requests[name]
            request.num_computed_tokens += max(
                1, int(share * min(most, request.num_tokens - request.num_computed_tokens))
            )
        held = sum(-(-each.num_computed_tokens // CAPABILITIES.block_tokens) for each in self.requests.values())
        assert held <= CAPABILITIES.num_blocks
        assert sum(orders.tokens.values()) <= CAPABILITIES.max_batch_tokens
        between()
        self.now[0] += 0.005 + 1e-4 * sum(orders.tokens.values())
        for name in orders.tokens:
            if (request := self.requests.get(name)) and request.num_computed_tokens == request.num_tokens:
                request.generated += 1
                if request.is_finished():
                    self.ended[name] = self.requests.pop(name)
        self.seat.report()
        return orders


def engine(profile: Path | None = None) -> Engine:
    now = [100.0]
    make = partial(Scheduler, CAPABILITIES)
    return Engine(Seat(make, lambda: now[0], lambda: WALL + now[0], profile), now)


SLO = {"slo_ttft_ms": 300, "slo_tpot_ms": 40.0, "slo_class": "coding", "slo_weight": 2}


def test_an_slo_is_read_from_the_request_s_arguments() -> None:
    """Milliseconds become seconds; without any the request is best effort."""
    assert read_slo(SLO) == (Slo(0.3, 0.04), "coding", 2.0)
    assert read_slo({"slo_class": "batch"}) == (None, "batch", 1.0)
    assert read_slo({}) == (None, "default", 1.0)


@pytest.mark.parametrize(
    "wrong",
    [{"slo_tpot_ms": None}, {"slo_ttft_ms": "soon"}, {"slo_tpot_ms": -1}, {"slo_weight": [1]}, {"slo_weight": 0}],
)
def test_what_cannot_be_read_is_best_effort_and_logged(wrong: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """An exception here would end vLLM for everybody."""
    with caplog.at_level(logging.WARNING):
        assert read_slo({**SLO, **wrong})[0] is None
    assert "best effort" in caplog.text


def test_a_promised_request_goes_first() -> None:
    """The orders name the tokens of each request; best effort waits where the batch is full."""
    served = engine()
    served.add("free", 120, 4)
    served.add("paid", 120, 4, **SLO)
    orders = served.step()
    assert orders.tokens["paid"] == 120
    assert orders.tokens.get("free", 0) <= 8


def test_what_waited_at_the_front_has_waited() -> None:
    """Arrival times of the wall clock become those of the planner's: a deadline that passed cannot be promised."""
    served = engine()
    late = served.add("late", 100, 4, **SLO)
    late.arrival_time -= 10
    served.add("new", 100, 4, **SLO)
    assert next(iter(served.step().tokens)) == "new"


@pytest.mark.parametrize("seed", range(4))
def test_every_request_ends_and_the_planner_keeps_step(seed: int) -> None:
    """Random arrivals, aborts in and between batches, and batches that were cut short; memory is short throughout."""
    chance = random.Random(seed)
    served = engine()
    evictions = 0
    for number in range(400):
        if number < 300 and chance.random() < 0.3 and len(served.requests) < 12:
            slo = SLO if chance.random() < 0.5 else {}
            served.add(f"r{number}", chance.randint(1, 150), chance.randint(1, 60), **slo)
        if served.requests and chance.random() < 0.03:
            served.abort(chance.choice(list(served.requests)))

        def abort_one() -> None:
            if served.requests and chance.random() < 0.03:
                served.abort(chance.choice(list(served.requests)))

        evictions += len(served.step(chance.choice((1.0, 1.0, 0.5)), abort_one).evicted)
    while served.requests:
        served.step()
    assert all(each.is_finished() for each in served.ended.values())
    assert evictions > 0
    snapshot = served.seat._planner.snapshot()
    assert (snapshot.waiting, snapshot.prefilling, snapshot.decoding) == (0, 0, 0)
    assert snapshot.free_blocks == CAPABILITIES.num_blocks


def test_the_time_model_is_fitted_in_a_pause_and_kept(tmp_path: Path) -> None:
    """After enough batches, once; a later start reads it."""
    profile = tmp_path / "profile.json"
    served = engine(profile)
    assert served.seat.perf == UNMEASURED
    for number in range(60):
        served.add(f"r{number}", 10 + 2 * number, 10)
        while served.requests:
            served.step()
    assert len(served.seat.samples) >= FIT_SAMPLES
    fitted = PerfModel.from_json(json.loads(profile.read_text()))
    assert served.seat.perf == fitted
    assert fitted.tokens_within(0.015) == pytest.approx(100, abs=5)
    assert engine(profile).seat.perf == fitted


def test_a_profile_that_is_none_is_named(tmp_path: Path) -> None:
    """The start fails with the file's name."""
    (profile := tmp_path / "profile.json").write_text("{}")
    with pytest.raises(ValueError, match=r"profile\.json: time model: field 'pieces' is missing"):
        engine(profile)
    assert UNMEASURED.pieces[0] == Piece(0.008, 1e-4)
