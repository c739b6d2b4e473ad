"""The scheduler run by hand: virtual time, modelled iterations, no tokens.

`SimulatedEngine` satisfies `Engine` with counts alone; `simulate` plays requests through a planner and it.
The same seed gives the same result to the last bit on any machine with the same numpy.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .attainment import attained
from .core import Advances, Capabilities, Chunks, Ints, Plan, Request, RequestId, StepReport
from .engine import Planner
from .jit import compiled
from .perf import BatchShape, PerfModel

# Columns of a simulated request.
PROMPT: Final = 0
OUTPUT: Final = 1  # tokens it will really produce
COMPUTED: Final = 2
EMITTED: Final = 3
BLOCKS: Final = 4
COLUMNS: Final = 5

# What `run_batch` sums up.
TOKENS: Final = 0
CONTEXT: Final = 1
AREA: Final = 2
STEPS: Final = 3
HELD: Final = 4  # change of held blocks
SUMS: Final = 5


@compiled
def run_batch(live: Any, slots: Any, numbers: Any, accepted: Any, block_tokens: int, advances: Any, sums: Any) -> int:
    """Run each chunk on the counts; returns -1, or the index of a chunk that does not fit its request."""
    for i in range(slots.size):
        slot = slots[i]
        start, length, draft = numbers[i, 0], numbers[i, 1], numbers[i, 2]
        known = live[PROMPT, slot] + live[EMITTED, slot]
        reached = start + length - draft
        if start != live[COMPUTED, slot] or reached > known or length < 1 or draft < 0 or draft >= length:
            return int(i)
        sums[TOKENS] += length
        sums[STEPS] = max(sums[STEPS], float(draft))
        if live[EMITTED, slot] > 0 and length == 1 + draft:
            sums[CONTEXT] += start
        else:
            sums[AREA] += length * (start + 0.5 * length)
        new = taken = 0
        if reached == known:
            taken = min(accepted[i], draft)
            new = min(1 + taken, live[OUTPUT, slot] - live[EMITTED, slot])
            taken = min(taken, new)
            live[EMITTED, slot] += new
            reached += new - 1
        live[COMPUTED, slot] = reached
        done = live[EMITTED, slot] >= live[OUTPUT, slot]
        blocks = 0 if done else (reached + block_tokens - 1) // block_tokens
        sums[HELD] += blocks - live[BLOCKS, slot]
        live[BLOCKS, slot] = blocks
        advances[i, 0] = reached
        advances[i, 1] = new
        advances[i, 2] = taken
        advances[i, 3] = 0
        advances[i, 4] = done
    return -1


class SimulatedEngine:
    """Takes the model's seconds for each batch, times a lognormal noise of standard deviation `noise`.

    Raises RuntimeError for a chunk that does not fit its request, as a real engine would.
    """

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
        self._live: Ints = np.zeros((COLUMNS, 64), np.int64)
        self._acceptance: NDArray[np.float64] = np.zeros(64)
        self._slot_of: dict[RequestId, int] = {}
        self._free = list(range(63, -1, -1))
        self._held = 0

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    def add(self, request: Request, output_tokens: int, acceptance: float = 0.0) -> None:
        """Register a request, how many tokens it will really produce, and how often a guess is right."""
        if not self._free:
            self._grow()
        slot = self._free.pop()
        self._slot_of[request.id] = slot
        blocks = -(-request.cached_tokens // self._capabilities.block_tokens)
        output = max(min(output_tokens, request.max_new_tokens), 1)
        self._live[:, slot] = (request.prompt_tokens, output, request.cached_tokens, 0, blocks)
        self._acceptance[slot] = acceptance
        self._held += blocks

    def release(self, request_id: RequestId) -> None:
        slot = self._slot_of.pop(request_id, None)
        if slot is not None:
            self._held -= int(self._live[BLOCKS, slot])
            self._live[:, slot] = 0
            self._free.append(slot)

    def step(self, plan: Plan, now: float) -> StepReport:
        for name in plan.evicted:
            slot = self._slot_of[name]
            self._held -= int(self._live[BLOCKS, slot])
            self._live[COMPUTED, slot] = self._live[BLOCKS, slot] = 0
        chunks = plan.chunks if isinstance(plan.chunks, Chunks) else _columns(plan)
        slot_of = self._slot_of
        slots = np.array([slot_of[name] for name in chunks.ids], dtype=np.int64)
        numbers = np.empty((slots.size, 5), np.int64)
        sums = np.zeros(SUMS)
        accepted = self._guess(slots, chunks.numbers[:, 2])
        wrong = run_batch(self._live, slots, chunks.numbers, accepted, self._capabilities.block_tokens, numbers, sums)
        if wrong >= 0:
            raise RuntimeError(f"{chunks[wrong]} does not fit its request {self._live[:, slots[wrong]].tolist()}")
        self._held += int(sums[HELD])
        for i in np.flatnonzero(numbers[:, 4]).tolist():
            self._free.append(slot_of.pop(chunks.ids[i]))
        free = self._capabilities.num_blocks - self._held
        return StepReport(now, now + self._seconds(sums), Advances(chunks.ids, numbers), free)

    def _seconds(self, sums: NDArray[np.float64]) -> float:
        if not sums[TOKENS]:
            return 0.0
        seconds = self.perf.seconds(BatchShape(int(sums[TOKENS]), int(sums[CONTEXT]), sums[AREA], int(sums[STEPS])))
        if self._rng is not None and self._noise > 0:
            seconds *= math.exp(self._noise * self._rng.standard_normal())
        return seconds

    def _guess(self, slots: Ints, drafts: Ints) -> Ints:
        """How many guesses of each chunk would be accepted: a run of successes."""
        accepted = np.zeros(slots.size, np.int64)
        if self._rng is not None:
            for i in np.flatnonzero(drafts).tolist():
                right = self._rng.random(int(drafts[i])) < self._acceptance[slots[i]]
                accepted[i] = int(right.cumprod().sum())
        return accepted

    def _grow(self) -> None:
        old = self._live.shape[1]
        self._live = np.concatenate([self._live, np.zeros_like(self._live)], axis=1)
        self._acceptance = np.concatenate([self._acceptance, np.zeros_like(self._acceptance)])
        self._free = list(range(2 * old - 1, old - 1, -1))


def _columns(plan: Plan) -> Chunks:
    numbers = [(chunk.start, chunk.length, chunk.draft) for chunk in plan.chunks]
    names = tuple(chunk.request_id for chunk in plan.chunks)
    return Chunks(names, np.array(numbers, dtype=np.int64).reshape(-1, 3))


@dataclass(slots=True)
class Outcome:
    """What became of one simulated request; times are absolute virtual seconds."""

    request: Request
    token_times: list[float] = field(default_factory=list)
    preemptions: int = 0
    admitted: bool = False
    reason: str = ""

    @property
    def stage_tokens(self) -> list[int]:
        """Output tokens of each stage."""
        left, counts = len(self.token_times), []
        for stage in self.request.stages:
            counts.append(min(left, stage.max_new_tokens))
            left -= counts[-1]
        return counts

    @property
    def attained(self) -> bool:
        return attained(self.request.stages, self.stage_tokens, self.request.arrived_at, self.token_times)


def simulate(
    requests: Iterable[Request],
    output_tokens: Mapping[RequestId, int],
    planner: Planner,
    engine: SimulatedEngine,
    *,
    until: float = math.inf,
    acceptance: float = 0.0,
    on_step: Callable[[Plan, StepReport], None] | None = None,
    follow_up: Callable[[RequestId, float], tuple[Request, int] | None] | None = None,
    outcomes: dict[RequestId, Outcome] | None = None,
) -> dict[RequestId, Outcome]:
    """Play `requests` until all have ended or virtual second `until` has passed.

    `output_tokens` tells how many tokens each will produce, which the planner never sees; `acceptance` is
    the share of right guesses. `follow_up` is called with each request that ends and when, and may return
    the next round of its session, to arrive then or later, and its output tokens. Returns an outcome for
    every request that arrived, in `outcomes` where given, which is filled as time goes on. Raises
    RuntimeError when requests are live and the planner runs nothing.
    """
    # By arrival, and in the order given where times are equal.
    pending = [(each.arrived_at, index, each, output_tokens[each.id]) for index, each in enumerate(requests)]
    heapq.heapify(pending)
    outcomes = {} if outcomes is None else outcomes
    now, live = 0.0, 0
    while now < until and (pending or live):
        while pending and pending[0][0] <= now:
            *_, request, tokens = heapq.heappop(pending)
            outcomes[request.id] = Outcome(request)
            engine.add(request, tokens, acceptance)
            planner.add(request, now)
            live += 1
        plan = planner.plan(now)
        for decision in plan.decisions:
            outcomes[decision.request_id].admitted = decision.admitted
            outcomes[decision.request_id].reason = decision.reason
        for request_id in plan.evicted:
            outcomes[request_id].preemptions += 1
        if not plan.chunks:
            if not pending:
                raise RuntimeError(f"{live} requests are live and nothing runs at {now}: {planner!r}")
            now = max(now, pending[0][0])
            continue
        report = engine.step(plan, now)
        planner.report(report)
        if on_step is not None:
            on_step(plan, report)
        now = report.finished_at
        for request_id in _record(outcomes, report):
            live -= 1
            following = follow_up(request_id, now) if follow_up is not None else None
            if following is not None:
                heapq.heappush(pending, (following[0].arrived_at, len(outcomes) + len(pending), *following))
    return outcomes


def _record(outcomes: dict[RequestId, Outcome], report: StepReport) -> list[RequestId]:
    """Note the token times of a step; returns the requests that ended."""
    advances = report.advances
    assert isinstance(advances, Advances)
    at = report.finished_at
    for name, new in zip(advances.ids, advances.numbers[:, 1].tolist(), strict=True):
        if new == 1:
            outcomes[name].token_times.append(at)
        elif new:
            outcomes[name].token_times.extend([at] * new)
    return [advances.ids[i] for i in np.flatnonzero(advances.numbers[:, 4]).tolist()]
