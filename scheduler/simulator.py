"""The scheduler run by hand: virtual time, modelled iterations, no tokens.

`SimulatedEngine` satisfies `Engine` with counts alone; `simulate` plays requests through a planner and it,
call by call. Where nobody watches the single steps and the planner is our `Scheduler`, the same three compiled
functions that these calls consist of (`decide`, `run_batch`, `learn`) take turns in one compiled loop until a
request arrives or a session goes on: the outcome is the same to the last bit, many times sooner. The same
seed gives the same result on any machine with the same numpy.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .attainment import attained
from .batching import BLOCK_TOKENS, EVICTED, ROWS, SLOT, START
from .core import Advances, Capabilities, Chunks, Ints, Plan, Request, RequestId, StepReport
from .engine import Planner
from .jit import compiled
from .learning import HELD_BLOCKS, SHARED_BLOCKS, learn
from .perf import PerfModel
from .policies import decide
from .scheduler import Scheduler
from .timemodel import batch_seconds, pack

Floats: TypeAlias = NDArray[np.float64]

# Columns of a simulated request.
PROMPT: Final = 0
OUTPUT: Final = 1  # tokens it will really produce
COMPUTED: Final = 2
EMITTED: Final = 3
BLOCKS: Final = 4
SERIAL: Final = 5  # the how-manieth request of the run
AWAITED: Final = 6  # 1 when something may follow its end
EVICTIONS: Final = 7
COLUMNS: Final = 8

# Why `run` came back.
ARRIVED: Final = 0  # a request is due, something follows a request that ended, or the time is over
IDLE: Final = 1  # nothing can run
FULL: Final = 2  # the log is
WRONG: Final = 3  # a chunk does not fit its request
UNEQUAL: Final = 4  # scheduler and engine count different blocks

SAMPLED: Final = 8  # of so many instants of arrivals one is timed

IDLE_SECONDS: Final = 0.05  # until a planner is asked again that could run nothing
_LOG: Final = 65536  # rows of the log of tokens


@compiled
def run_batch(
    live: Any, slots: Any, numbers: Any, accepted: Any, held: Any, perf: Any, block_tokens: int, advances: Any
) -> float:
    """Run each chunk on the counts; returns the seconds, or -1 - the index of a chunk that does not fit.

    `numbers` holds start, length and draft of each chunk, `accepted` how many of its guesses are right;
    `held[0]` counts the blocks.
    """
    tokens = context = area = steps = 0.0
    for i in range(slots.size):
        slot = slots[i]
        start, length, draft = numbers[i, 0], numbers[i, 1], numbers[i, 2]
        known = live[PROMPT, slot] + live[EMITTED, slot]
        reached = start + length - draft
        if start != live[COMPUTED, slot] or reached > known or length < 1 or draft < 0 or draft >= length:
            return -1.0 - i
        tokens += length
        steps = max(steps, float(draft))
        if live[EMITTED, slot] > 0 and length == 1 + draft:
            context += start
        else:
            area += length * (start + 0.5 * length)
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
        held[0] += blocks - live[BLOCKS, slot]
        live[BLOCKS, slot] = blocks
        advances[i, 0] = reached
        advances[i, 1] = new
        advances[i, 2] = taken
        advances[i, 3] = 0
        advances[i, 4] = done
    return batch_seconds(perf, tokens, context, area, steps) if tokens > 0.0 else 0.0


@compiled
def guess(rng: Any, drafts: Any, slots: Any, acceptance: Any, accepted: Any) -> None:
    """How many guesses of each chunk would be accepted: a run of successes."""
    for i in range(slots.size):
        accepted[i] = 0
        failed = False
        for _ in range(drafts[i]):
            failed = failed or rng.random() >= acceptance[slots[i]]
            accepted[i] += not failed


@compiled
def disturb(seconds: float, rng: Any, noise: float) -> float:
    return stretched(seconds, noise * rng.standard_normal()) if noise > 0.0 else seconds


@compiled
def stretched(seconds: float, exponent: float) -> float:
    return float(seconds * np.exp(exponent))


@compiled
def evict(live: Any, slot: int, held: Any) -> None:
    held[0] -= live[BLOCKS, slot]
    live[COMPUTED, slot] = live[BLOCKS, slot] = 0
    live[EVICTIONS, slot] += 1


class SimulatedEngine:
    """Takes the model's seconds for each batch, times a lognormal noise of standard deviation `noise`.

    Guesses are right with the `acceptance` of their request, never without an `rng`. Raises RuntimeError for
    a chunk that does not fit its request, as a real engine would.
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
        self._lucky = rng is not None
        self._free: list[int] = []
        self.model = pack(perf)
        self.rng = rng if rng is not None else np.random.default_rng(0)
        self.noise = noise
        self.live: Ints = np.zeros((COLUMNS, 0), np.int64)
        self.acceptance: Floats = np.zeros(0)
        self.slot_of: dict[RequestId, int] = {}
        self.held: Ints = np.zeros(1, np.int64)

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    @property
    def free_blocks(self) -> int:
        return self._capabilities.num_blocks - int(self.held[0])

    def add(self, request: Request, output_tokens: int, acceptance: float = 0.0) -> int:
        """Register a request, how many tokens it will really produce, and how often a guess is right."""
        if not self._free:
            self._grow()
        slot = self._free.pop()
        self.slot_of[request.id] = slot
        blocks = -(-request.cached_tokens // self._capabilities.block_tokens)
        self.live[:, slot] = 0
        self.live[PROMPT, slot] = request.prompt_tokens
        self.live[OUTPUT, slot] = max(min(output_tokens, request.max_new_tokens), 1)
        self.live[COMPUTED, slot] = request.cached_tokens
        self.live[BLOCKS, slot] = blocks
        self.acceptance[slot] = acceptance if self._lucky else 0.0
        self.held[0] += blocks
        return slot

    def release(self, request_id: RequestId) -> None:
        slot = self.slot_of.pop(request_id, None)
        if slot is not None:
            self.held[0] -= self.live[BLOCKS, slot]
            self._free.append(slot)

    def step(self, plan: Plan, now: float) -> StepReport:
        slot_of = self.slot_of
        for name in plan.evicted:
            evict(self.live, slot_of[name], self.held)
        chunks = plan.chunks if isinstance(plan.chunks, Chunks) else _columns(plan)
        slots = np.array([slot_of[name] for name in chunks.ids], dtype=np.int64)
        advances, accepted = np.empty((slots.size, 5), np.int64), np.empty(slots.size, np.int64)
        drafts = chunks.numbers[:, 2]
        if drafts.any():  # handing over the generator takes as long as all the rest
            guess(self.rng, drafts, slots, self.acceptance, accepted)
        else:
            accepted[:] = 0
        seconds = run_batch(
            self.live, slots, chunks.numbers, accepted, self.held, self.model, self._capabilities.block_tokens, advances
        )
        if seconds < 0.0:
            raise self.misfit(int(slots[int(-1.0 - seconds)]))
        if self.noise > 0.0:
            seconds = stretched(seconds, self.noise * self.rng.standard_normal())
        for i in np.flatnonzero(advances[:, 4]).tolist():
            self.release(chunks.ids[i])
        return StepReport(now, now + seconds, Advances(chunks.ids, advances), self.free_blocks)

    def misfit(self, slot: int) -> RuntimeError:
        names = {number: name for name, number in self.slot_of.items()}
        return RuntimeError(f"a chunk does not fit its request {names.get(slot)}: {self.live[:, slot].tolist()}")

    def _grow(self) -> None:
        old, size = self.live.shape[1], max(2 * self.live.shape[1], 64)
        self.live = np.pad(self.live, ((0, 0), (0, size - old)))
        self.acceptance = np.pad(self.acceptance, (0, size - old))
        self._free = list(range(size - 1, old - 1, -1))


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


@compiled
def run(
    loop: int, knobs: Any, real: Any, whole: Any, stage_tokens: Any, stage_tpot: Any, classes: Any, mode: int,
    model: Any, limits: Any, books: Any, batch: Any, evicted: Any, counts: Any, ended: Any,
    live: Any, acceptance: Any, held: Any, truth: Any, rng: Any, noise: float,
    active: Any, partner: Any, first_at: Any, serials: Any, news: Any, times: Any, now: float, until: float,
    logged: int,
) -> tuple[int, float, int, int, int]:  # fmt: skip
    """Step after step until Python is needed; returns why, the time, the rows logged, and how many live and ended.

    The first two lines of arguments are the scheduler's, then come the engine's. `active` holds the live slots
    and is left with those that still live first and those that ended last; `partner` the engine's slot of each.
    A row of the log is a request's serial number, its new tokens and when; `first_at` gets the time of each
    request's first token by serial number.
    """
    alive = active.size
    block_tokens = int(limits[BLOCK_TOKENS])
    slots, accepted = np.empty(alive, np.int64), np.empty(alive, np.int64)
    advances = np.empty((alive, 5), np.int64)
    while now < until and alive > 0:
        if logged + alive > serials.size:
            return FULL, now, logged, alive, active.size - alive
        predicted = decide(loop, knobs, real, whole, active[:alive], now, model, limits, books, batch, evicted, counts)
        for i in range(counts[EVICTED]):
            evict(live, partner[evicted[i]], held)
        rows = counts[ROWS]
        if rows == 0:
            return IDLE, now, logged, alive, active.size - alive
        for i in range(rows):
            slots[i] = partner[batch[i, SLOT]]
        numbers = batch[:rows, START:]
        guess(rng, numbers[:, 2], slots[:rows], acceptance, accepted)
        seconds = run_batch(live, slots[:rows], numbers, accepted, held, truth, block_tokens, advances)
        if seconds < 0.0:
            return WRONG, now, int(slots[int(-1.0 - seconds)]), alive, active.size - alive
        started, now = now, now + disturb(seconds, rng, noise)
        for i in range(rows):
            if advances[i, 1] > 0:
                serial = live[SERIAL, slots[i]]
                first_at[serial] = min(first_at[serial], now)
                serials[logged], news[logged], times[logged] = serial, advances[i, 1], now
                logged += 1
        num_ended = learn(
            real, whole, stage_tokens, stage_tpot, classes, mode, model, books, batch[:rows, SLOT], numbers[:, 2],
            advances[:rows], predicted, started, now, block_tokens, ended,
        )  # fmt: skip
        if books[HELD_BLOCKS] - books[SHARED_BLOCKS] != held[0]:
            return UNEQUAL, now, logged, alive, active.size - alive
        if num_ended > 0:
            alive = move_to_end(active[:alive], ended[:num_ended])
            for i in range(num_ended):
                if live[AWAITED, partner[ended[i]]] != 0:
                    return ARRIVED, now, logged, alive, active.size - alive
    return ARRIVED, now, logged, alive, active.size - alive


@compiled
def move_to_end(active: Any, ended: Any) -> int:
    """Put those that ended behind the others, whose order stays; returns how many others."""
    kept = 0
    for i in range(active.size):
        slot = active[i]
        gone = False
        for other in ended:
            gone = gone or other == slot
        if not gone:
            active[kept] = slot
            kept += 1
    for i in range(ended.size):
        active[kept + i] = ended[i]
    return kept


@compiled
def spread(serials: Any, news: Any, times: Any, reached: Any, by_request: Any) -> None:
    """Copy each row's time once for each of its tokens to where its request's tokens have reached."""
    for i in range(serials.size):
        for _ in range(news[i]):
            by_request[reached[serials[i]]] = times[i]
            reached[serials[i]] += 1


class _Log:
    """When each request got its tokens: rows of serial number, new tokens and time, in order of time."""

    def __init__(self) -> None:
        self.serials: Ints = np.empty(_LOG, np.int64)
        self.news: Ints = np.empty(_LOG, np.int64)
        self.times: Floats = np.empty(_LOG)
        self.rows = 0
        self._full: list[tuple[Ints, Ints, Floats]] = []

    def add(self, serials: Ints, news: Ints, at: float) -> None:
        """Note one step."""
        self.ensure(serials.size)
        low, self.rows = self.rows, self.rows + serials.size
        self.serials[low : self.rows], self.news[low : self.rows], self.times[low : self.rows] = serials, news, at

    def ensure(self, rows: int) -> None:
        """Have room for so many more."""
        if self.rows + rows <= self.serials.size:
            return
        self._full.append((self.serials[: self.rows], self.news[: self.rows], self.times[: self.rows]))
        size = max(_LOG, rows)
        self.serials, self.news, self.times = np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size)
        self.rows = 0

    def fill(self, outcomes: Sequence[Outcome]) -> None:
        """Give each outcome, in the order of serial numbers, its token times."""
        parts = [*self._full, (self.serials[: self.rows], self.news[: self.rows], self.times[: self.rows])]
        tokens = sum(np.bincount(serials, news, len(outcomes)) for serials, news, _ in parts)
        edges = np.concatenate([[0], np.cumsum(tokens)]).astype(np.int64)
        by_request, reached = np.empty(edges[-1]), edges[:-1].copy()
        for part in parts:
            spread(*part, reached, by_request)
        for outcome, low, high in zip(outcomes, edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            outcome.token_times = by_request[low:high].tolist()


@dataclass(frozen=True, slots=True)
class Turnaround:
    """Seconds from the end of a step until the next is planned: `base`, and `per_chunk` of the step that ended."""

    base: float = 0.0
    per_chunk: float = 0.0

    def after(self, chunks: int) -> float:
        return self.base + self.per_chunk * chunks


NO_PAUSE: Final = Turnaround()


class _Play:
    """One simulation: who arrived, what they got, what time it is."""

    def __init__(
        self, planner: Planner, engine: SimulatedEngine, outcomes: dict[RequestId, Outcome], turnaround: Turnaround
    ) -> None:
        self.planner = planner
        self.engine = engine
        self.outcomes = outcomes
        self.arrived: list[Outcome] = []
        self.first_at: Floats = np.full(64, np.inf)
        self.log = _Log()
        self.now = 0.0
        self.live = 0
        self._turnaround = turnaround
        self._partner: Ints = np.zeros(64, np.int64)

    def add(self, request: Request, output_tokens: int, acceptance: float, *, awaited: bool) -> None:
        """A request arrives; `awaited` says that somebody wants to know its end at once."""
        if request.cached_tokens:
            request = replace(request, cached_tokens=self._kept(request.cached_tokens))
        self.engine.add(request, output_tokens, acceptance)
        self.planner.add(request, self.now)
        self.join(Outcome(request), awaited=awaited)

    def join(self, outcome: Outcome, *, awaited: bool) -> None:
        """A request that planner and engine have is one of this simulation."""
        request_id = outcome.request.id
        slot = self.engine.slot_of[request_id]
        self.engine.live[SERIAL, slot] = len(self.arrived)
        self.engine.live[AWAITED, slot] = awaited
        if len(self.arrived) == self.first_at.size:
            self.first_at = np.concatenate([self.first_at, np.full_like(self.first_at, np.inf)])
        if isinstance(self.planner, Scheduler):
            own = self.planner.table.slot_of[request_id]
            if own >= self._partner.size:
                self._partner = np.pad(self._partner, (0, own))
            self._partner[own] = slot
        self.arrived.append(outcome)
        self.outcomes[request_id] = outcome
        self.live += 1

    def _kept(self, cached: int) -> int:
        """How much of a prefix is still there: what lay in blocks that others use now is gone."""
        return min(cached, self.engine.free_blocks * self.engine.capabilities.block_tokens)

    def step(self, plan: Plan, on_step: Callable[[Plan, StepReport], None] | None) -> list[RequestId]:
        """Run one plan through the calls that a server makes; returns who ended."""
        engine = self.engine
        for request_id in plan.evicted:
            self.outcomes[request_id].preemptions += 1
        serials = engine.live[SERIAL, [engine.slot_of[name] for name in _ids(plan)]]
        report = engine.step(plan, self.now)
        self.planner.report(report)
        if on_step is not None:
            on_step(plan, report)
        self.now = report.finished_at
        advances = report.advances
        assert isinstance(advances, Advances)
        gained = advances.numbers[:, 1] > 0
        serials = serials[gained]
        self.first_at[serials] = np.minimum(self.first_at[serials], self.now)
        self.log.add(serials, advances.numbers[gained, 1], self.now)
        self.now += self._turnaround.after(len(plan.chunks))
        ended = [advances.ids[i] for i in np.flatnonzero(advances.numbers[:, 4]).tolist()]
        self.live -= len(ended)
        return ended

    def run(self, until: float) -> tuple[bool, list[RequestId]]:
        """Step after step in compiled code; returns whether anything could run, and who ended."""
        scheduler, engine, log = self.planner, self.engine, self.log
        assert isinstance(scheduler, Scheduler)
        table, active = scheduler.table, scheduler.table.active
        log.ensure(4 * active.size)
        batch, evicted, counts = scheduler.room_for(active.size)
        why, self.now, rows, alive, num_ended = run(
            scheduler.loop, scheduler.knobs, table.real, table.whole, table.stage_tokens, table.stage_tpot,
            scheduler.classes, scheduler.mode, scheduler.model, scheduler.limits, scheduler.books, batch, evicted,
            counts, scheduler.done, engine.live, engine.acceptance, engine.held, engine.model, engine.rng, engine.noise,
            active, self._partner, self.first_at, log.serials, log.news, log.times, self.now, until, log.rows,
        )  # fmt: skip
        if why == WRONG:
            raise engine.misfit(rows)
        if why == UNEQUAL:
            raise RuntimeError(f"KV accounting: the engine has {engine.free_blocks} free blocks, {scheduler!r}")
        log.rows = rows
        names = [table.ids[slot] for slot in active[alive : alive + num_ended].tolist()]
        for name in names:
            self.outcomes[name].preemptions += int(engine.live[EVICTIONS, engine.slot_of[name]])
            scheduler.ended(name, self.now)
            engine.release(name)
        self.live -= num_ended
        return why != IDLE, names


def _ids(plan: Plan) -> tuple[RequestId, ...]:
    return plan.chunks.ids if isinstance(plan.chunks, Chunks) else tuple(chunk.request_id for chunk in plan.chunks)


def simulate(
    requests: Iterable[Request],
    output_tokens: Mapping[RequestId, int],
    planner: Planner,
    engine: SimulatedEngine,
    *,
    until: float = math.inf,
    acceptance: float | Mapping[RequestId, float] = 0.0,
    turnaround: Turnaround = NO_PAUSE,
    on_step: Callable[[Plan, StepReport], None] | None = None,
    follow_up: Callable[[RequestId, float], tuple[Request, int] | None] | None = None,
    outcomes: dict[RequestId, Outcome] | None = None,
    watch: Callable[[float, Sequence[Outcome], Floats], None] | None = None,
    timed: Callable[[Callable[[], Plan]], Plan] | None = None,
) -> dict[RequestId, Outcome]:
    """Play `requests` until all have ended or virtual second `until` has passed.

    `output_tokens` tells how many tokens each will produce, which the planner never sees. A request's `cached_tokens`
    are found as far as memory is free when it arrives. `acceptance` is
    the share of right guesses, of all or of each. `turnaround` passes between a report and the next
    plan. `follow_up` is called with each request that ends and when, and may return the next round of its
    session, to arrive then or later, and its output tokens. `on_step` sees every plan and report, at the price
    of speed, as a turnaround is. `watch` sees the time, who has arrived and when each had its first
    token (infinite: not yet), often enough to end a hopeless run by raising. `timed` is given the call that
    makes the first plan at every `SAMPLED`th instant of arrivals and returns what it returned. Returns an outcome for
    every request that arrived, in `outcomes` where given. Raises RuntimeError when requests are live and
    nothing runs.
    """
    # By arrival, and in the order given where times are equal.
    pending = [(each.arrived_at, index, each, output_tokens[each.id]) for index, each in enumerate(requests)]
    heapq.heapify(pending)
    play = _Play(planner, engine, {} if outcomes is None else outcomes, turnaround)
    at_once = on_step is None and turnaround == NO_PAUSE and isinstance(planner, Scheduler)
    instants = 0  # at which somebody arrived
    try:
        while play.now < until and (pending or play.live):
            fresh = False
            while pending and pending[0][0] <= play.now:
                *_, request, tokens = heapq.heappop(pending)
                lucky = acceptance[request.id] if isinstance(acceptance, Mapping) else acceptance
                play.add(request, tokens, lucky, awaited=follow_up is not None)
                fresh = True
            if watch is not None:
                watch(play.now, play.arrived, play.first_at)
            following = pending[0][0] if pending else math.inf
            sampled = timed is not None and fresh and instants % SAMPLED == 0
            instants += fresh
            if not play.live:
                ran, ended = False, list[RequestId]()
            elif at_once and not sampled:
                ran, ended = play.run(min(following, until))
            else:
                plan = timed(partial(planner.plan, play.now)) if timed and sampled else planner.plan(play.now)
                ran = len(plan.chunks) > 0
                ended = play.step(plan, on_step) if ran else []
            if not ran:
                if not pending:
                    raise RuntimeError(f"{play.live} requests are live and nothing runs at {play.now}: {planner!r}")
                play.now = max(play.now, following)
            if follow_up is not None:
                for next_round in filter(None, [follow_up(request_id, play.now) for request_id in ended]):
                    heapq.heappush(pending, (next_round[0].arrived_at, len(play.arrived) + len(pending), *next_round))
    finally:
        play.log.fill(play.arrived)
    return play.outcomes


def run_out(
    planner: Scheduler, engine: SimulatedEngine, outcomes: Mapping[RequestId, Outcome], now: float, until: float
) -> None:
    """Play on from `now` with the requests that planner and engine have, until all have ended or `until`.

    Nobody else comes, and no step is running. Their further tokens are added to their `outcomes`.
    """
    play = _Play(planner, engine, {}, NO_PAUSE)
    play.now = now
    for request_id in engine.slot_of:
        play.join(Outcome(outcomes[request_id].request), awaited=False)
    while play.live and play.now < until:
        ran, _ = play.run(until)
        if not ran:
            play.now += IDLE_SECONDS
    play.log.fill(play.arrived)
    for more in play.arrived:
        outcome = outcomes[more.request.id]
        outcome.token_times += more.token_times
        outcome.preemptions = more.preemptions
