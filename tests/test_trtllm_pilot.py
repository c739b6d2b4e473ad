"""Our planner inside TensorRT-LLM's loop: whatever it plans, the stand-in engine generates what it should."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import trtllm_standin as standin
from trtllm_standin import RELEASES, Drafter, Executor, Release, expected_tokens

from slos_serve.backend.trtllm_pilot import Cockpit, Mode, Pilot, Ticket
from slos_serve.backend.trtllm_probe import (
    capabilities_of,
    check_requests,
    limits_of,
    prepare,
    probe,
    scheduler_class,
)
from slos_serve.scheduler import Chunk, PerfModel, Piece, Plan, Request, Scheduler, Slo, Snapshot, Stage, StepReport
from slos_serve.scheduler.engine import Planner

PERF = PerfModel((Piece(0.01, 0.0001),))
MOST_STEPS = 4000
BOTH = pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlap"])
ALL = pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)
TAKING_OVER = (Mode.FULL, Mode.TRIM)


class Diary:
    """Remembers what the pilot tells."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.reports: list[StepReport] = []

    def stepped(self, plan: Plan, report: StepReport, planning: float) -> None:
        self.reports.append(report)

    def event(self, kind: str, detail: str) -> None:
        self.events.append((kind, detail))

    def planned(self, plan: Plan, clients: Mapping[str, int]) -> None:
        assert {chunk.request_id for chunk in plan.chunks} <= set(clients)

    def measured(self, snapshot: Snapshot | None) -> None:
        pass


class Flight:
    """An engine with a pilot, requests with all kinds of SLOs, and what they must generate."""

    def __init__(
        self,
        executor: Executor,
        mode: Mode,
        seed: int = 0,
        wrap: Callable[[Planner], Planner] = lambda planner: planner,
    ) -> None:
        self.chance = random.Random(seed)
        self.executor = executor
        self.tickets: dict[int, Ticket] = {}
        self.expected: dict[int, list[int]] = {}
        self.cancelled: set[int] = set()
        self.diary = Diary()
        names = standin.api(executor.release)
        prepare(executor)
        most = executor.drafter.max_draft_len if executor.drafter else 0
        limits = limits_of(executor, chunked=executor.scheduler.unit is not None, max_draft=most)
        blocks = executor.kv_cache_manager.max_blocks
        context = (blocks - limits.reserve) * limits.block_tokens
        capabilities = capabilities_of(limits, blocks, context, most)
        self.context = min(context, executor.max_num_tokens if limits.chunk_unit is None else context)
        cockpit = Cockpit(
            stock=executor.scheduler,
            states=names.LlmRequestState,
            make_output=names.SchedulerOutput,
            limits=limits,
            free_blocks=executor.kv_cache_manager.get_num_free_blocks,
            is_unread=lambda: executor.previous_batch is not None,
        )
        self.pilot = Pilot(
            cockpit,
            lambda: wrap(Scheduler(capabilities, PERF)),
            mode,
            self.diary,
            self.tickets,
            clock=lambda: executor.clock,
            pause=self._wait,
        )
        executor.scheduler = scheduler_class(names)(self.pilot)
        if executor.drafter is not None:
            drafter = executor.drafter
            drafter.get_draft_len_for_batch_size = lambda size: self.pilot.draft_length(  # type: ignore[method-assign]
                0, drafter.max_draft_len, executor.active_requests
            )

    def _wait(self, seconds: float) -> None:
        self.executor.clock += seconds

    def send(self, client: int) -> None:
        """One request of random size and kind; some come without a ticket."""
        chance = self.chance
        size = chance.choice([3, 9, 20, 45])
        new = min(chance.randrange(1, 20), self.context - size - 1)
        size = max(1, min(size, self.context - new - 1))
        head = [7] * min(size, chance.choice([0, 0, 8, 16]))  # shared prefixes
        prompt = head + [chance.randrange(1, 50) for _ in range(size - len(head))]
        slo = chance.choice([None, Slo(0.2, 0.03), Slo(1.0, 0.1), Slo(5.0, 0.02)])
        if chance.random() < 0.8:
            request = Request(f"r{client}", self.executor.clock, size, (Stage(new, slo),))
            self.tickets[client] = Ticket(request)
        self.executor.enqueue(client, prompt, new)
        self.expected[client] = expected_tokens(prompt, new)

    def run(self, requests: int, cancels: float = 0.0) -> None:
        """Send `requests` at random moments, cancel some, and run until nothing is left."""
        sent = 0
        for _ in range(MOST_STEPS):
            while sent < requests and self.chance.random() < 0.3:
                self.send(sent)
                sent += 1
            if sent and self.chance.random() < cancels:
                self.cancel(self.chance.randrange(sent))
            self.step()
            if sent == requests and self.executor.is_idle:
                return
        raise AssertionError(f"not at the end after {MOST_STEPS} steps: {self.executor.active_requests}")

    def cancel(self, client: int) -> None:
        if client not in self.executor.finished:
            self.cancelled.add(client)
            self.executor.cancel(client)

    def step(self) -> int:
        ran = self.executor.step()
        self.executor.kv_cache_manager.check()
        return ran

    def check(self) -> None:
        """Everybody got all and only their tokens, and nothing is held."""
        for client, expected in self.expected.items():
            got = self.executor.outputs[client]
            if client in self.cancelled:
                assert got == expected[: len(got)]
            else:
                assert got == expected, client
        cache = self.executor.kv_cache_manager
        assert cache.get_num_free_blocks() == cache.max_blocks


def engine(release: Release, overlap: bool, chance: random.Random, **options: Any) -> Executor:
    """An engine of random size: memory is short, slots are few, prompts are cut."""
    settings: dict[str, Any] = {
        "num_blocks": chance.choice([18, 24, 64]),
        "max_batch_size": chance.choice([3, 8]),
        "max_num_tokens": chance.choice([12, 32]),
        "reuse": chance.random() < 0.5,
    }
    return Executor(release, overlap=overlap, **{**settings, **options})


@ALL
@BOTH
@pytest.mark.parametrize("mode", list(Mode), ids=lambda mode: mode.value)
def test_random_schedules_generate_what_they_should(release: Release, overlap: bool, mode: Mode) -> None:
    """Random arrivals, SLOs, sizes, prefixes and cancellations: no rule is broken, nobody waits for ever."""
    for seed in range(20):
        flight = Flight(engine(release, overlap, random.Random(seed)), mode, seed)
        flight.run(12, cancels=0.05)
        flight.check()
        assert flight.pilot.mode is mode
        assert not flight.pilot.counts["fault"]


class Dice:
    """A planner without sense: runs, holds and evicts at random. Nothing it says may break the engine."""

    def __init__(self, chance: random.Random, evicts: float = 0.1, runs: float = 0.6) -> None:
        self.chance = chance
        self.evicts = evicts
        self.runs = runs
        self.live: list[str] = []

    def add(self, request: Request, now: float) -> None:
        self.live.append(request.id)

    def cancel(self, request_id: str) -> bool:
        self.live.remove(request_id)
        return True

    def report(self, report: StepReport) -> None:
        for advance in report.advances:
            assert advance.new_tokens >= 0
            assert advance.request_id in self.live
            if advance.done:
                self.live.remove(advance.request_id)

    def plan(self, now: float) -> Plan:
        evicted = tuple(name for name in self.live if self.chance.random() < self.evicts)
        picked = [name for name in self.live if name not in evicted and self.chance.random() < self.runs]
        self.chance.shuffle(picked)
        chunks = tuple(Chunk(name, 0, 1 + draft, draft) for name, draft in ((n, self._draft()) for n in picked))
        return Plan(tuple(replace(c, length=c.length + self.chance.choice([0, 3, 50])) for c in chunks), evicted)

    def _draft(self) -> int:
        return self.chance.choice([0, 0, 2])

    def snapshot(self) -> Snapshot:
        return Snapshot(0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


def dice(seed: int, **odds: float) -> Callable[[Planner], Planner]:
    chance = random.Random(seed)
    return lambda planner: Dice(chance, **odds)


@ALL
@BOTH
@pytest.mark.parametrize("mode", TAKING_OVER, ids=lambda mode: mode.value)
def test_a_planner_without_sense_breaks_nothing(release: Release, overlap: bool, mode: Mode) -> None:
    """Random holds, evictions, orders and sizes: the rules are kept for the planner."""
    for seed in range(40):
        flight = Flight(engine(release, overlap, random.Random(seed)), mode, seed, dice(seed))
        flight.run(10, cancels=0.03)
        flight.check()


@ALL
@BOTH
def test_prompts_go_whole_where_chunking_is_off(release: Release, overlap: bool) -> None:
    """Without chunked prefill no prompt is cut, by the planner or by the dice."""
    for seed in range(10):
        options = {"chunked": False, "max_num_tokens": 64}
        for wrap in (dice(seed), lambda planner: planner):
            flight = Flight(engine(release, overlap, random.Random(seed), **options), Mode.FULL, seed, wrap)
            flight.run(8)
            flight.check()


# The four hazards


class Hold:
    """A scheduler that takes the stock's batch and leaves decodes out now and then: nothing more."""

    def __init__(self, stock: Any, chance: random.Random) -> None:
        self.stock = stock
        self.chance = chance

    def schedule_request(self, active: list[Any], inflight: set[int]) -> Any:
        output = self.stock.schedule_request(active, inflight)
        kept = [r for r in output.generation_requests if self.chance.random() < 0.7]
        return output._replace(generation_requests=kept)


def outcome(executor: Executor, prompts: list[list[int]], new: int) -> str:
    """What becomes of some requests without a pilot: "right", "wrong" or "crash"."""
    for client, prompt in enumerate(prompts):
        executor.enqueue(client, prompt, new)
    try:
        for _ in range(MOST_STEPS):
            if executor.is_idle:
                break
            executor.step()
    except standin.Crash:
        return "crash"
    right = all(executor.outputs[i] == expected_tokens(prompt, new) for i, prompt in enumerate(prompts))
    return "right" if right else "wrong"


PROMPTS = [[i, i + 1, i + 2] for i in range(4)]


@ALL
def test_a_skipped_decode_is_the_hazard_that_it_is_said_to_be(release: Release) -> None:
    """Leaving a decode out under overlap goes wrong by itself; the pilot's holds (see above) do not."""
    executor = Executor(release, overlap=True)
    executor.scheduler = Hold(executor.scheduler, random.Random(0))
    assert outcome(executor, PROMPTS, 12) in ("wrong", "crash")
    executor = Executor(release, overlap=False)
    executor.scheduler = Hold(executor.scheduler, random.Random(0))
    assert outcome(executor, PROMPTS, 12) == "right"


@BOTH
def test_a_held_decode_goes_on_where_it_stopped(overlap: bool) -> None:
    """Whatever is held for however long, also over batches that are empty."""
    for release in RELEASES:
        for seed in range(20):
            executor = Executor(release, overlap=overlap)
            flight = Flight(executor, Mode.FULL, seed, dice(seed, evicts=0.0, runs=0.3))
            flight.run(4)
            flight.check()


class Pauses:
    """A scheduler that pauses the first request it can, once."""

    def __init__(self, stock: Any, phase: Callable[[Any], bool]) -> None:
        self.stock = stock
        self.phase = phase
        self.done = False

    def schedule_request(self, active: list[Any], inflight: set[int]) -> Any:
        output = self.stock.schedule_request(active, inflight)
        victim = next((r for r in active if self.phase(r)), None)
        if self.done or victim is None:
            return output
        self.done = True
        contexts = [r for r in output.context_requests if r is not victim]
        generations = [r for r in output.generation_requests if r is not victim]
        return output._replace(context_requests=contexts, generation_requests=generations, paused_requests=[victim])


def test_a_pause_beyond_the_input_length_is_prevented() -> None:
    """Up to 1.2 a pause cuts what is longer than `max_input_len`; `prepare` lifts the limit."""
    for lifted, expected in ((False, "crash"), (True, "right")):
        executor = Executor(RELEASES[0], overlap=False)
        executor.max_input_len = 8
        if lifted:
            prepare(executor)
        executor.scheduler = Pauses(executor.scheduler, lambda r: r.get_num_tokens(0) > 9)
        assert outcome(executor, PROMPTS, 12) == expected


def mid_prefill(release: Release, evicts_anywhere: bool) -> str:
    """Two requests with one prefix; the first is given up inside its prompt, and comes back after the second."""
    executor = Executor(release, overlap=False, reuse=True, max_num_tokens=8)
    if evicts_anywhere:
        executor.scheduler = Pauses(executor.scheduler, lambda r: r.context_current_position == 8)
    else:
        flight = Flight(executor, Mode.FULL, 0, dice(3, evicts=0.5))
        assert not flight.pilot._cockpit.limits.pauses_mid_prefill
    prompt = list(range(30, 54))
    return outcome(executor, [prompt, [*prompt, 3]], 3)


def test_a_prompt_is_not_given_up_in_the_middle_where_that_poisons_the_cache() -> None:
    """With block reuse, releases before the fix remember blocks that were never computed."""
    assert mid_prefill(RELEASES[0], evicts_anywhere=True) == "wrong"
    assert mid_prefill(RELEASES[2], evicts_anywhere=True) == "right"
    assert mid_prefill(RELEASES[0], evicts_anywhere=False) == "right"


def test_the_second_kv_manager_is_refused() -> None:
    """It allocates inside its own scheduler, so the planner may not take that place."""
    executor = Executor(RELEASES[2], overlap=True)
    executor.kv_cache_manager.__class__ = type("KVCacheManagerV2", (standin.Cache,), {})
    findings = probe(standin.api(RELEASES[2]), executor)
    assert findings.mode is Mode.GOVERNOR
    assert any("use_kv_cache_manager_v2 to false" in reason for reason in findings.reasons)


# Refusals


@pytest.mark.parametrize(
    ("change", "mode", "reason"),
    [
        (lambda e: setattr(e.dist, "pp_size", 2), Mode.GOVERNOR, "set pipeline_parallel_size to 1"),
        (lambda e: setattr(e, "enable_attention_dp", True), Mode.GOVERNOR, "set enable_attention_dp to false"),
        (lambda e: setattr(e, "kv_cache_transceiver", object()), Mode.GOVERNOR, "remove cache_transceiver_config"),
        (lambda e: setattr(e, "max_beam_width", 4), Mode.GOVERNOR, "width 4; set max_beam_width to 1"),
        (lambda e: setattr(e.kv_cache_manager, "is_vswa", True), Mode.TRIM, "sliding windows"),
        (lambda e: delattr(e, "previous_batch"), Mode.TRIM, "set disable_overlap_scheduler to true"),
        (lambda e: delattr(e, "max_num_tokens"), Mode.GOVERNOR, "engine.max_num_tokens: missing"),
        (lambda e: setattr(e, "max_input_len", 2048), Mode.TRIM, "a pause would cut longer sequences"),
    ],
    ids=["pp", "adp", "disaggregated", "beams", "windows", "overlap", "tokens", "pause"],
)
def test_what_an_engine_is_refused_for_is_named(change: Callable[[Any], None], mode: Mode, reason: str) -> None:
    """Why not more, and what to change."""
    executor = Executor(RELEASES[2], overlap=True)
    prepare(executor)
    change(executor)
    findings = probe(standin.api(RELEASES[2]), executor)
    assert findings.mode is mode
    assert any(reason in each for each in findings.reasons), findings.reasons


def test_a_release_with_another_interface_is_refused() -> None:
    """Features are looked at: the scheduler's methods and arguments, what it returns, what a request has."""

    class Asks(standin.RequestScheduler):
        @abstractmethod
        def foresee(self) -> None: ...

    class Takes(ABC):
        @abstractmethod
        def schedule_request(self, requests: Any) -> Any: ...

    names = standin.api(RELEASES[1])
    executor = Executor(RELEASES[1], overlap=False)
    prepare(executor)
    for change in (
        {"RequestScheduler": Asks}, {"RequestScheduler": Takes}, {"SchedulerOutput": tuple}, {"PyExecutor": object},
        {"LlmRequestState": object},
    ):  # fmt: skip
        assert probe(replace(names, **change), executor).mode is Mode.GOVERNOR
    assert probe(names, executor).mode is Mode.FULL
    assert check_requests(names).passed
    assert "py_client_id" in check_requests(replace(names, LlmRequest=object)).found


# The same scheduler


class Recorder:
    """Writes down every call that its planner gets, and the plans it makes."""

    def __init__(self, planner: Planner) -> None:
        self.planner = planner
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.plans: list[Plan] = []

    def add(self, request: Request, now: float) -> None:
        self.calls.append(("add", (request, now)))
        self.planner.add(request, now)

    def cancel(self, request_id: str) -> bool:
        self.calls.append(("cancel", (request_id,)))
        return self.planner.cancel(request_id)

    def plan(self, now: float) -> Plan:
        self.calls.append(("plan", (now,)))
        self.plans.append(self.planner.plan(now))
        return self.plans[-1]

    def report(self, report: StepReport) -> None:
        self.calls.append(("report", (report,)))
        self.planner.report(report)

    def snapshot(self) -> Snapshot:
        return self.planner.snapshot()


@BOTH
@pytest.mark.parametrize("mode", [Mode.FULL, Mode.TRIM, Mode.SHADOW], ids=lambda mode: mode.value)
def test_equal_calls_give_equal_plans_outside_the_engine(overlap: bool, mode: Mode) -> None:
    """What was recorded in PyExecutor's loop replays into a fresh scheduler: it is the same scheduler."""
    recorders: list[Recorder] = []

    def record(planner: Planner) -> Planner:
        recorders.append(Recorder(planner))
        return recorders[-1]

    flight = Flight(engine(RELEASES[1], overlap, random.Random(5)), mode, 5, record)
    flight.run(20, cancels=0.05)
    recorded = recorders[0]
    inner = recorded.planner
    assert isinstance(inner, Scheduler)
    fresh = Scheduler(inner.capabilities, PERF)
    plans = [
        result for name, arguments in recorded.calls if isinstance(result := getattr(fresh, name)(*arguments), Plan)
    ]
    assert len(plans) > 50
    assert plans == recorded.plans


# Trouble


class Broken:
    """A planner that raises, or takes too long, in some of its calls."""

    def __init__(self, planner: Planner, fails: Callable[[], bool], slow: Callable[[], None] | None = None) -> None:
        self.planner = planner
        self.fails = fails
        self.slow = slow

    def add(self, request: Request, now: float) -> None:
        self.planner.add(request, now)

    def cancel(self, request_id: str) -> bool:
        return self.planner.cancel(request_id)

    def plan(self, now: float) -> Plan:
        if self.fails():
            if self.slow is None:
                raise ZeroDivisionError("no idea")
            self.slow()
        return self.planner.plan(now)

    def report(self, report: StepReport) -> None:
        if self.fails() and self.slow is None:
            raise RuntimeError("counts disagree")
        self.planner.report(report)

    def snapshot(self) -> Snapshot:
        return self.planner.snapshot()


@ALL
@BOTH
def test_a_planner_that_fails_now_and_then_is_replaced(release: Release, overlap: bool) -> None:
    """Each failure costs one iteration of ours; requests that are half done go on."""
    for seed in range(10):
        chance = random.Random(seed)
        flight = Flight(
            engine(release, overlap, random.Random(seed)), Mode.FULL, seed,
            lambda planner, chance=chance: Broken(planner, lambda: chance.random() < 0.1),
        )  # fmt: skip
        flight.run(12, cancels=0.03)
        flight.check()
        assert flight.pilot.counts["fault"]


@ALL
@BOTH
def test_a_planner_that_always_fails_is_given_up(release: Release, overlap: bool) -> None:
    """The mode steps down twice, with a reason, and no request notices."""
    for seed in range(10):
        calls = iter(range(10_000))
        flight = Flight(
            engine(release, overlap, random.Random(seed)), Mode.FULL, seed,
            lambda planner, calls=calls: Broken(planner, lambda: next(calls) > 40),
        )  # fmt: skip
        flight.run(12)
        flight.check()
        assert flight.pilot.mode is Mode.GOVERNOR
        assert "in a row" in flight.pilot.reason
        assert [detail for kind, detail in flight.diary.events if kind == "step_down"] == ["trim", "governor"]


class Idle(Dice):
    """A planner that never wants anything."""

    def plan(self, now: float) -> Plan:
        return Plan(())


@BOTH
def test_an_empty_plan_never_stops_the_engine(overlap: bool) -> None:
    """Where requests could run, the stock's batch does, and it is counted."""
    flight = Flight(Executor(RELEASES[1], overlap=overlap), Mode.FULL, 0, lambda planner: Idle(random.Random(0)))
    flight.run(8)
    flight.check()
    assert flight.pilot.counts["fallback"] > 8
    assert flight.pilot.mode is Mode.FULL


def test_a_planner_that_is_slow_is_given_up_too() -> None:
    """An engine may not wait for its planner."""
    executor = engine(RELEASES[1], True, random.Random(1))

    def dawdle() -> None:
        executor.clock += 1.0

    flight = Flight(executor, Mode.FULL, 1, lambda planner: Broken(planner, lambda: True, dawdle))
    flight.run(12)
    flight.check()
    assert flight.pilot.mode is Mode.GOVERNOR
    assert flight.pilot.counts["slow"] >= 6


def test_shadow_changes_nothing_and_counts_differences() -> None:
    """In shadow the engine does exactly what it does alone."""
    traces = []
    for shadowed in (False, True):
        executor = Executor(RELEASES[1], overlap=True, num_blocks=24)
        stock = executor.scheduler
        trace: list[tuple[list[int], list[int]]] = []

        def noted(active: Any, inflight: Any, stock: Any = stock, trace: Any = trace) -> Any:
            output = type(stock).schedule_request(stock, active, inflight)
            trace.append(
                ([r.request_id for r in output.context_requests], [r.request_id for r in output.generation_requests])
            )
            return output

        stock.schedule_request = noted
        flight = Flight(executor, Mode.SHADOW, 2) if shadowed else None
        for client in range(12):
            executor.enqueue(client, [client + 1] * (5 + client), 8)
        while not executor.is_idle:
            executor.step()
        traces.append(trace)
        if flight is not None:
            assert flight.pilot.counts["difference"]
    assert traces[0] == traces[1]


def test_trim_never_adds_to_the_stock_batch() -> None:
    """Trim takes away only: what runs is what the stock chose, or part of it."""
    executor = engine(RELEASES[1], True, random.Random(3))
    stock = executor.scheduler
    chosen: list[Any] = []

    def noted(active: Any, inflight: Any) -> Any:
        chosen.append(type(stock).schedule_request(stock, active, inflight))
        return chosen[-1]

    stock.schedule_request = noted
    flight = Flight(executor, Mode.TRIM, 3)
    taken: list[Any] = []
    inner = executor.scheduler.schedule_request

    def spied(active: Any, inflight: Any) -> Any:
        taken.append(inner(active, inflight))
        return taken[-1]

    executor.scheduler.schedule_request = spied
    flight.run(20)
    flight.check()
    for ours, theirs in zip(taken, chosen, strict=True):
        for field in ("context_requests", "generation_requests"):
            assert {id(r) for r in getattr(ours, field)} <= {id(r) for r in getattr(theirs, field)}
    assert any(len(o.generation_requests) < len(t.generation_requests) for o, t in zip(taken, chosen, strict=True))


# Guesses


@ALL
def test_the_planner_chooses_the_draft_length_of_every_batch(release: Release) -> None:
    """The drafter asks before the batch is scheduled: the plan is made there, and used once."""
    lengths: list[int] = []
    accepted = 0
    for seed in range(10):
        drafter = Drafter(3, 5, {1: 3, 8: 3}, release.switches)
        executor = engine(release, False, random.Random(seed), drafter=drafter, max_num_tokens=32)
        flight = Flight(executor, Mode.FULL, seed)
        assert executor.drafter is not None
        set_length = executor.drafter.update_max_total_draft_tokens

        def noted(length: int, set_length: Callable[[int], None] = set_length) -> None:
            lengths.append(length)
            set_length(length)

        executor.drafter.update_max_total_draft_tokens = noted  # type: ignore[method-assign]
        flight.run(10, cancels=0.03)
        flight.check()
        assert not flight.pilot.counts["fault"]
        accepted += sum(advance.accepted for report in flight.diary.reports for advance in report.advances)
    assert {0, 3} <= set(lengths)
    assert accepted > 20


# Several ranks


@ALL
@BOTH
def test_all_ranks_run_what_rank_0_planned(release: Release, overlap: bool) -> None:
    """Only rank 0 plans; also when its planner fails, every rank runs the same batch."""
    for seed in range(10):
        chance = random.Random(seed)
        told: list[Any] = []
        leader = Flight(
            engine(release, overlap, random.Random(seed)), Mode.FULL, seed,
            lambda planner, chance=chance: Broken(planner, lambda: chance.random() < 0.05),
        )  # fmt: skip
        follower = Flight(engine(release, overlap, random.Random(seed)), Mode.FULL, seed, dice(seed))
        for flight, first in ((leader, True), (follower, False)):
            pilot = flight.pilot
            pilot._cockpit = replace(
                pilot._cockpit,
                is_leader=first,
                collective=told.append if first else lambda value, told=told: told.pop(0),
            )
        for client in range(12):
            leader.send(client)
            follower.send(client)
        for _ in range(MOST_STEPS):
            if leader.executor.is_idle:
                break
            assert leader.step() == follower.step()
            assert told == []
        for flight in (leader, follower):
            flight.check()
