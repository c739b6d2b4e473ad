"""Our planner beside vLLM's scheduler: vLLM's requests in, what may run now out, what came of it back. Pure.

    orders(requests)   what vLLM holds now -> what of it runs, tokens each, and whose KV goes
    report()           where those requests stand after the batch -> the planner

vLLM's requests are the truth: one that is new is added to the planner, one that left has ended or was aborted, and
a report says where a request stands, so a batch that vLLM cut short is learnt from like any other. Read of a
request (`vllm/v1/request.py`) are only the attributes that `EngineRequest` names. KV blocks stay vLLM's; the
planner counts them as vLLM does.

A caller asks for an SLO with `vllm_xargs` (`SamplingParams.extra_args`): `slo_ttft_ms` and `slo_tpot_ms`, and if it
likes `slo_class` and `slo_weight`. Without them, or with values that mean nothing, a request is best effort.
"""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from slos_serve.scheduler.core import Advance, Plan, Request, RequestId, Slo, Stage, StepReport
from slos_serve.scheduler.engine import Planner
from slos_serve.scheduler.perf import BatchShape, PerfModel, Piece

from .profiling import Sample, fit_samples

log = logging.getLogger(__name__)

UNMEASURED: Final = PerfModel((Piece(base=0.008, per_token=1e-4),))  # until the first batches are measured
FIT_SAMPLES: Final = 256
SAMPLES: Final = 2048


class EngineRequest(Protocol):
    """What is read of a vLLM request. `num_tokens` are prompt and output, `num_computed_tokens` have KV."""

    request_id: str
    arrival_time: float
    max_tokens: int
    num_computed_tokens: int
    sampling_params: Any

    @property
    def num_prompt_tokens(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    def is_finished(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Orders:
    """Most tokens of each request that runs now, most urgent first; whose KV is dropped before that."""

    tokens: Mapping[RequestId, int]
    evicted: tuple[RequestId, ...] = ()


@dataclass(frozen=True, slots=True)
class _Flight:
    """A plan that is being carried out, and vLLM's requests in it."""

    plan: Plan
    requests: Mapping[RequestId, EngineRequest]
    shape: BatchShape
    started_at: float


class Seat:
    """One planner in the place of vLLM's policy. `clock` is monotonic, `wall` is the one of arrival times; seconds."""

    def __init__(
        self,
        make_planner: Callable[[PerfModel], Planner],
        clock: Callable[[], float],
        wall: Callable[[], float],
        profile: Path | None = None,
    ) -> None:
        """The time model comes from the file `profile`; where there is none it is fitted at the first pause after
        enough batches, and written there. Raises ValueError for a file that holds none."""
        self._make_planner = make_planner
        self._clock = clock
        self._wall = wall
        self._profile = profile
        self._is_fitted = profile is not None and profile.exists()
        self.perf = _read(profile) if profile is not None and self._is_fitted else UNMEASURED
        self._planner = make_planner(self.perf)
        self._told: dict[RequestId, int] = {}  # tokens of each request that the planner knows of
        self._flight: _Flight | None = None
        self.samples: deque[Sample] = deque(maxlen=SAMPLES)

    def orders(self, requests: Mapping[RequestId, EngineRequest]) -> Orders:
        """What runs now of the requests that could. Nobody is ordered twice without a report between."""
        now = self._clock()
        for name in [name for name in self._told if name not in requests]:
            self.cancel(name)
        for name, request in requests.items():
            if name not in self._told:
                self._planner.add(self._request(request, now), now)
                self._told[name] = request.num_tokens
        plan = self._planner.plan(now)
        running = {chunk.request_id: requests[chunk.request_id] for chunk in plan.chunks}
        if plan.chunks or plan.evicted:
            self._flight = _Flight(plan, running, _shape(plan, running), now)
        return Orders({chunk.request_id: chunk.length for chunk in plan.chunks}, plan.evicted)

    def report(self) -> None:
        """Tell the planner what became of the last orders. With nobody left there is time to fit."""
        flight, self._flight = self._flight, None
        if flight is not None:
            self._learn(flight, self._clock())
        if not self._told:
            self._fit()

    def _learn(self, flight: _Flight, now: float) -> None:
        advances = [self._advance(name, request) for name, request in flight.requests.items() if name in self._told]
        self._planner.report(StepReport(flight.started_at, now, tuple(advances)))
        for advance in advances:
            if advance.done:
                del self._told[advance.request_id]
        if flight.requests:
            self.samples.append(Sample(flight.shape, now - flight.started_at))

    def cancel(self, name: RequestId) -> None:
        """Forget a request that was aborted; unknown ids are ignored."""
        if self._told.pop(name, None) is not None:
            self._planner.cancel(name)

    def _advance(self, name: RequestId, request: EngineRequest) -> Advance:
        new = request.num_tokens - self._told[name]
        self._told[name] += new
        return Advance(name, request.num_computed_tokens, new, done=request.is_finished())

    def _request(self, request: EngineRequest, now: float) -> Request:
        """The request for the planner, its arrival on our clock; of one that has run before, what is left of it."""
        generated = request.num_tokens - request.num_prompt_tokens
        asked = request.sampling_params.extra_args if request.sampling_params is not None else None
        slo, slo_class, weight = read_slo(asked or {})
        return Request(
            request.request_id,
            min(now - (self._wall() - request.arrival_time), now),
            request.num_tokens,
            (Stage(max(request.max_tokens - generated, 1), slo),),
            slo_class,
            weight,
            cached_tokens=min(request.num_computed_tokens, request.num_tokens - 1),
        )

    def _fit(self) -> None:
        """Once, with nobody waiting: the time model of the batches so far, for a new planner."""
        if self._is_fitted or len(self.samples) < FIT_SAMPLES:
            return
        self._is_fitted = True
        self.perf, score = fit_samples(list(self.samples))
        self._planner = self._make_planner(self.perf)
        log.info("time model of %d batches, MAPE %.1f %%: %s", len(self.samples), score.mape, self.perf)
        if self._profile is not None:
            self._profile.write_text(json.dumps(self.perf.to_json()) + "\n", encoding="utf-8")


def read_slo(asked: Mapping[str, Any]) -> tuple[Slo | None, str, float]:
    """SLO, class and weight of `extra_args`. What cannot be read is logged and best effort: raising would end vLLM."""
    slo_class = str(asked.get("slo_class", "default"))
    ttft, tpot, weight = asked.get("slo_ttft_ms"), asked.get("slo_tpot_ms"), asked.get("slo_weight", 1.0)
    if ttft is None and tpot is None:
        return None, slo_class, 1.0
    try:
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"slo_weight must be a positive number, got {weight!r}")
        return Slo(ttft / 1000, tpot / 1000), slo_class, float(weight)  # type: ignore[operator]
    except (TypeError, ValueError) as error:
        log.warning("vllm_xargs %s: %s; served best effort", dict(asked), error)
        return None, slo_class, 1.0


def _shape(plan: Plan, requests: Mapping[RequestId, EngineRequest]) -> BatchShape:
    """What the time of the planned batch depends on."""
    tokens = context = 0
    area = 0.0
    for chunk in plan.chunks:
        request = requests[chunk.request_id]
        tokens += chunk.length
        if chunk.length == 1 and request.num_tokens > request.num_prompt_tokens:
            context += request.num_tokens
        else:
            area += chunk.length * (chunk.start + 0.5 * chunk.length)
    return BatchShape(tokens, context, area)


def _read(profile: Path) -> PerfModel:
    try:
        return PerfModel.from_json(json.loads(profile.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{profile}: {error}") from error
