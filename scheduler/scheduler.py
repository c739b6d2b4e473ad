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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from . import batching, learning, table
from .admission import REASONS, Verdict, pack
from .core import (
    Advance,
    Advances,
    Capabilities,
    Chunks,
    Decision,
    Ints,
    Plan,
    Request,
    RequestId,
    Snapshot,
    StepReport,
)
from .lengths import ClassMean
from .perf import Correction, PerfModel
from .table import BEST_EFFORT, PROMISED, PROVISIONAL, Table

Floats: TypeAlias = NDArray[np.float64]

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


class Compose(Protocol):
    """A policy's heart: fill `batch` and `evicted` from the columns; see `batching.compose` for each argument."""

    def __call__(
        self,
        real: Floats,
        whole: Ints,
        active: Ints,
        now: float,
        perf: Floats,
        limits: Floats,
        batch: Ints,
        evicted: Ints,
        counts: Ints,
    ) -> float: ...


@dataclass(frozen=True, slots=True)
class _Outstanding:
    """What was planned and not yet reported: the chunks, their slots, and the model's uncorrected seconds."""

    chunks: Chunks
    slots: Ints
    raw: float


class Scheduler:
    """The `slos_serve` policy. Raises ValueError for a request that could never run."""

    def __init__(
        self,
        capabilities: Capabilities,
        perf: PerfModel,
        config: PlannerConfig | None = None,
        compose: Compose = batching.compose,
    ) -> None:
        self.capabilities = capabilities
        self._compose = compose
        self.perf = perf
        self.config = config or PlannerConfig()
        self.correction = Correction()
        self._table = Table()
        self._lengths: dict[str, ClassMean] = {}
        self._acceptance: dict[str, float] = {}
        self._outstanding: _Outstanding | None = None
        self._held = 0
        self._shared = 0
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
        whole[table.STAGE_LEFT, slot] = first.max_new_tokens
        whole[table.VERDICT, slot] = Verdict.UNDECIDED if first.slo else Verdict.BEST_EFFORT
        real[table.LENGTH, slot] = request.prompt_tokens + self._expected(request, 0)
        self._held += int(whole[table.HELD, slot])

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
        limits, real, whole = self._limits, self._table.real, self._table.whole
        limits[batching.FREE_BLOCKS] = self.free_blocks
        limits[batching.SHARED] = self._shared
        predicted = self._compose(real, whole, active, now, self._packed(), limits, batch, evicted, counts)
        self._held = int(whole[table.HELD, active].sum())
        self._shared = int(limits[batching.SHARED])
        rows, drops = int(counts[batching.ROWS]), int(counts[batching.EVICTED])
        slots = batch[:rows, batching.SLOT].copy()
        chunks = Chunks(self._names(slots), batch[:rows, batching.START :].copy())
        gone = self._names(evicted[:drops])
        self._totals["preempted"] += drops
        if rows or drops:
            self._outstanding = _Outstanding(chunks, slots, self.correction.invert(predicted))
        return Plan(chunks, gone, self._decisions(active), predicted)

    def report(self, report: StepReport) -> None:
        """Learn what came of the last plan. Raises RuntimeError when there was none, or counts disagree."""
        outstanding = self._outstanding
        if outstanding is None:
            raise RuntimeError("report() without a plan")
        self._outstanding = None
        if len(report.advances):
            self.correction.observe(outstanding.raw, report.finished_at - report.started_at)
        self._advance(_columns(report.advances), outstanding, report.finished_at)
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

    def _packed(self) -> Floats:
        margin = self.correction.margin if self.config.margin is None else self.config.margin
        pieces = [(p.base, p.per_token, p.per_step) for p in self.perf.pieces]
        return pack(
            pieces, self.perf.per_context, self.perf.per_area, self.correction.scale, self.correction.offset, margin
        )

    def _fixed_limits(self) -> Floats:
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

    def _allocate(self, size: int) -> tuple[Ints, Ints, Ints]:
        return np.zeros((size, 4), np.int64), np.zeros(size, np.int64), np.zeros(3, np.int64)

    def _buffers_for(self, size: int) -> tuple[Ints, Ints, Ints]:
        if self._buffers[0].shape[0] < size:
            self._buffers = self._allocate(2 * size)
        return self._buffers

    def _names(self, slots: Ints) -> tuple[RequestId, ...]:
        ids = self._table.ids
        return tuple([ids[slot] for slot in slots.tolist()])

    def _decisions(self, active: Ints) -> tuple[Decision, ...]:
        verdicts, told = self._table.whole[table.VERDICT], self._table.whole[table.TOLD]
        changed = active[verdicts[active] != told[active]]
        told[changed] = verdicts[changed]
        return tuple(self._decision(slot, Verdict(int(verdicts[slot]))) for slot in changed.tolist())

    def _decision(self, slot: int, verdict: Verdict) -> Decision:
        return Decision(self._table.request(slot).id, verdict == Verdict.ADMITTED, REASONS[verdict])

    # Learning

    def _advance(self, advances: Advances, outstanding: _Outstanding, finished_at: float) -> None:
        slots = self._reported_slots(advances.ids, outstanding)
        special = np.zeros(slots.size, np.bool_)
        if self.capabilities.max_draft:
            self._learn_acceptance(advances, outstanding)
        self._held += learning.advance_all(
            self._table.real,
            self._table.whole,
            slots,
            advances.numbers,
            finished_at,
            self.capabilities.block_tokens,
            special,
        )
        for i in np.flatnonzero(special).tolist():
            self._turn(int(slots[i]), advances[i], finished_at)

    def _reported_slots(self, ids: tuple[RequestId, ...], outstanding: _Outstanding) -> Ints:
        """The slot of each reported request, -1 where it was cancelled while it ran."""
        planned = outstanding.chunks.ids
        if unplanned := set(ids).difference(planned):
            raise RuntimeError(f"report of requests that were not planned: {sorted(unplanned)}")
        slot_of = self._table.slot_of
        return np.array([slot_of.get(name, -1) for name in ids], dtype=np.int64)

    def _turn(self, slot: int, advance: Advance, finished_at: float) -> None:
        """The rare events of a request's life: first token, next stage, longer than expected, the end."""
        real, whole = self._table.real, self._table.whole
        request = self._table.request(slot)
        emitted = int(whole[table.EMITTED, slot])
        if advance.new_tokens and emitted == advance.new_tokens:
            self._first_token(slot, finished_at)
        for i in range(advance.new_tokens):
            self._pace(request, slot, advance.stage_ended and i == advance.new_tokens - 1)
        if whole[table.KNOWN, slot] >= real[table.LENGTH, slot]:
            real[table.LENGTH, slot] = request.prompt_tokens + self._expected(request, emitted)
        if advance.done:
            self._lengths.setdefault(request.slo_class, ClassMean()).observe(emitted)
            self._forget(request.id, slot)

    def _first_token(self, slot: int, finished_at: float) -> None:
        real, whole = self._table.real, self._table.whole
        if whole[table.KIND, slot] != PROVISIONAL:
            self._totals["declined"] += 1
            return
        late = finished_at > real[table.DUE, slot]
        whole[table.KIND, slot] = BEST_EFFORT if late else PROMISED
        whole[table.VERDICT, slot] = Verdict.MISSED if late else Verdict.ADMITTED
        self._totals["declined" if late else "admitted"] += 1

    def _pace(self, request: Request, slot: int, stage_ended: bool) -> None:
        """One token is out: the next is due one TPOT later, at the pace of the stage it belongs to."""
        real, whole = self._table.real, self._table.whole
        whole[table.STAGE_LEFT, slot] -= 1
        stage = int(whole[table.STAGE, slot])
        if (stage_ended or whole[table.STAGE_LEFT, slot] <= 0) and stage + 1 < len(request.stages):
            following = request.stages[stage + 1]
            whole[table.STAGE, slot] = stage + 1
            whole[table.STAGE_LEFT, slot] = following.max_new_tokens
            real[table.TPOT, slot] = following.slo.tpot if following.slo else math.inf
        real[table.DUE, slot] += real[table.TPOT, slot]

    def _learn_acceptance(self, advances: Advances, outstanding: _Outstanding) -> None:
        """P(one guess is accepted), from runs that stop at the first refusal: accepted / (accepted + refused)."""
        drafted = dict(zip(outstanding.chunks.ids, outstanding.chunks.numbers[:, 2].tolist(), strict=True))
        for name, (_, _, accepted, *_) in zip(advances.ids, advances.numbers.tolist(), strict=True):
            slot = self._table.slot_of.get(name)
            if slot is None or not drafted[name]:
                continue
            slo_class = self._table.request(slot).slo_class
            tried = accepted + (1 if accepted < drafted[name] else 0)
            keep = (1.0 - 1.0 / DRAFT_MEMORY) ** tried
            old = self._acceptance.get(slo_class, DRAFT_PRIOR)
            self._acceptance[slo_class] = keep * old + (1.0 - keep) * (accepted / tried)
            self._table.real[table.ACCEPT, slot] = self._acceptance[slo_class]

    def _expected(self, request: Request, emitted: int) -> float:
        if request.expected_new_tokens is not None:
            return max(float(emitted), min(request.expected_new_tokens, float(request.max_new_tokens)))
        lengths = self._lengths.get(request.slo_class) or ClassMean()
        return lengths.expect(emitted, request.max_new_tokens)

    def _forget(self, request_id: RequestId, slot: int) -> None:
        held = int(self._table.whole[table.HELD, slot])
        self._held -= held
        # Until the next report, blocks shared with others may not be free: never count too many.
        self._shared -= min(self._shared, held)
        self._table.remove(request_id)


def _columns(advances: Sequence[Advance]) -> Advances:
    """Advances as columns, whoever made them."""
    if isinstance(advances, Advances):
        return advances
    numbers = [(a.computed, a.new_tokens, a.accepted, a.stage_ended, a.done) for a in advances]
    return Advances(tuple(a.request_id for a in advances), np.array(numbers, dtype=np.int64).reshape(-1, 5))
