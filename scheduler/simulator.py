"""The scheduler run by hand: virtual time, modelled iterations, no tokens.

`SimulatedEngine` satisfies `Engine` with counts alone; `simulate` plays requests through a planner and it.
The same seed gives the same result to the last bit on any machine with the same numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .attainment import attained
from .core import Advance, Capabilities, Chunk, Plan, Request, RequestId, StepReport
from .engine import Planner, Replica
from .perf import BatchShape, PerfModel


@dataclass(slots=True)
class _Live:
    """What the simulated engine remembers of a request."""

    prompt_tokens: int
    output_tokens: int
    computed: int
    emitted: int = 0
    acceptance: float = 0.0

    @property
    def known(self) -> int:
        return self.prompt_tokens + self.emitted


class SimulatedEngine:
    """Takes the model's seconds for each batch, times a lognormal-like noise drawn from `rng`."""

    def __init__(
        self,
        capabilities: Capabilities,
        perf: PerfModel,
        rng: np.random.Generator | None = None,
        noise: float = 0.0,
    ) -> None:
        if noise < 0 or (noise > 0 and rng is None):
            raise ValueError(f"noise: must be >= 0 and needs an rng when > 0, got {noise!r}")
        self._capabilities = capabilities
        self.perf = perf
        self._rng = rng
        self._noise = noise
        self._live: dict[RequestId, _Live] = {}

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    def add(self, request: Request, output_tokens: int, acceptance: float = 0.0) -> None:
        """Register a request and how many tokens it will really produce."""
        most = min(output_tokens, request.max_new_tokens)
        self._live[request.id] = _Live(request.prompt_tokens, max(most, 1), request.cached_tokens, 0, acceptance)

    def release(self, request_id: RequestId) -> None:
        self._live.pop(request_id, None)

    def step(self, plan: Plan, now: float) -> StepReport:
        for request_id in plan.evicted:
            self._live[request_id].computed = 0
        shape = self._shape(plan.chunks)
        seconds = self.perf.seconds(shape) if plan.chunks else 0.0
        if self._rng is not None and self._noise > 0:
            seconds *= float(np.exp(self._rng.normal(0.0, self._noise)))
        advances = tuple(self._run(chunk) for chunk in plan.chunks)
        return StepReport(now, now + seconds, advances, self._free_blocks())

    def _shape(self, chunks: Sequence[Chunk]) -> BatchShape:
        tokens = context = steps = 0
        area = 0.0
        for chunk in chunks:
            tokens += chunk.length
            steps = max(steps, chunk.draft)
            if self._live[chunk.request_id].emitted and chunk.length == 1 + chunk.draft:
                context += chunk.start
            else:
                area += chunk.length * (chunk.start + 0.5 * chunk.length)
        return BatchShape(tokens, context, area, steps)

    def _run(self, chunk: Chunk) -> Advance:
        live = self._live[chunk.request_id]
        if chunk.start != live.computed:
            raise RuntimeError(f"{chunk} starts elsewhere than the {live.computed} computed tokens")
        reached = chunk.start + chunk.length - chunk.draft
        if reached > live.known:
            raise RuntimeError(f"{chunk} runs past the {live.known} known tokens")
        live.computed = reached
        if reached < live.known:
            return Advance(chunk.request_id, reached)
        accepted = self._accepted(live, chunk.draft)
        new = min(1 + accepted, live.output_tokens - live.emitted)
        accepted = min(accepted, new)
        live.emitted += new
        live.computed = reached + new - 1
        done = live.emitted >= live.output_tokens
        if done:
            del self._live[chunk.request_id]
        return Advance(chunk.request_id, reached + new - 1, new, accepted, done=done)

    def _accepted(self, live: _Live, draft: int) -> int:
        if draft == 0 or self._rng is None:
            return 0
        run = 0
        while run < draft and self._rng.random() < live.acceptance:
            run += 1
        return run

    def _free_blocks(self) -> int:
        size = self._capabilities.block_tokens
        return self._capabilities.num_blocks - sum(-(-live.computed // size) for live in self._live.values())


@dataclass(slots=True)
class Outcome:
    """What became of one simulated request; times are absolute virtual seconds."""

    request: Request
    token_times: list[float] = field(default_factory=list)
    preemptions: int = 0
    admitted: bool = False
    reason: str = ""

    @property
    def attained(self) -> bool:
        counts = _stage_counts(self.request, len(self.token_times))
        return attained(self.request.stages, counts, self.request.arrived_at, self.token_times)


def _stage_counts(request: Request, tokens: int) -> list[int]:
    counts = []
    for stage in request.stages:
        counts.append(min(tokens, stage.max_new_tokens))
        tokens -= counts[-1]
    return counts


def simulate(
    requests: Iterable[Request],
    output_tokens: Mapping[RequestId, int],
    planner: Planner,
    engine: SimulatedEngine,
    *,
    until: float = float("inf"),
    acceptance: float = 0.0,
    on_step: Callable[[Plan, StepReport], None] | None = None,
) -> dict[RequestId, Outcome]:
    """Play `requests` (sorted by arrival) until all have ended or `until` seconds have passed.

    `output_tokens` tells how many tokens each will produce, which the planner never sees. Returns an
    outcome for every request that arrived.
    """
    replica = Replica(planner, engine)
    pending = sorted(requests, key=lambda request: request.arrived_at)
    outcomes: dict[RequestId, Outcome] = {}
    now, index = 0.0, 0
    live = 0
    while now < until and (index < len(pending) or live):
        while index < len(pending) and pending[index].arrived_at <= now:
            request = pending[index]
            index += 1
            outcomes[request.id] = Outcome(request)
            engine.add(request, output_tokens[request.id], acceptance)
            planner.add(request, now)
            live += 1
        plan, report = replica.step(now)
        for decision in plan.decisions:
            outcomes[decision.request_id].admitted = decision.admitted
            outcomes[decision.request_id].reason = decision.reason
        for request_id in plan.evicted:
            outcomes[request_id].preemptions += 1
        if report is None:
            if index >= len(pending):
                if live:
                    raise RuntimeError(f"{live} requests are live and nothing runs at {now}: {planner!r}")
                break
            now = max(now, pending[index].arrived_at)
            continue
        if on_step is not None:
            on_step(plan, report)
        now = report.finished_at
        for advance in report.advances:
            outcomes[advance.request_id].token_times.extend([now] * advance.new_tokens)
            live -= advance.done
    return outcomes
