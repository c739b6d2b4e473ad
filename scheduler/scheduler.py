"""Decides what runs next. Counts tokens, blocks and seconds; never sees a tensor, a clock or a socket.

    add      a request arrives                 cancel    it is gone
    plan     what to run now                   report    what came of it
    snapshot the state in numbers

`plan` and `report` alternate. Everything a decision depends on comes in through these calls, so a
recorded sequence of them replays to equal plans on any machine.

A request with an SLO is provisional until its first token (see `admission`), promised after it, and best
effort when its promise could not be made. Best effort never starves: once a request has made no progress
for `patience` seconds it is served before all others with `share` of every batch until it makes progress,
one request at a time, longest-waiting first, and may take the memory of every younger best-effort request.
With b best-effort requests each therefore advances at least once in about `patience` + b iterations as
long as promised work leaves any block or ends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import batching, table
from .admission import REASONS, Verdict, pack
from .core import (
    Advance,
    Capabilities,
    Chunk,
    Decision,
    Plan,
    Request,
    RequestId,
    Snapshot,
    StepReport,
)
from .lengths import ClassMean
from .perf import BatchShape, Correction, PerfModel
from .table import BEST_EFFORT, PROMISED, PROVISIONAL, Table

DRAFT_PRIOR = 0.6  # acceptance assumed before any guess was verified
DRAFT_MEMORY = 200.0


@dataclass(frozen=True, slots=True)
class PlannerConfig:
    """The planner's knobs; one setting serves all workloads.

    `cap`: longest iteration in seconds while anything is promised (longer: cheaper prefill, later tokens).
    `floor`: shortest planned iteration, in decode-only iterations. `reserve`: prefill is planned this many
    times faster than its deadlines need. `overcommit`: predicted KV peaks may sum to this many times the
    memory. `patience` seconds and `share` of a batch bound the starvation of best effort. `idle_cap`:
    longest iteration that best effort may cause beside promised decodes, in decode-only iterations.
    `margin`: fixed planning margin on predicted times; None learns it from the residuals.
    """

    cap: float = 0.08
    floor: float = 1.3
    reserve: float = 2.0
    overcommit: float = 1.15
    patience: float = 10.0
    share: float = 0.125
    idle_cap: float = 2.0
    margin: float | None = None

    def __post_init__(self) -> None:
        bounds = {"cap": (0, 10), "floor": (1, 100), "reserve": (1, 100), "overcommit": (0.1, 10), "share": (0, 1)}
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if not low < value <= high and not (name == "floor" and value == 1):
                raise ValueError(f"planner {name}: must be in ({low}, {high}], got {value!r}")


@dataclass(slots=True)
class _Outstanding:
    """What was planned and not yet reported."""

    chunks: dict[RequestId, Chunk] = field(default_factory=dict)
    predicted: float = 0.0


class Scheduler:
    """The `slos_serve` policy. Raises ValueError for a request that could never run."""

    def __init__(self, capabilities: Capabilities, perf: PerfModel, config: PlannerConfig | None = None) -> None:
        self.capabilities = capabilities
        self.perf = perf
        self.config = config or PlannerConfig()
        self.correction = Correction()
        self._table = Table()
        self._lengths: dict[str, ClassMean] = {}
        self._acceptance: dict[str, float] = {}
        self._stages: dict[RequestId, int] = {}
        self._stage_left: dict[RequestId, int] = {}
        self._outstanding: _Outstanding | None = None
        self._held = 0
        self._shared = 0
        self._dropped: list[RequestId] = []
        self._totals = {"admitted": 0, "declined": 0, "preempted": 0}
        self._limits = self._fixed_limits()
        self._buffers = self._allocate(0)

    def __repr__(self) -> str:
        kinds = self._table.whole[table.KIND][self._table.active]
        names = ((PROVISIONAL, "provisional"), (PROMISED, "promised"), (BEST_EFFORT, "best effort"))
        counts = ", ".join(f"{int((kinds == kind).sum())} {name}" for kind, name in names)
        return f"Scheduler({counts}, {self.free_blocks}/{self.capabilities.num_blocks} blocks free)"

    @property
    def free_blocks(self) -> int:
        """Blocks no live request holds; exact after a report, never too high before one."""
        return self.capabilities.num_blocks - self._held + self._shared

    def add(self, request: Request, now: float) -> None:
        """Consider a request from now on. Raises ValueError for a duplicate id or a prompt that never fits."""
        limits = self.capabilities
        most = min(limits.max_context, limits.num_blocks * limits.block_tokens)
        if request.prompt_tokens + 1 > most:
            raise ValueError(f"request {request.id}: prompt of {request.prompt_tokens} tokens, at most {most - 1} fit")
        slot = self._table.insert(request)
        real, whole = self._table.real, self._table.whole
        first = request.stages[0]
        real[table.ARRIVED, slot] = request.arrived_at
        real[table.DUE, slot] = request.arrived_at + first.slo.ttft if first.slo else math.inf
        real[table.TPOT, slot] = first.slo.tpot if first.slo else math.inf
        real[table.WEIGHT, slot] = request.weight
        real[table.SERVED, slot] = now
        real[table.ACCEPT, slot] = self._acceptance.get(request.slo_class, DRAFT_PRIOR)
        whole[table.KNOWN, slot] = request.prompt_tokens
        whole[table.COMPUTED, slot] = request.cached_tokens
        whole[table.HELD, slot] = -(-request.cached_tokens // limits.block_tokens)
        whole[table.KIND, slot] = PROVISIONAL if first.slo else BEST_EFFORT
        whole[table.LEFT, slot] = request.max_new_tokens
        whole[table.VERDICT, slot] = Verdict.UNDECIDED if first.slo else Verdict.BEST_EFFORT
        real[table.LENGTH, slot] = request.prompt_tokens + self._expected(request, 0)
        self._held += int(whole[table.HELD, slot])
        self._stages[request.id] = 0
        self._stage_left[request.id] = first.max_new_tokens

    def cancel(self, request_id: RequestId) -> bool:
        """Forget a request; its blocks are free at once. False when it is not here."""
        slot = self._table.slot_of.get(request_id)
        if slot is None:
            return False
        self._forget(request_id, slot)
        return True

    def plan(self, now: float) -> Plan:
        """What to run now. Raises RuntimeError when the plan before was not reported."""
        if self._outstanding is not None:
            raise RuntimeError(f"plan() before the report of the last plan ({len(self._outstanding.chunks)} chunks)")
        active = self._table.active
        if active.size == 0:
            return Plan()
        batch, evicted, counts = self._buffers_for(active.size)
        limits = self._limits
        limits[batching.FREE_BLOCKS] = self.free_blocks
        limits[batching.SHARED] = self._shared
        predicted = batching.compose(
            self._table.real, self._table.whole, active, now, self._packed(), limits, batch, evicted, counts
        )
        chunks = tuple(self._chunk(row) for row in batch[: counts[batching.ROWS]].tolist())
        gone = tuple(self._table.request(slot).id for slot in evicted[: counts[batching.EVICTED]].tolist())
        self._held = int(self._table.whole[table.HELD][active].sum())
        self._shared = int(limits[batching.SHARED])
        self._totals["preempted"] += len(gone)
        if chunks or gone:
            self._outstanding = _Outstanding({chunk.request_id: chunk for chunk in chunks}, predicted)
        return Plan(chunks, gone, self._decisions(active), predicted)

    def report(self, report: StepReport) -> None:
        """Learn what came of the last plan. Raises RuntimeError when there was none, or counts disagree."""
        outstanding = self._outstanding
        if outstanding is None:
            raise RuntimeError("report() without a plan")
        self._outstanding = None
        if report.advances:
            self._observe_time(outstanding, report)
        for advance in report.advances:
            self._advance(advance, outstanding.chunks.get(advance.request_id), report.finished_at)
        self._shared = report.shared_blocks
        if report.free_blocks is not None and report.free_blocks != self.free_blocks:
            raise RuntimeError(
                f"KV accounting: the engine has {report.free_blocks} free blocks, the scheduler counts "
                f"{self.free_blocks} ({self._held} held, {self._shared} shared, {self.capabilities.num_blocks} in all)"
            )

    def snapshot(self) -> Snapshot:
        """The state in numbers, at any time."""
        active = self._table.active
        whole = self._table.whole[:, active]
        left = whole[table.KNOWN] - whole[table.COMPUTED]
        started = whole[table.HELD] > 0
        decoding = (left == 1) & (whole[table.EMITTED] > 0)
        return Snapshot(
            waiting=int((~started & ~decoding).sum()),
            prefilling=int((started & ~decoding).sum()),
            decoding=int(decoding.sum()),
            best_effort=int((whole[table.KIND] == BEST_EFFORT).sum()),
            free_blocks=self.free_blocks,
            num_blocks=self.capabilities.num_blocks,
            waiting_tokens=int(left[~decoding].sum()),
            admitted_total=self._totals["admitted"],
            declined_total=self._totals["declined"],
            preempted_total=self._totals["preempted"],
        )

    def acceptance(self) -> Mapping[str, float]:
        """Share of guesses accepted lately, by class."""
        return dict(self._acceptance)

    # Planning

    def _packed(self) -> NDArray[Any]:
        margin = self.correction.margin if self.config.margin is None else self.config.margin
        pieces = [(p.base, p.per_token, p.per_step) for p in self.perf.pieces]
        return pack(
            pieces, self.perf.per_context, self.perf.per_area, self.correction.scale, self.correction.offset, margin
        )

    def _fixed_limits(self) -> NDArray[Any]:
        limits = np.zeros(batching.LIMITS)
        caps, config = self.capabilities, self.config
        limits[batching.NUM_BLOCKS] = caps.num_blocks
        limits[batching.BLOCK_TOKENS] = caps.block_tokens
        limits[batching.MAX_TOKENS] = caps.max_batch_tokens
        limits[batching.MAX_ROWS] = caps.max_batch_requests
        limits[batching.MULTIPLE] = caps.chunk_multiple
        limits[batching.MAX_DRAFT] = caps.max_draft
        limits[batching.MID_PREFILL] = caps.can_preempt_mid_prefill
        limits[batching.CAP] = config.cap
        limits[batching.FLOOR] = config.floor
        limits[batching.RESERVE] = config.reserve
        limits[batching.OVERCOMMIT] = config.overcommit
        limits[batching.PATIENCE] = config.patience
        limits[batching.SHARE] = config.share
        limits[batching.IDLE_CAP] = config.idle_cap
        return limits

    def _allocate(self, size: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        return np.zeros((size, 4), np.int64), np.zeros(size, np.int64), np.zeros(3, np.int64)

    def _buffers_for(self, size: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        if self._buffers[0].shape[0] < size:
            self._buffers = self._allocate(2 * size)
        return self._buffers

    def _chunk(self, row: list[int]) -> Chunk:
        slot, start, length, draft = row
        return Chunk(self._table.request(slot).id, start, length, draft)

    def _decisions(self, active: NDArray[Any]) -> tuple[Decision, ...]:
        verdicts, told = self._table.whole[table.VERDICT], self._table.whole[table.TOLD]
        changed = active[verdicts[active] != told[active]]
        told[changed] = verdicts[changed]
        return tuple(self._decision(slot, Verdict(int(verdicts[slot]))) for slot in changed.tolist())

    def _decision(self, slot: int, verdict: Verdict) -> Decision:
        return Decision(self._table.request(slot).id, verdict == Verdict.ADMITTED, REASONS[verdict])

    # Learning

    def _observe_time(self, outstanding: _Outstanding, report: StepReport) -> None:
        tokens = context = steps = 0
        area = 0.0
        for chunk in outstanding.chunks.values():
            tokens += chunk.length
            steps = max(steps, chunk.draft)
            if chunk.length == 1 + chunk.draft and chunk.start > 0:
                context += chunk.start
            else:
                area += chunk.length * (chunk.start + 0.5 * chunk.length)
        raw = self.perf.seconds(BatchShape(tokens, context, area, steps))
        self.correction.observe(raw, report.finished_at - report.started_at)

    def _advance(self, advance: Advance, chunk: Chunk | None, finished_at: float) -> None:
        slot = self._table.slot_of.get(advance.request_id)
        if slot is None:  # cancelled while it ran
            return
        if chunk is None:
            raise RuntimeError(f"report of request {advance.request_id}, which was not planned")
        real, whole = self._table.real, self._table.whole
        request = self._table.request(slot)
        whole[table.COMPUTED, slot] = advance.computed
        self._hold(slot, -(-advance.computed // self.capabilities.block_tokens))
        real[table.SERVED, slot] = finished_at
        if chunk.draft:
            self._learn_acceptance(request.slo_class, chunk.draft, advance.accepted)
        if advance.new_tokens:
            self._emit(request, slot, advance, finished_at)
        if advance.done:
            self._lengths.setdefault(request.slo_class, ClassMean()).observe(int(whole[table.EMITTED, slot]))
            self._forget(request.id, slot)

    def _emit(self, request: Request, slot: int, advance: Advance, finished_at: float) -> None:
        real, whole = self._table.real, self._table.whole
        if whole[table.KIND, slot] == PROVISIONAL:
            late = finished_at > real[table.DUE, slot]
            whole[table.KIND, slot] = BEST_EFFORT if late else PROMISED
            whole[table.VERDICT, slot] = Verdict.MISSED if late else Verdict.ADMITTED
            self._totals["declined" if late else "admitted"] += 1
        elif whole[table.EMITTED, slot] == 0:
            self._totals["declined"] += 1
        whole[table.KNOWN, slot] += advance.new_tokens
        whole[table.EMITTED, slot] += advance.new_tokens
        whole[table.LEFT, slot] -= advance.new_tokens
        real[table.ACCEPT, slot] = self._acceptance.get(request.slo_class, DRAFT_PRIOR)
        real[table.LENGTH, slot] = request.prompt_tokens + self._expected(request, int(whole[table.EMITTED, slot]))
        for i in range(advance.new_tokens):
            self._pace(request, slot, advance.stage_ended and i == advance.new_tokens - 1)

    def _pace(self, request: Request, slot: int, stage_ended: bool) -> None:
        """One token is out: the next is due one TPOT later, at the pace of the stage it belongs to."""
        real = self._table.real
        self._stage_left[request.id] -= 1
        stage = self._stages[request.id]
        if (stage_ended or self._stage_left[request.id] <= 0) and stage + 1 < len(request.stages):
            self._stages[request.id] = stage = stage + 1
            self._stage_left[request.id] = request.stages[stage].max_new_tokens
            slo = request.stages[stage].slo
            real[table.TPOT, slot] = slo.tpot if slo else math.inf
        real[table.DUE, slot] += real[table.TPOT, slot]

    def _learn_acceptance(self, slo_class: str, drafted: int, accepted: int) -> None:
        """P(one guess is accepted), from runs that stop at the first refusal: accepted / (accepted + refused)."""
        tried = accepted + (1 if accepted < drafted else 0)
        old = self._acceptance.get(slo_class, DRAFT_PRIOR)
        keep = (1.0 - 1.0 / DRAFT_MEMORY) ** tried
        self._acceptance[slo_class] = keep * old + (1.0 - keep) * (accepted / tried)

    def _expected(self, request: Request, emitted: int) -> float:
        if request.expected_new_tokens is not None:
            return max(float(emitted), min(request.expected_new_tokens, float(request.max_new_tokens)))
        lengths = self._lengths.get(request.slo_class) or ClassMean()
        return lengths.expect(emitted, request.max_new_tokens)

    def _hold(self, slot: int, blocks: int) -> None:
        held = self._table.whole[table.HELD]
        self._held += blocks - int(held[slot])
        held[slot] = blocks

    def _forget(self, request_id: RequestId, slot: int) -> None:
        held = int(self._table.whole[table.HELD, slot])
        self._held -= held
        # Until the next report, blocks shared with others may not be free: never count too many.
        self._shared -= min(self._shared, held)
        self._table.remove(request_id)
        del self._stages[request_id], self._stage_left[request_id]
