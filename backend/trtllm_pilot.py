"""Our scheduler in the place of TensorRT-LLM's: called once per turn of PyExecutor's loop, on its thread.

    schedule(active, inflight)
      look     what the engine holds                                      trtllm_view.py
      report   to the planner: what became of its last plan
      plan     scheduler.plan(now): the same `Scheduler` as everywhere
      wish     the plan, or the stock scheduler's batch, as requests and tokens
      legal    what of it may run                                         trtllm_batch.py

The engine's list of active requests is the truth. A request that is new in it is added to the planner, one
that left it has ended, and every report says where a request stands now, so a plan that was cut short, or a
batch that the stock composed, is learnt from like any other. SLOs are looked up by the front's id.

It never raises: the loop would end with it. A planner that raises, or is slow, is dropped for that
iteration; again and again, and the mode steps down: full, trim, governor. In the last one the stock decides
and only the front (admission, order, concurrency) is ours. The reason is kept, logged and counted.
"""

from __future__ import annotations

import enum
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

from slos_serve.scheduler.core import Advance, Plan, Request, RequestId, Snapshot, Stage, StepReport
from slos_serve.scheduler.engine import Planner
from slos_serve.scheduler.perf import BatchShape

from .trtllm_batch import Legal, Limits, Wish, legal, output
from .trtllm_view import Phase, Seen, look

log = logging.getLogger(__name__)

FAULTS_TO_STEP_DOWN: Final = 3
SLOW_SECONDS: Final = 0.05
WARM_UP_ITERATIONS: Final = 3
EMPTY_SECONDS: Final = 0.001
SNAPSHOT_SECONDS: Final = 0.2
SAMPLES: Final = 4096


class Mode(enum.Enum):
    """Who decides. The order is that of stepping down; `SHADOW` is chosen, never stepped into."""

    FULL = "full"  # the planner composes the batch
    TRIM = "trim"  # the stock does; the planner takes away: prompts, parts of prompts, decodes
    GOVERNOR = "governor"  # the stock does; only the front is ours
    SHADOW = "shadow"  # the stock does; the planner plans along and differences are counted


STEP_DOWN: Final[Mapping[Mode, Mode]] = {
    Mode.FULL: Mode.TRIM,
    Mode.TRIM: Mode.GOVERNOR,
    Mode.SHADOW: Mode.GOVERNOR,
}


@dataclass(frozen=True, slots=True)
class Ticket:
    """What the front knows of a request. `stage_end` is the token id that ends its first stage early."""

    request: Request
    stage_end: int | None = None


class Watcher(Protocol):
    """Who is told; called on the engine's thread, so each call must be cheap."""

    def stepped(self, plan: Plan, report: StepReport, planning: float) -> None: ...
    def event(self, kind: str, detail: str) -> None: ...  # repair, fallback, fault, slow, difference, step_down
    def planned(self, plan: Plan, clients: Mapping[RequestId, int]) -> None: ...
    def measured(self, snapshot: Snapshot) -> None: ...  # a few times a second


class Collective(Protocol):
    """One object from rank 0 to all ranks of a tensor-parallel group; every rank calls it once per iteration."""

    def __call__(self, value: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Cockpit:
    """What a pilot needs of one engine: handles into it and its constants."""

    stock: Any  # the scheduler it came with
    states: Any  # LlmRequestState
    make_output: Any  # SchedulerOutput
    limits: Limits
    free_blocks: Callable[[], int]
    is_unread: Callable[[], bool]  # whether a batch is still on the device
    is_leader: bool = True
    collective: Collective | None = None


@dataclass(slots=True)
class _Flight:
    """The plan that is being carried out."""

    plan: Plan
    started_at: float
    planning: float


class Pilot:
    """One engine's decisions. Everything but `tickets` is touched by the engine's thread alone."""

    def __init__(
        self,
        cockpit: Cockpit,
        make_planner: Callable[[], Planner],
        mode: Mode,
        watcher: Watcher,
        tickets: Mapping[int, Ticket],
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        """`tickets` maps the front's ids; other threads may add to it. `pause` is called when nothing can run."""
        self.mode = mode
        self.reason = "as configured"
        self.counts: Counter[str] = Counter()
        self._cockpit = cockpit
        self._make_planner = make_planner
        self._planner = make_planner()
        self._watcher = watcher
        self._tickets = tickets
        self._clock = clock
        self._pause = pause
        self._told: dict[RequestId, int] = {}  # tokens of each request that the planner knows of
        self._clients: dict[RequestId, int] = {}
        self._evicted: set[RequestId] = set()  # given up by the planner, not yet by the engine
        self._flight: _Flight | None = None
        self._ran: set[int] = set()  # the engine's ids in the last batch that was not empty
        self.samples: deque[tuple[BatchShape, float]] = deque(maxlen=SAMPLES)  # batches that ran, and their seconds
        self._shape: BatchShape | None = None
        self._entered_at = 0.0
        self._snapshot_at = 0.0
        self._iterations = 0
        self._faults = 0
        self._ahead: tuple[list[Seen], Wish] | None = None  # planned when the draft length was asked for
        self._drove = mode in (Mode.FULL, Mode.TRIM)

    # The engine's calls

    def schedule(self, active: Sequence[Any], inflight: Collection[int]) -> Any:
        """The next batch, as the engine's SchedulerOutput. What goes wrong here costs one iteration of ours."""
        collective = self._cockpit.collective
        if collective is not None and not self._cockpit.is_leader:
            batch = self._as_told(collective(None), active)
        else:
            try:
                batch = self._decide(active, inflight)
            except Exception as error:
                self._fault(error)
                batch = None
            if collective is not None:  # on every path: the other ranks wait for it
                collective(_compact(batch))
        if isinstance(batch, Wish):
            return self._carry_out(batch)
        return self._fall_back(active, inflight) if batch is None else batch

    def fly(self, mode: Mode, make_planner: Callable[[], Planner]) -> None:
        """From the next iteration on, with another planner. To be called between two iterations."""
        self._make_planner, self._planner = make_planner, make_planner()
        self._flight = None
        self._told.clear()
        self._evicted.clear()
        self._faults = 0
        self.mode, self.reason = mode, "as ordered"
        self._drove = self._drove or mode in (Mode.FULL, Mode.TRIM)

    def risk_pauses_in_prompts(self) -> None:
        """Pause inside prompts too, whatever is remembered of them: to find out whether this release bears it."""
        self._cockpit = replace(self._cockpit, limits=replace(self._cockpit.limits, pauses_mid_prefill=True))

    @property
    def stock(self) -> Any:
        """The scheduler that the engine came with."""
        return self._cockpit.stock

    def can_schedule(self, requests: Sequence[Any]) -> bool:
        """For pipeline parallelism, which is not driven: as the stock says."""
        return bool(self._cockpit.stock.can_schedule(requests))

    def draft_length(self, least: int, most: int, active: Sequence[Any]) -> int:
        """Guesses per decode of the coming batch, for the drafter that asks before the batch is scheduled."""
        if self.mode is not Mode.FULL:
            return most
        try:
            view = self._look(active)
            wish = self._plan(view)
        except Exception as error:
            self._fault(error)
            return most
        self._ahead = (view, wish)
        flight = self._flight
        drafts = [chunk.draft for chunk in flight.plan.chunks] if flight is not None else []
        wanted = min(max(drafts, default=0), most)
        prompts = sum(size for _, size in wish.contexts)
        fits = (self._cockpit.limits.max_tokens - prompts) // max(len(wish.decodes), 1) - 1
        return max(least, min(wanted, fits))

    # One iteration

    def _decide(self, active: Sequence[Any], inflight: Collection[int]) -> Wish | Any:
        view = self._look(active)
        if self.mode is Mode.GOVERNOR and not self._drove:
            return None
        wish = self._wish(view, inflight)
        if self.mode is Mode.FULL and wish is not None:
            batch = self._legal(wish, view, inflight)
            if not batch.is_empty or batch.paused or not any(seen.is_runnable for seen in view):
                return batch
            self._count("fallback", "the plan is empty and requests could run")
        stock = self._cockpit.stock.schedule_request(active, inflight)
        chosen = self._from_stock(stock, view)
        if self.mode is Mode.SHADOW:
            self._compare(wish, chosen)
            self._note(chosen)
            return stock
        if any(seen.phase is Phase.FOREIGN for seen in view):
            self._note(chosen)
            return stock
        if self.mode is Mode.TRIM and wish is not None:
            trimmed = self._trim(chosen, wish)
            if not trimmed.is_empty:
                chosen = trimmed
            elif not chosen.is_empty:
                self._count("fallback", "nothing of the stock batch was planned")
        return self._legal(chosen, view, inflight)

    def _fall_back(self, active: Sequence[Any], inflight: Collection[int]) -> Any:
        """The stock's batch as it is; where the planner has held decodes before, they still join safely."""
        stock = self._cockpit.stock.schedule_request(active, inflight)
        try:
            view = self._look(active)
            chosen = self._from_stock(stock, view)
            if self._drove and not any(seen.phase is Phase.FOREIGN for seen in view):
                return self._carry_out(chosen)
            self._note(chosen)
        except Exception as error:
            self._fault(error)
        return stock

    def _look(self, active: Sequence[Any]) -> list[Seen]:
        self._time(active)
        return look(active, self._cockpit.states, self._ran if self._cockpit.is_unread() else ())

    def _time(self, active: Sequence[Any]) -> None:
        """From one call to the next is one turn of the loop. Where all have left, it may have slept between."""
        now = self._clock()
        shape, self._shape = self._shape, None
        if shape is not None and any(request.request_id in self._ran for request in active):
            self.samples.append((shape, now - self._entered_at))
        self._entered_at = now

    def _wish(self, view: list[Seen], inflight: Collection[int]) -> Wish | None:
        """What the planner wants; None when it failed, is not asked, or cannot serve what is there."""
        if self.mode is Mode.GOVERNOR:
            return None
        ahead, self._ahead = self._ahead, None
        if ahead is not None and [seen.number for seen in ahead[0]] == [seen.number for seen in view]:
            return self._with(ahead[1], view)
        try:
            return self._plan(view)
        except Exception as error:
            self._fault(error)
            return None

    def _with(self, wish: Wish, view: list[Seen]) -> Wish:
        """The same wish about fresh looks at the same requests."""
        fresh = {seen.number: seen for seen in view}
        return Wish(
            [(fresh[seen.number], size) for seen, size in wish.contexts],
            [fresh[seen.number] for seen in wish.decodes],
            [fresh[seen.number] for seen in wish.paused],
        )

    def _plan(self, view: list[Seen]) -> Wish:
        now = self._clock()
        self._iterations += 1
        self._report(view, now)
        self._introduce(view, now)
        plan = self._planner.plan(now)
        planned = self._clock()
        if plan.chunks or plan.evicted:
            self._flight = _Flight(plan, now, planned - now)
        self._watcher.planned(plan, self._clients)
        if now >= self._snapshot_at:
            self._snapshot_at = now + SNAPSHOT_SECONDS
            self._watcher.measured(self._planner.snapshot())
        wish = self._translate(plan, view)
        if planned - now > SLOW_SECONDS:
            raise TimeoutError(f"planning took {planned - now:.3f} s, at most {SLOW_SECONDS} s are given")
        self._faults = 0
        return wish

    # To the planner

    def _report(self, view: list[Seen], now: float) -> None:
        """What became of the last plan, from where each of its requests stands now; forget those that left."""
        here = {seen.name: seen for seen in view if seen.phase is not Phase.FOREIGN}
        flight, self._flight = self._flight, None
        if flight is not None:
            drafts = {chunk.request_id: chunk.draft for chunk in flight.plan.chunks}
            advances = [self._advance(n, here.get(n), draft) for n, draft in drafts.items() if n in self._told]
            # When all have left, the loop may have slept since: nobody knows when the batch ended.
            slept = not any(name in here for name in self._told) or self._iterations <= WARM_UP_ITERATIONS
            finished = flight.started_at + flight.plan.predicted if slept else now
            report = StepReport(flight.started_at, finished, tuple(a for a in advances if a is not None))
            self._planner.report(report)
            self._watcher.stepped(flight.plan, report, flight.planning)
            for advance in report.advances:
                if advance.done:
                    self._forget(advance.request_id)
        for name in [name for name in self._told if name not in here]:
            self._planner.cancel(name)
            self._forget(name)

    def _advance(self, name: RequestId, seen: Seen | None, draft: int) -> Advance | None:
        """Where a request stands, as progress since the planner was told last; None for none."""
        told = self._told[name]
        if seen is None:
            return Advance(name, computed=max(told - 1, 0), done=True)
        new = max(seen.believed - told, 0)
        self._told[name] = told + new
        if seen.phase is Phase.RETIRING:
            return Advance(name, seen.computed, new, done=True)
        if seen.number not in self._ran and not new:
            return None
        accepted = min(max(new - 1, 0), draft)
        return Advance(name, seen.computed, new, accepted, self._stage_ended(seen, new))

    def _stage_ended(self, seen: Seen, new: int) -> bool:
        """Whether the thinking ended among the newest tokens that are on the host."""
        ticket = self._tickets.get(seen.client)
        if ticket is None or ticket.stage_end is None or not new:
            return False
        return ticket.stage_end in seen.request.get_tokens(0)[max(seen.tokens - new, seen.request.orig_prompt_len) :]

    def _forget(self, name: RequestId) -> None:
        del self._told[name]
        self._clients.pop(name, None)
        self._evicted.discard(name)

    def _introduce(self, view: list[Seen], now: float) -> None:
        """Add what the planner has not seen. One that has run already comes with what it has computed."""
        for seen in view:
            if seen.name in self._told or not seen.is_runnable:
                continue
            self._planner.add(self._request(seen, now), now)
            self._told[seen.name] = seen.believed
            self._clients[seen.name] = seen.client

    def _request(self, seen: Seen, now: float) -> Request:
        """The request for the planner. One without a ticket is best effort; of one that has run, the rest."""
        ticket = self._tickets.get(seen.client)
        generated = seen.believed - int(seen.request.orig_prompt_len)
        left = max(int(seen.request.py_max_new_tokens) - generated, 1)
        cached = min(seen.computed, seen.believed - 1)
        if ticket is None:
            return Request(seen.name, now, seen.believed, (Stage(left),), cached_tokens=cached)
        given = ticket.request
        stages = given.stages if generated <= 0 else _rest(given.stages, generated)
        return Request(
            seen.name, given.arrived_at, seen.believed, stages, given.slo_class, given.weight, given.session,
            cached, given.expected_new_tokens,
        )  # fmt: skip

    # From the planner

    def _translate(self, plan: Plan, view: list[Seen]) -> Wish:
        """The plan in the engine's terms. Where both differ about a request, the engine is right."""
        self._evicted.update(plan.evicted)
        here = {seen.name: seen for seen in view}
        wish = Wish()
        for name in sorted(self._evicted):
            seen = here.get(name)
            if seen is None or not seen.is_started or seen.phase is Phase.RETIRING:
                self._evicted.discard(name)
            elif self._may_ever_pause(seen):
                wish.paused.append(seen)
            else:
                self._evicted.discard(name)
        for chunk in plan.chunks:
            seen = here.get(chunk.request_id)
            if seen is None or chunk.request_id in self._evicted:
                continue
            if seen.phase is Phase.DECODE:
                wish.decodes.append(seen)
            elif seen.is_runnable:
                unit = self._cockpit.limits.chunk_unit or seen.left
                wish.contexts.append((seen, max(chunk.length - chunk.draft, min(unit, seen.left))))
        return wish

    def _may_ever_pause(self, seen: Seen) -> bool:
        limits = self._cockpit.limits
        return limits.pauses and (seen.phase is Phase.DECODE or limits.pauses_mid_prefill)

    # Together with the stock

    def _from_stock(self, stock: Any, view: list[Seen]) -> Wish:
        here = {id(seen.request): seen for seen in view}
        return Wish(
            [(here[id(r)], int(r.context_chunk_size)) for r in stock.context_requests],
            [here[id(r)] for r in stock.generation_requests],
            [here[id(r)] for r in stock.paused_requests],
        )

    def _trim(self, stock: Wish, wish: Wish) -> Wish:
        """What both want: never a request, a token or a pause that the stock did not choose."""
        sizes = {seen.number: size for seen, size in wish.contexts}
        decodes = {seen.number for seen in wish.decodes}
        contexts = [(seen, min(size, sizes[seen.number])) for seen, size in stock.contexts if seen.number in sizes]
        return Wish(contexts, [seen for seen in stock.decodes if seen.number in decodes], stock.paused)

    def _compare(self, wish: Wish | None, stock: Wish) -> None:
        if wish is None:
            return
        planned = {seen.number: size for seen, size in wish.contexts}
        for seen, size in stock.contexts:
            if planned.pop(seen.number, None) != size:
                self._count("difference", "context")
        for _ in planned:
            self._count("difference", "context")
        for _ in {seen.number for seen in wish.decodes} ^ {seen.number for seen in stock.decodes}:
            self._count("difference", "decode")

    # To the engine

    def _legal(self, wish: Wish, view: list[Seen], inflight: Collection[int]) -> Legal:
        batch = legal(wish, view, self._cockpit.limits, self._cockpit.free_blocks(), inflight)
        for _, rule in batch.dropped:
            self._count("repair", rule)
        return batch

    def _carry_out(self, batch: Wish) -> Any:
        """Write the chunk sizes, break stale hand-overs of tokens, and remember who ran."""
        self._drove = True
        for seen, size in batch.contexts:
            seen.request.context_chunk_size = size
        for seen in batch.decodes:
            if seen.number not in self._ran:
                # Its newest token is on the host. With this field set the engine would take it from the
                # device and put it one position too far (upstream's own cure, see PR 13592).
                seen.request.py_batch_idx = None
        self._note(batch)
        if batch.is_empty:
            self._pause(EMPTY_SECONDS)  # the loop would spin
        return output(batch, self._cockpit.make_output._fields, self._cockpit.make_output)

    def _note(self, batch: Wish) -> None:
        """Who ran last. An empty batch runs nobody: the one before it stays on the device, or was read."""
        if not batch.is_empty:
            self._ran = batch.ids()
            self._shape = _shape(batch)

    # All ranks

    def _as_told(self, orders: Any, active: Sequence[Any]) -> Wish | None:
        """Rank 0's batch about this rank's own requests; None: as the stock says, which all ranks ask alike."""
        if orders is None:
            return None
        here = {seen.number: seen for seen in self._look(active)}
        contexts, decodes, paused = orders
        return Wish(
            [(here[number], size) for number, size in contexts],
            [here[number] for number in decodes],
            [here[number] for number in paused],
        )

    # Trouble

    def _fault(self, error: Exception) -> None:
        """The planner cannot be trusted with what it knows: start a new one from what the engine holds."""
        self._faults += 1
        kind = "slow" if isinstance(error, TimeoutError) else "fault"
        self._count(kind, f"{type(error).__name__}: {error}")
        if kind == "fault":
            log.warning("the planner failed (%d in a row)", self._faults, exc_info=error)
            self._flight = None
            self._told.clear()
            self._evicted.clear()
            self._planner = self._make_planner()
        if self._faults >= FAULTS_TO_STEP_DOWN:
            self.step_down(f"{self._faults} planner faults in a row, the last: {type(error).__name__}: {error}")

    def step_down(self, reason: str) -> None:
        """Trust the planner with less. In governor mode there is nothing below."""
        below = STEP_DOWN.get(self.mode)
        if below is None:
            return
        log.error("mode %s steps down to %s: %s", self.mode.value, below.value, reason)
        self.mode, self.reason, self._faults = below, reason, 0
        self._count("step_down", below.value)

    def _count(self, kind: str, detail: str) -> None:
        self.counts[kind] += 1
        self._watcher.event(kind, detail)


def _shape(batch: Wish) -> BatchShape:
    """What the time of a batch depends on."""
    drafts = [seen.draft for seen in batch.decodes]
    area = sum(size * (seen.position + 0.5 * size) for seen, size in batch.contexts)
    tokens = sum(size for _, size in batch.contexts) + len(drafts) + sum(drafts)
    return BatchShape(tokens, sum(seen.believed for seen in batch.decodes), area, max(drafts, default=0))


def _rest(stages: Sequence[Stage], generated: int) -> tuple[Stage, ...]:
    """The stages after so many tokens; at least one token of the last."""
    rest: list[Stage] = []
    for stage in stages:
        used = min(generated, stage.max_new_tokens)
        generated -= used
        if stage.max_new_tokens > used:
            rest.append(Stage(stage.max_new_tokens - used, stage.slo))
    return tuple(rest) or (Stage(1, stages[-1].slo),)


def _compact(batch: Any) -> tuple[list[tuple[int, int]], list[int], list[int]] | None:
    """A batch as numbers, for the other ranks; None: do as the stock says."""
    if not isinstance(batch, Wish):
        return None
    return (
        [(seen.number, size) for seen, size in batch.contexts],
        [seen.number for seen in batch.decodes],
        [seen.number for seen in batch.paused],
    )
