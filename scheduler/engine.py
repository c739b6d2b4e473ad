"""The consumer's view of an engine, and the loop body that joins it to a scheduler.

    plan = scheduler.plan(now)        decide
    report = engine.step(plan)        compute
    scheduler.report(report)          learn

`Replica.step` is exactly that, so the simulator and the real server run the same three calls. An engine
that owns its loop (TensorRT-LLM's PyExecutor, vLLM) calls the scheduler itself and needs no Replica.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from .core import Capabilities, Plan, Request, RequestId, Snapshot, StepReport


class Planner(Protocol):
    """A policy: five methods, no clock, no thread. Every policy in `POLICIES` has this shape."""

    def add(self, request: Request, now: float) -> None: ...
    def cancel(self, request_id: RequestId) -> bool: ...
    def plan(self, now: float) -> Plan: ...
    def report(self, report: StepReport) -> None: ...
    def snapshot(self) -> Snapshot: ...


class Engine(Protocol):
    """Something that runs batches. It remembers token ids and KV; it decides nothing.

    `step` drops `plan.evicted`, runs `plan.chunks` as one batch and says what came of it; a request that
    is done in the report has been released. `release` forgets a request at once (cancelled, failed) and
    frees its memory; unknown ids are ignored.
    """

    @property
    def capabilities(self) -> Capabilities: ...
    def step(self, plan: Plan, now: float) -> StepReport: ...
    def release(self, request_id: RequestId) -> None: ...


@dataclass(slots=True)
class Replica:
    """One scheduler and one engine."""

    scheduler: Planner
    engine: Engine

    def step(self, now: float) -> tuple[Plan, StepReport | None]:
        """Plan and run one batch; the report is None when nothing could run."""
        plan = self.scheduler.plan(now)
        if not plan.chunks and not plan.evicted:
            return plan, None
        report = self.engine.step(plan, now)
        self.scheduler.report(report)
        return plan, report

    def cancel(self, request_id: RequestId) -> bool:
        """Forget a request on both sides; False when it was not there (already done)."""
        known = self.scheduler.cancel(request_id)
        self.engine.release(request_id)
        return known
