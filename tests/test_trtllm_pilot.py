"""Our planner inside TensorRT-LLM's loop: whatever it plans, the stand-in engine generates what it should."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import trtllm_standin as standin
from trtllm_standin import RELEASES, Executor, Release, expected_tokens

from slos_serve.backend.trtllm_pilot import Cockpit, Mode, Pilot, Ticket
from slos_serve.backend.trtllm_probe import capabilities_of, limits_of, prepare, scheduler_class
from slos_serve.scheduler import PerfModel, Piece, Plan, Request, Scheduler, Slo, Stage, StepReport
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
