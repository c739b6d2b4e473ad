"""A loaded TensorRT-LLM to try planners on: what is played on it, and what comes of it."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from slos_serve.scheduler import Chunk, Plan, Request, Slo, Snapshot, Stage, StepReport
from slos_serve.scheduler.engine import Planner

from .config import EngineConfig
from .generation import Generation, SamplingParams
from .trtllm_engine import TrtllmBuilt, uninstall
from .trtllm_pilot import Mode, Pilot, Ticket
from .trtllm_worker import Tickets

PATIENCE_SECONDS: Final = 60.0


class Erratic:
    """A planner without sense: runs, holds, cuts and evicts at random. Nothing it says may change a text."""

    def __init__(self, seed: int, evicts: float, runs: float, size: int = 0, evicts_at: int = 0) -> None:
        """`size`: of every chunk, else random; `evicts_at`: all are evicted in the plan of this number."""
        self._chance = random.Random(seed)
        self._evicts = evicts
        self._runs = runs
        self._given_size = size
        self._evicts_at = evicts_at
        self._plans = 0
        self._live: dict[str, int] = {}

    def add(self, request: Request, now: float) -> None:
        self._live[request.id] = request.prompt_tokens

    def cancel(self, request_id: str) -> bool:
        return self._live.pop(request_id, None) is not None

    def report(self, report: StepReport) -> None:
        for advance in report.advances:
            if advance.done:
                del self._live[advance.request_id]

    def plan(self, now: float) -> Plan:
        self._plans += 1
        odds = 1.0 if self._plans == self._evicts_at else self._evicts
        evicted = tuple(name for name in self._live if self._chance.random() < odds)
        running = [name for name in self._live if name not in evicted and self._chance.random() < self._runs]
        self._chance.shuffle(running)
        return Plan(tuple(Chunk(name, 0, self._size(self._live[name])) for name in running), evicted)

    def _size(self, prompt: int) -> int:
        return self._given_size or self._chance.choice([1, 64, prompt // 3 + 1, prompt])

    def snapshot(self) -> Snapshot:
        return Snapshot(len(self._live), 0, 0, 0, 0, 0, 0, 0, 0, 0)


class Watch:
    """Counts what a pilot tells."""

    def __init__(self) -> None:
        self.plans = 0
        self.pauses = 0

    def stepped(self, plan: Plan, report: StepReport, planning: float) -> None: ...
    def event(self, kind: str, detail: str) -> None: ...
    def planned(self, plan: Plan, clients: Mapping[str, int]) -> None:
        self.plans += 1
        self.pauses += len(plan.evicted)

    def measured(self, snapshot: Snapshot) -> None: ...


@dataclass(frozen=True, slots=True)
class Job:
    """One request to play: when it comes, its prompt, how much it wants, what it was promised."""

    at: float
    prompt: tuple[int, ...]
    new: int
    slo: Slo | None = None


@dataclass(slots=True)
class Ran:
    """What came of a job: token ids with the time of each, in seconds from the start."""

    job: Job
    ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)


class Lab:
    """A loaded engine on which planners are tried one after the other."""

    def __init__(self, config: EngineConfig, built: TrtllmBuilt, seed: int = 0) -> None:
        self.config = config
        self.built = built
        self.chance = random.Random(seed)
        self.pilot: Pilot | None = None
        self.watch = Watch()
        self.tickets = Tickets()

    @property
    def engine(self) -> Any:
        return self.built.front.engine

    def fly(self, mode: str, planner: Callable[[], Planner] | None = None) -> None:
        """Put a pilot of this mode in place, or take it away ("stock"). The engine must be idle."""
        self.watch, self.tickets = Watch(), Tickets()
        if mode == "stock":
            self.pilot = None
            if self.engine is not None:
                uninstall(self.engine)
            return
        pilot = self.built.install(Mode(mode), self.watch, self.tickets, planner)
        self.pilot = pilot if isinstance(pilot, Pilot) else None

    def run(self, jobs: Sequence[Job], gives_up: int = 0) -> list[Ran]:
        """Play jobs at their times; all are given up after so many plans where `gives_up` says so."""
        return asyncio.run(self._run(jobs, gives_up))

    async def _run(self, jobs: Sequence[Job], gives_up: int) -> list[Ran]:
        start = time.monotonic()
        return list(await asyncio.gather(*(self._play(i, job, start, gives_up) for i, job in enumerate(jobs))))

    async def _play(self, index: int, job: Job, start: float, gives_up: int) -> Ran:
        await asyncio.sleep(max(start + job.at - time.monotonic(), 0))
        request = Request(f"check-{index}", start + job.at, len(job.prompt), (Stage(job.new, job.slo),))
        wish = Generation(request.id, job.prompt, (job.new,), SamplingParams(ignore_eos=True))
        handle = self.built.front.generate(wish, (), self.tickets, Ticket(request))
        if gives_up:
            until = time.monotonic() + PATIENCE_SECONDS
            while self.watch.plans < gives_up and time.monotonic() < until:
                await asyncio.sleep(0.0005)
            handle.abort()
        ran = Ran(job)
        async for fresh in handle.results():
            ran.ids += fresh.token_ids
            ran.times += [time.monotonic() - start] * len(fresh.token_ids)
        return ran

    def prompt(self, tokens: int) -> tuple[int, ...]:
        return tuple(self.chance.randrange(5, self.built.vocab_size) for _ in range(tokens))

    def jobs(self, count: int, prompt: int, new: int) -> list[Job]:
        """Requests at once, of lengths between half and all of `prompt`, as far as the context goes."""
        prompt = max(2, min(prompt, self.built.max_context - new - 1))
        return [Job(0.0, self.prompt(prompt - self.chance.randrange(prompt // 2)), new) for _ in range(count)]


def alike(first: Iterable[Ran], second: Iterable[Ran]) -> float:
    """Share of the tokens that come before two runs of the same jobs begin to differ."""
    same = total = 0
    for one, other in zip(first, second, strict=True):
        pairs = list(zip(one.ids, other.ids, strict=False))
        differs = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        same, total = same + differs, total + max(len(one.ids), len(other.ids), 1)
    return same / max(total, 1)
