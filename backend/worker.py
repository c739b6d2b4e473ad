"""The engine thread: the only one that touches scheduler and engine.

    inbox -> add, cancel        other threads only put messages there
    plan -> step -> report      one iteration
    engine.outputs -> responder

Every submission accepted by `submit` ends in exactly one `finish` or `fail` at the responder, also when the
engine raises: then everything in flight is answered INTERNAL, nothing more is accepted, and `failed` is called.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Final, Protocol

from slos_serve.scheduler.core import Plan, Snapshot, StepReport
from slos_serve.scheduler.engine import Engine, Planner

from .generation import Generation, Output
from .parked import Parked
from .receipt import Ledger
from .refusal import Refusal
from .responder import Receipt, Reply
from .roster import Roster
from .sessions import Sessions, round_of
from .tickets import Tickets
from .turns import take_long_turns

if TYPE_CHECKING:
    from .herald import Meter
    from .translate import Submission

log = logging.getLogger(__name__)

BEAT_SECONDS: Final = 0.1
TICKET_SECONDS: Final = 2.0


class ServingEngine(Engine, Protocol):
    """An engine that serves: it remembers token ids and gives back what it generated.

    `add` takes a request and returns how many of its prompt tokens have their KV already (pinned for it);
    it raises ValueError for a request that it cannot run. `outputs` are the new tokens of the last step,
    each request at most once; one with a finish reason (stop, length or error) is the last of its request.
    """

    def add(self, generation: Generation) -> int: ...
    @property
    def outputs(self) -> Sequence[Output]: ...


class Voice(Protocol):
    """Where the answers go; `Responder` in the server."""

    def open(self, reply: Reply) -> None: ...
    def tokens(self, reply: Reply, ids: Sequence[int]) -> None: ...
    def finish(self, reply: Reply, ids: Sequence[int], reason: str, receipt: Receipt) -> None: ...
    def fail(self, reply: Reply, refusal: Refusal) -> None: ...
    def accepted(self, reply: Reply, ticket: str, parked: Parked) -> None: ...


class Observer(Protocol):
    """What is measured; `Metrics` in the server. Called by the engine thread, so each call must be cheap."""

    def turned(self, snapshot: Snapshot) -> None: ...  # a sign of life, a few times a second
    def stepped(self, plan: Plan, report: StepReport, planning: float, drafted: int) -> None: ...
    def ended(self, ledger: Ledger, outcome: str) -> None: ...


@dataclass(slots=True, eq=False)
class Job:
    """One request in flight, as the engine thread sees it."""

    reply: Reply
    ledger: Ledger
    output_ids: list[int]
    is_settled: bool = False  # taken on for good: it can no longer be declined

    @property
    def submission(self) -> Submission:
        return self.reply.submission


@dataclass(frozen=True, slots=True)
class _Cancel:
    reply: Reply


@dataclass(frozen=True, slots=True)
class _CancelId:
    request_id: str


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


def ledger_of(submission: Submission) -> Ledger:
    """A new ledger, with what another instance delivered before already in it."""
    resumed = submission.resumed
    if resumed is None:
        return Ledger(submission.request)
    times = list(resumed.token_times)
    ledger = Ledger(resumed.asked, token_times=times, resumed_tokens=len(times))
    ledger.stage_tokens = list(resumed.stage_tokens)
    return ledger


class Worker:
    """Owns one scheduler and one engine, on a thread of its own between `start` and `close`."""

    def __init__(
        self,
        scheduler: Planner,
        engine: ServingEngine,
        voice: Voice,
        observer: Observer,
        roster: Roster,
        sessions: Sessions,
        failed: Callable[[BaseException], None],
        meter: Meter | None = None,
    ) -> None:
        """`failed` is called on the engine thread, last of all, when the engine or the scheduler raised.

        With a `meter` the load is read at every beat, and what is declined gets a prediction.
        """
        self._scheduler = scheduler
        self._engine = engine
        self._voice = voice
        self._observer = observer
        self._roster = roster
        self._sessions = sessions
        self._failed = failed
        self._meter = meter
        self.tickets = Tickets(TICKET_SECONDS)
        self._inbox: SimpleQueue[Reply | _Cancel | _CancelId | _Stop] = SimpleQueue()
        self._jobs: dict[str, Job] = {}
        self._gate = threading.Lock()  # makes "refuse from now on" and "put in the inbox" exclude each other
        self._closed = ""  # why nothing more is accepted
        self._idle_until = 0.0
        self._beat_at = 0.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, reply: Reply) -> None:
        """Take a request on. Raises Refusal when it cannot be taken; then nothing will be said to it here."""
        request = reply.submission.request
        with self._gate:
            if self._closed:
                raise Refusal("UNAVAILABLE", self._closed)
            self._roster.enter(request.id, request.prompt_tokens)
            self._inbox.put(reply)

    def cancel(self, reply: Reply) -> None:
        """Forget a request within one iteration; nothing happens when it has ended."""
        self._inbox.put(_Cancel(reply))

    def cancel_id(self, request_id: str) -> None:
        """The same by id, for a caller who cannot hang up; nothing happens when there is none such."""
        self._inbox.put(_CancelId(request_id))

    def close(self, drain: float) -> None:
        """Refuse what comes, give what is in flight `drain` seconds to end, then answer it UNAVAILABLE."""
        with self._gate:
            self._closed = self._closed or "the model is being unloaded"
        until = time.monotonic() + drain
        while len(self._roster) and self._thread.is_alive() and time.monotonic() < until:
            time.sleep(0.01)
        self._inbox.put(_Stop())
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        take_long_turns()  # what waits for this thread takes microseconds, what it computes milliseconds
        try:
            while self._take():
                self._iterate()
        except BaseException as error:
            log.exception("the engine thread failed with %d requests in flight", len(self._jobs))
            self._end_all(Refusal("INTERNAL", f"engine: {type(error).__name__}: {error}"))
            self._failed(error)

    def _end_all(self, refusal: Refusal) -> None:
        """Answer everything in flight with `refusal`, what is still in the inbox too, and accept nothing more."""
        with self._gate:
            self._closed = self._closed or "the engine has stopped"
        for message in self._waiting():
            if isinstance(message, Reply):
                self._jobs[message.submission.request.id] = self._job(message)
        for job in list(self._jobs.values()):
            self._remove(job, "failed" if refusal.code == "INTERNAL" else "unavailable")
            self._voice.fail(job.reply, refusal)

    def _take(self) -> bool:
        """Handle all messages, waiting for one when nothing can run. False: stop."""
        while True:
            for message in self._waiting():
                self._idle_until = 0.0
                if isinstance(message, Reply):
                    self._add(message)
                elif isinstance(message, _Cancel):
                    self._drop(message.reply)
                elif isinstance(message, _CancelId):
                    if message.request_id in self._jobs:
                        self._drop(self._jobs[message.request_id].reply)
                else:
                    self._end_all(Refusal("UNAVAILABLE", self._closed))
                    return False
            now = time.monotonic()
            if now >= self._beat_at:
                self._beat_at = now + BEAT_SECONDS
                self._beat()
            if now >= self._idle_until:
                return True

    def _beat(self) -> None:
        snapshot = self._scheduler.snapshot()
        self._observer.turned(snapshot)
        if self._meter is not None:
            self._meter.read(snapshot, (job.ledger for job in self._jobs.values()))

    def _waiting(self) -> Iterator[Reply | _Cancel | _CancelId | _Stop]:
        """The messages in the inbox; while idle, waits for the first one, but no longer than a heartbeat."""
        idle = min(self._idle_until - time.monotonic(), BEAT_SECONDS)
        try:
            yield self._inbox.get(timeout=idle) if idle > 0 else self._inbox.get_nowait()
            while True:
                yield self._inbox.get_nowait()
        except Empty:
            return

    def _job(self, reply: Reply) -> Job:
        self._voice.open(reply)
        return Job(reply, ledger_of(reply.submission), [])

    def _add(self, reply: Reply) -> None:
        job = self._job(reply)
        request = reply.submission.request
        self._jobs[request.id] = job
        try:
            cached = self._engine.add(reply.submission.generation)
        except ValueError as error:
            self._remove(job, "refused")
            self._voice.fail(reply, Refusal("INVALID_ARGUMENT", str(error)))
            return
        job.ledger.cached_tokens = cached
        self._scheduler.add(replace(request, cached_tokens=cached) if cached else request, time.monotonic())

    def _drop(self, reply: Reply) -> None:
        job = self._jobs.get(reply.submission.request.id)
        if job is not None and job.reply is reply:  # else it has ended, and its id may be in use again
            self._scheduler.cancel(reply.submission.request.id)
            self._engine.release(reply.submission.request.id)
            self._remove(job, "cancelled")
            self._voice.finish(reply, (), "cancelled", job.ledger.receipt)

    def _iterate(self) -> None:
        started = time.monotonic()
        plan = self._scheduler.plan(started)
        plan = replace(plan, chunks=tuple(plan.chunks))  # records made once, for all who read them here
        planned = time.monotonic()
        declined = []
        for decision in plan.decisions:
            job = self._jobs[decision.request_id]
            job.ledger.decide(decision)
            if not job.is_settled and not self._settle(job):
                declined.append(job)
        is_idle = not plan.chunks and not plan.evicted
        if declined:
            plan = self._without(plan, declined)
        if is_idle:
            # With requests in flight, ask again soon whatever the plan says: nobody may wait for ever.
            self._idle_until = min(plan.wake_at, planned + BEAT_SECONDS) if self._jobs else math.inf
            return
        for request_id in plan.evicted:
            self._jobs[request_id].ledger.preemptions += 1
        for chunk in plan.chunks:
            self._jobs[chunk.request_id].ledger.run(planned)
        report = self._engine.step(plan, planned)
        self._scheduler.report(report)
        drafted = sum(output.drafted for output in self._engine.outputs)
        self._observer.stepped(plan, report, planned - started, drafted)
        self._deliver(report)

    def _settle(self, job: Job) -> bool:
        """The first verdict on a request: False where it may be declined and cannot be promised."""
        if job.submission.may_decline and not job.ledger.admitted and not job.ledger.request.is_best_effort:
            return False
        self._take_on(job)
        return True

    def _take_on(self, job: Job) -> None:
        """From now on it will be served; one that was offered is answered with a ticket."""
        job.is_settled = True
        if job.reply.is_offer:
            parked = Parked(self.tickets.seconds)
            self._voice.accepted(job.reply, self.tickets.issue(job.reply), parked)

    def _without(self, plan: Plan, declined: Sequence[Job]) -> Plan:
        """Decline these, and the plan without them."""
        gone = {job.ledger.request.id for job in declined}
        for job in declined:
            if self._meter is not None:
                job.ledger.predicted_ttft = self._meter.predicted_ttft(job.submission.request.prompt_tokens)
            self._scheduler.cancel(job.ledger.request.id)
            self._engine.release(job.ledger.request.id)
            self._remove(job, "declined")
            self._voice.finish(job.reply, (), "declined", job.ledger.receipt)
        chunks = tuple(chunk for chunk in plan.chunks if chunk.request_id not in gone)
        return replace(plan, chunks=chunks, evicted=tuple(name for name in plan.evicted if name not in gone))

    def _deliver(self, report: StepReport) -> None:
        for advance in report.advances:
            job = self._jobs[advance.request_id]
            if advance.new_tokens and not job.output_ids:
                self._roster.prefilled(advance.request_id)
                if not job.is_settled:  # a policy that gives no verdict before the first token
                    self._take_on(job)
            job.ledger.advance(advance, report.finished_at)
        for output in self._engine.outputs:
            job = self._jobs[output.request_id]
            job.ledger.drafted += output.drafted
            job.output_ids += output.token_ids
            if output.finish_reason is None:
                self._voice.tokens(job.reply, output.token_ids)
            elif output.finish_reason == "error":
                self._remove(job, "failed")
                self._voice.fail(job.reply, Refusal("INTERNAL", "model: the logits are not numbers"))
            else:
                self._remember(job)
                self._remove(job, "finished")
                self._voice.finish(job.reply, output.token_ids, output.finish_reason, job.ledger.receipt)

    def _remember(self, job: Job) -> None:
        session, prompt = job.ledger.request.session, job.submission.prompt
        if session is None:
            return
        if self._meter is not None:
            self._meter.round_ended(session, job.ledger.request.prompt_tokens + len(job.output_ids))
        if prompt is not None:
            self._sessions.remember(session, round_of(prompt, job.submission.generation, job.output_ids))

    def _remove(self, job: Job, outcome: str) -> None:
        """Before the last response is queued: a caller that has it may use the request id again."""
        del self._jobs[job.ledger.request.id]
        self._roster.leave(job.ledger.request.id)
        self._observer.ended(job.ledger, outcome)
