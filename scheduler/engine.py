"""The consumer's view of a policy and of an engine, which meet in three calls.

    plan = scheduler.plan(now)        decide
    report = engine.step(plan)        compute
    scheduler.report(report)          learn

The worker of the server and the simulator run exactly these three calls. An engine that owns its loop
(TensorRT-LLM's PyExecutor, vLLM) makes them itself.
"""

from __future__ import annotations

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
