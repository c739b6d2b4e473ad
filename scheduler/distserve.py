"""Separate prefill and decode replicas (DistServe, Zhong et al., OSDI 2024) in virtual time.

A prompt goes to the prefill replica with the fewest waiting tokens and yields its first token there. Its KV
then travels over a `Link` to the decode replica with the most free memory, which produces the rest. KV that
finds no room waits first come first served, at no cost to the prefill side. Every replica has a planner and
an engine of its own, the same ones as everywhere else, and learns of arrivals between its iterations.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal, TypeAlias

import numpy as np

from .core import Advances, Plan, Request, RequestId, Stage, StepReport
from .engine import Planner
from .simulator import Outcome, SimulatedEngine

Watch: TypeAlias = Callable[[float, Sequence[Outcome], Sequence[float]], None]
FollowUp: TypeAlias = Callable[[RequestId, float], tuple[Request, int] | None]

WATERMARK: Final = 0.01  # share of a decode replica's blocks kept free when KV comes in


@dataclass(frozen=True, slots=True)
class Link:
    """How KV travels between replicas: `latency` seconds, then `bandwidth` bytes per second; nobody queues."""

    bytes_per_token: float
    bandwidth: float = 200e9
    latency: float = 0.001

    def seconds(self, tokens: int) -> float:
        return self.latency + tokens * self.bytes_per_token / self.bandwidth


@dataclass(slots=True, eq=False)
class Replica:
    """A planner with its engine, what arrived while it ran, and the report of the batch that runs now."""

    planner: Planner
    engine: SimulatedEngine
    inbox: deque[tuple[Request, int]] = field(default_factory=deque)
    running: StepReport | None = None
    live: int = 0

    @property
    def load(self) -> int:
        """Tokens that have to be computed before a prompt that comes now."""
        return self.planner.snapshot().waiting_tokens + sum(request.prompt_tokens for request, _ in self.inbox)

    @property
    def free_blocks(self) -> int:
        """Blocks left when all that is on its way has come in."""
        size = self.engine.capabilities.block_tokens
        coming = sum(-(-request.prompt_tokens // size) for request, _ in self.inbox)
        return self.planner.snapshot().free_blocks - coming

    def take(self, now: float) -> None:
        """Let in what arrived, as far as the KV it brings finds room."""
        capabilities = self.engine.capabilities
        while self.inbox:
            request, tokens = self.inbox[0]
            need = -(-request.cached_tokens // capabilities.block_tokens)
            left = self.planner.snapshot().free_blocks - need
            if need and self.live and left < WATERMARK * capabilities.num_blocks:
                return
            self.inbox.popleft()
            self.engine.add(request, tokens)
            self.planner.add(request, now)
            self.live += 1


@dataclass(slots=True)
class Disaggregated:
    """One group of replicas at work. `outcomes` is filled as time goes on; `watch` and `timed` as in `simulate`."""

    prefill: Sequence[Replica]
    decode: Sequence[Replica]
    link: Link
    outcomes: dict[RequestId, Outcome] = field(default_factory=dict)
    watch: Watch | None = None
    follow_up: FollowUp | None = None
    timed: Callable[[Callable[[], Plan]], Plan] = lambda plan: plan()
    _events: list[tuple[float, int, Literal["arrival", "kv", "step"], object]] = field(default_factory=list)
    _count: int = 0
    _tokens: dict[RequestId, int] = field(default_factory=dict)
    _arrived: list[Outcome] = field(default_factory=list)
    _first_at: list[float] = field(default_factory=list)
    _serial: dict[RequestId, int] = field(default_factory=dict)

    def simulate(self, requests: Iterable[Request], output_tokens: Mapping[RequestId, int]) -> None:
        """Play all requests to their end; `output_tokens` tells how many tokens each will produce."""
        for request in requests:
            self._at(request.arrived_at, "arrival", (request, output_tokens[request.id]))
        while self._events:
            now, _, kind, what = heapq.heappop(self._events)
            if kind == "step":
                assert isinstance(what, Replica)
                self._finish(what, now)
                self._start(what, now)
            else:
                assert isinstance(what, tuple)
                replica = (self._arrive if kind == "arrival" else self._receive)(*what)
                if replica.running is None:
                    self._start(replica, now)

    def _at(self, when: float, kind: Literal["arrival", "kv", "step"], what: object) -> None:
        self._count += 1
        heapq.heappush(self._events, (when, self._count, kind, what))

    def _arrive(self, request: Request, tokens: int) -> Replica:
        """A prompt goes to be prefilled, as a request for one token."""
        self.outcomes[request.id] = Outcome(request)
        self._serial[request.id] = len(self._arrived)
        self._arrived.append(self.outcomes[request.id])
        self._first_at.append(math.inf)
        self._tokens[request.id] = tokens
        replica = min(self.prefill, key=lambda each: each.load)
        replica.inbox.append((replace(request, stages=(Stage(1, request.stages[0].slo),)), 1))
        return replica

    def _receive(self, request: Request) -> Replica:
        """KV has come: all of the prompt's, and the first token as one more that is known."""
        replica = max(self.decode, key=lambda each: each.free_blocks)
        known = request.prompt_tokens
        stages = (Stage(max(request.max_new_tokens - 1, 1), request.stages[-1].slo),)
        moved = replace(request, prompt_tokens=known + 1, cached_tokens=known, stages=stages)
        replica.inbox.append((moved, self._tokens[request.id] - 1))
        return replica

    def _start(self, replica: Replica, now: float) -> None:
        replica.take(now)
        plan = self.timed(lambda: replica.planner.plan(now))
        for name in plan.evicted:
            self.outcomes[name].preemptions += 1
        if not plan.chunks:
            if replica.live:
                raise RuntimeError(f"{replica.live} requests are live and nothing runs at {now}: {replica.planner!r}")
            return
        replica.running = replica.engine.step(plan, now)
        if self.watch is not None:
            self.watch(now, self._arrived, self._first_at)
        self._at(replica.running.finished_at, "step", replica)

    def _finish(self, replica: Replica, now: float) -> None:
        report, replica.running = replica.running, None
        assert report is not None
        replica.planner.report(report)
        advances = report.advances
        assert isinstance(advances, Advances)
        for name, new in zip(advances.ids, advances.numbers[:, 1].tolist(), strict=True):
            outcome = self.outcomes[name]
            if new and not outcome.token_times:
                self._first_at[self._serial[name]] = now
            outcome.token_times.extend([now] * new)
        for i in np.flatnonzero(advances.numbers[:, 4]).tolist():
            replica.live -= 1
            self._hand_over(self.outcomes[advances.ids[i]], now)

    def _hand_over(self, outcome: Outcome, now: float) -> None:
        """After a replica is done with it: to a decode replica, or the session's next round."""
        request = outcome.request
        if len(outcome.token_times) < self._tokens[request.id]:
            self._at(now + self.link.seconds(request.prompt_tokens), "kv", (request,))
            return
        following = self.follow_up(request.id, now) if self.follow_up is not None else None
        if following is not None:
            self._at(max(now, following[0].arrived_at), "arrival", following)
