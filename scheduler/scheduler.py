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
from typing import Final

import numpy as np
from numpy.typing import NDArray

from . import batching, drafting, lead, learning, lengths, table, timemodel
from .admission import REASONS, Verdict
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
from .perf import PerfModel
from .policies import Policy, SloServe, decide, loop_of
from .sessions import LateSessions
from .table import BEST_EFFORT, PROMISED, PROVISIONAL, Table

RARE: Final = 0.05  # share of requests whose TTFT is too short to plan by


@dataclass(frozen=True, slots=True)
class PlannerConfig:
    """The planner's knobs; one setting serves all workloads.

    `cap`: longest iteration in seconds while anything is promised (longer: cheaper prefill, later tokens).
    `floor`: shortest planned iteration, in decode-only iterations, or longer: `wait` times the TTFT that all but
    `RARE` of the requests lately exceeded. `reserve`: prefill is planned this many times faster than its
    deadlines need. `overcommit`: predicted KV peaks may sum to this many times the memory. `patience` seconds
    and `share` of a batch bound the starvation of best effort. `idle_cap`: longest iteration that best effort
    may cause beside promised decodes, in decode-only iterations.
    `margin`: fixed planning margin on predicted times; None learns it from the residuals. `lengths`: how output
    lengths are predicted, a name of `lengths.MODES`. `drafts`: the rule for guesses, a name of `drafting.RULES`.
    `pace`: longest iteration beside promised decodes, in their tightest TPOT (longer ones spend the slack of
    early tokens). `commit_late` off promises or declines at once and for good; `prefill_only` off never lets
    decodes wait for an urgent prompt, `whole_sessions` off takes each round of a session for itself: they are there to
    measure what the ideas are worth. `lead`: how far decodes that are ahead wait for prompts in need, a name of
    `lead.SPENT`; with "whole" every token is in time but a block of ten may be slower than the pace.
    """

    cap: float = 0.08
    floor: float = 1.3
    wait: float = 0.5
    reserve: float = 2.0
    overcommit: float = 1.15
    patience: float = 10.0
    share: float = 0.125
    idle_cap: float = 2.0
    pace: float = 1.0
    margin: float | None = None
    lengths: str = "class_mean"
    drafts: str = "cost"
    commit_late: bool = True
    prefill_only: bool = True
    lead: str = "blocks"
    whole_sessions: bool = True

    def __post_init__(self) -> None:
        bounds = {
            "cap": (0, 10),
            "floor": (1, 100),
            "wait": (0, 1),
            "reserve": (1, 100),
            "overcommit": (0.1, 10),
            "share": (0, 1),
            "pace": (0, 1e9),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if not (low <= value if name in ("floor", "wait") else low < value) or not value <= high:
                raise ValueError(f"planner {name}: must be above {low} and at most {high}, got {value!r}")
        if self.drafts not in drafting.RULES:
            raise ValueError(f"planner drafts: must be one of {', '.join(drafting.RULES)}, got {self.drafts!r}")
        if self.lead not in lead.SPENT:
            raise ValueError(f"planner lead: must be one of {', '.join(lead.SPENT)}, got {self.lead!r}")
        if self.lengths not in lengths.MODES:
            raise ValueError(f"planner lengths: must be one of {', '.join(lengths.MODES)}, got {self.lengths!r}")


@dataclass(frozen=True, slots=True)
class _Outstanding:
    """What was planned and not yet reported: the chunks, their slots (-1: cancelled since), the seconds planned."""

    chunks: Chunks
    slots: Ints
    predicted: float


class Scheduler:
    """A policy at work, `slos_serve` unless told otherwise. Raises ValueError for a request that could never run.

    The state is arrays that two compiled calls change: `decide` in `plan`, `learn` in `report`. The simulator
    runs the same two over the same arrays.
    """

    def __init__(
        self,
        capabilities: Capabilities,
        perf: PerfModel,
        config: PlannerConfig | None = None,
        policy: Policy | None = None,
    ) -> None:
        self.capabilities = capabilities
        self.perf = perf
        self.config = config or PlannerConfig()
        self.policy = policy or SloServe()
        self.table = Table()
        self.books: Ints = np.zeros(learning.BOOKS, np.int64)
        self.loop, self.knobs = loop_of(self.policy)
        self.mode = lengths.MODES.index(self.config.lengths)
        self.model = timemodel.pack(perf, self.config.margin)
        self.limits = self._fixed_limits()
        self.classes: NDArray[np.float64] = np.zeros((0, lengths.COLUMNS))
        self._class_of: dict[str, int] = {}
        self._late = LateSessions()
        self._session_of: dict[RequestId, str] = {}
        self._outstanding: _Outstanding | None = None
        self._allocate(0)

    def __repr__(self) -> str:
        kinds = self.table.whole[table.KIND][self.table.active]
        names = ((PROVISIONAL, "provisional"), (PROMISED, "promised"), (BEST_EFFORT, "best effort"))
        counts = ", ".join(f"{int((kinds == kind).sum())} {name}" for kind, name in names)
        return f"Scheduler({counts}, {self.free_blocks}/{self.capabilities.num_blocks} blocks free)"

    @property
    def free_blocks(self) -> int:
        """Blocks no live request holds; exact after a report, never too high before one."""
        held, shared = self.books[learning.HELD_BLOCKS], self.books[learning.SHARED_BLOCKS]
        return int(self.capabilities.num_blocks - held + shared)

    def add(self, request: Request, now: float) -> None:
        """Consider a request from now on. Raises ValueError for a duplicate id or a prompt that never fits."""
        limits = self.capabilities
        most = min(limits.max_context, limits.num_blocks * limits.block_tokens)
        if request.prompt_tokens + 1 > most:
            raise ValueError(f"request {request.id}: prompt of {request.prompt_tokens} tokens, at most {most - 1} fit")
        slot = self.table.insert(request)
        real, whole = self.table.real, self.table.whole
        first = request.stages[0]
        number = self._number_of_class(request.slo_class)
        real[table.DUE, slot] = request.arrived_at + first.slo.ttft if first.slo else math.inf
        real[table.TPOT, slot] = first.slo.tpot if first.slo else math.inf
        real[table.WEIGHT, slot] = request.weight
        if request.session is not None and first.slo and self.config.whole_sessions:
            real[table.WEIGHT, slot] *= self._late.worth(request.session, now)
            self._session_of[request.id] = request.session
        real[table.SERVED, slot] = now
        real[table.ACCEPT, slot] = self.classes[number, lengths.ACCEPTANCE]
        real[table.ASKED, slot] = math.nan if request.expected_new_tokens is None else request.expected_new_tokens
        whole[table.CLASS, slot] = number
        whole[table.KNOWN, slot] = request.prompt_tokens
        whole[table.COMPUTED, slot] = request.cached_tokens
        whole[table.HELD, slot] = -(-request.cached_tokens // limits.block_tokens)
        whole[table.KIND, slot] = PROVISIONAL if first.slo else BEST_EFFORT
        whole[table.LEFT, slot] = request.max_new_tokens
        whole[table.STAGE_LEFT, slot] = first.max_new_tokens
        whole[table.VERDICT, slot] = Verdict.UNDECIDED if first.slo else Verdict.BEST_EFFORT
        learning.expect(real, whole, self.classes[number], self.mode, slot)
        if first.slo:
            self.limits[batching.SHORT_TTFT] = short(self.limits[batching.SHORT_TTFT], first.slo.ttft)
        self.books[learning.HELD_BLOCKS] += whole[table.HELD, slot]

    def cancel(self, request_id: RequestId) -> bool:
        """Forget a request; its blocks are free at once. False when it is not here."""
        slot = self.table.slot_of.get(request_id)
        if slot is None:
            return False
        held = int(self.table.whole[table.HELD, slot])
        self.books[learning.HELD_BLOCKS] -= held
        # Until the next report, blocks shared with others may not be free: never count too many.
        self.books[learning.SHARED_BLOCKS] -= min(int(self.books[learning.SHARED_BLOCKS]), held)
        if self._outstanding is not None:
            self._outstanding.slots[self._outstanding.slots == slot] = -1
        self._session_of.pop(request_id, None)
        self.table.remove(request_id)
        return True

    def ended(self, request_id: RequestId, now: float) -> None:
        """A request got its last token: its slot is free, and its session remembers whether it was promised."""
        session = self._session_of.pop(request_id, None)
        if session is not None:
            kind = self.table.whole[table.KIND, self.table.slot_of[request_id]]
            self._late.ended(session, bool(kind == PROMISED), now)
        self.table.remove(request_id)

    def plan(self, now: float) -> Plan:
        """What to run now. Raises RuntimeError when the plan before was not reported."""
        if self._outstanding is not None:
            raise RuntimeError(f"plan() before the report of the last plan ({len(self._outstanding.chunks)} chunks)")
        active = self.table.active
        if active.size == 0:
            return Plan()
        batch, evicted, counts = self.room_for(active.size)
        real, whole = self.table.real, self.table.whole
        predicted = decide(
            self.loop, self.knobs, real, whole, active, now, self.model, self.limits, self.books, batch, evicted, counts
        )
        rows, drops, _, changed = counts.tolist()
        slots = batch[:rows, batching.SLOT].copy()
        chunks = Chunks(self._names(slots), batch[:rows, batching.START :].copy())
        gone = self._names(evicted[:drops]) if drops else ()
        if rows or drops:
            self._outstanding = _Outstanding(chunks, slots, predicted)
        return Plan(chunks, gone, self._decisions(active) if changed else (), predicted)

    def report(self, report: StepReport) -> None:
        """Learn what came of the last plan. Raises RuntimeError when there was none, or counts disagree."""
        outstanding, self._outstanding = self._outstanding, None
        if outstanding is None:
            raise RuntimeError("report() without a plan")
        advances = _columns(report.advances)
        slots, drafts = _reported(advances.ids, outstanding)
        held = self.table
        ended = learning.learn(
            held.real, held.whole, held.stage_tokens, held.stage_tpot, self.classes, self.mode, self.model, self.books,
            slots, drafts, advances.numbers, outstanding.predicted, report.started_at, report.finished_at,
            self.capabilities.block_tokens, self.done,
        )  # fmt: skip
        for slot in self.done[:ended].tolist():
            self.ended(held.ids[slot], report.finished_at)
        self.books[learning.SHARED_BLOCKS] = report.shared_blocks
        if report.free_blocks is not None and report.free_blocks != self.free_blocks:
            raise RuntimeError(
                f"KV accounting: the engine has {report.free_blocks} free blocks, the scheduler counts "
                f"{self.free_blocks} ({self.books[learning.HELD_BLOCKS]} held, {report.shared_blocks} shared, "
                f"{self.capabilities.num_blocks} in all)"
            )

    def snapshot(self) -> Snapshot:
        """The state in numbers, at any time."""
        active = self.table.active
        whole = self.table.whole[:, active]
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
            admitted_total=int(self.books[learning.ADMITTED_TOTAL]),
            declined_total=int(self.books[learning.DECLINED_TOTAL]),
            preempted_total=int(self.books[learning.PREEMPTED_TOTAL]),
        )

    def acceptance(self) -> Mapping[str, float]:
        """Share of guesses accepted lately, by class."""
        return {name: float(self.classes[number, lengths.ACCEPTANCE]) for name, number in self._class_of.items()}

    def room_for(self, size: int) -> tuple[Ints, Ints, Ints]:
        """Buffers for a step over `size` requests: `batch`, `evicted` and `counts` of `decide`."""
        if self._batch.shape[0] < size:
            self._allocate(2 * size)
        return self._batch, self._evicted, self._counts

    def _fixed_limits(self) -> NDArray[np.float64]:
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
        limits[batching.WAIT] = config.wait
        limits[batching.RESERVE] = config.reserve
        limits[batching.OVERCOMMIT] = config.overcommit
        limits[batching.PATIENCE] = config.patience
        limits[batching.SHARE] = config.share
        limits[batching.IDLE_CAP] = config.idle_cap
        limits[batching.PACE] = config.pace
        limits[batching.SETTLE] = not config.commit_late
        limits[batching.PURE] = config.prefill_only
        limits[batching.LEAD] = lead.SPENT.index(config.lead)
        limits[batching.OWN_DRAFT] = caps.per_request_draft
        limits[batching.BY_TIER] = config.drafts == "tiers"
        return limits

    def _allocate(self, size: int) -> None:
        self._batch: Ints = np.zeros((size, 4), np.int64)
        self._evicted: Ints = np.zeros(size, np.int64)
        self._counts: Ints = np.zeros(batching.COUNTS, np.int64)
        self.done: Ints = np.zeros(size, np.int64)

    def _number_of_class(self, name: str) -> int:
        number = self._class_of.setdefault(name, len(self._class_of))
        if number == len(self.classes):
            self.classes = np.vstack([self.classes, lengths.new_class(learning.DRAFT_PRIOR)])
        return number

    def _names(self, slots: Ints) -> tuple[RequestId, ...]:
        ids = self.table.ids
        return tuple([ids[slot] for slot in slots.tolist()])

    def _decisions(self, active: Ints) -> tuple[Decision, ...]:
        verdicts, told = self.table.whole[table.VERDICT], self.table.whole[table.TOLD]
        changed = active[verdicts[active] != told[active]]
        told[changed] = verdicts[changed]
        ids = self.table.ids
        pairs = [(ids[slot], Verdict(int(verdicts[slot]))) for slot in changed.tolist()]
        return tuple(Decision(name, verdict == Verdict.ADMITTED, REASONS[verdict]) for name, verdict in pairs)


def short(estimate: float, sample: float) -> float:
    """A running estimate of what all but `RARE` of the samples exceed, moved by `sample`; 0 before the first.

    Stochastic approximation (Robbins and Monro, 1951) on the logarithm.
    """
    estimate = estimate or sample
    return estimate * math.exp(0.1 * (RARE - (sample < estimate)))


def _reported(ids: tuple[RequestId, ...], outstanding: _Outstanding) -> tuple[Ints, Ints]:
    """The slot of each reported request (-1: cancelled while it ran) and its planned guesses."""
    planned, drafts = outstanding.chunks.ids, outstanding.chunks.numbers[:, 2]
    if ids is planned or ids == planned:
        return outstanding.slots, drafts
    index_of = {name: index for index, name in enumerate(planned)}
    if unplanned := set(ids).difference(index_of):
        raise RuntimeError(f"report of requests that were not planned: {sorted(unplanned)}")
    index = np.array([index_of[name] for name in ids], dtype=np.int64)
    return outstanding.slots[index], drafts[index]


def _columns(advances: Sequence[Advance]) -> Advances:
    """Advances as columns, whoever made them."""
    if isinstance(advances, Advances):
        return advances
    numbers = [(a.computed, a.new_tokens, a.accepted, a.stage_ended, a.done) for a in advances]
    return Advances(tuple(a.request_id for a in advances), np.array(numbers, dtype=np.int64).reshape(-1, 5))
