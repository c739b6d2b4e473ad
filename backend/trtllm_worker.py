"""What `worker.Worker` is to our own engine, for TensorRT-LLM, which owns its loop.

    submit, cancel, close       any thread: handed to this one
    gate -> generate_async      who goes in next                            trtllm_gate.py
    results -> responder        token ids as they come
    Pilot's decisions           from the engine's thread, handed over

One asyncio loop on one thread owns all jobs. Every submission accepted by `submit` ends in exactly one `finish`
or `fail` at the responder, also when the engine dies: then everything in flight is answered INTERNAL, nothing
more is accepted, and `failed` is called. Token times are those of arrival here, what a caller could have seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from slos_serve.scheduler.core import Advance, Decision, Plan, RequestId, Snapshot, StepReport

from .generation import Generation
from .parked import Parked
from .receipt import Ledger
from .refusal import Refusal
from .responder import Reply
from .roster import Roster
from .sessions import Sessions, round_of
from .tickets import Tickets as OfferTickets
from .trtllm_gate import Gate
from .trtllm_pilot import Ticket
from .worker import BEAT_SECONDS, TICKET_SECONDS, Observer, Voice, ledger_of

if TYPE_CHECKING:
    from .herald import Meter
    from .translate import Submission

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Fresh:
    """What a request gained: new token ids, and a finish reason with the last ones."""

    token_ids: tuple[int, ...]
    finish_reason: str | None = None


class Handle(Protocol):
    """One generation in the engine."""

    @property
    def client_id(self) -> int: ...
    def results(self) -> Any: ...  # an async iterator of Fresh; raises what went wrong
    def abort(self) -> None: ...  # takes effect when it is safe; `results` is read until then
    def restarts(self) -> None: ...  # it was paused, and will be computed again


class Front(Protocol):
    """The engine as its front sees it; `trtllm_front.LlmFront` in the server. Called on the asyncio loop."""

    @property
    def is_alive(self) -> bool: ...
    def generate(self, generation: Generation, already: Sequence[int], tickets: Tickets, ticket: Ticket) -> Handle: ...
    def shutdown(self) -> None: ...


class Tickets(dict[int, Ticket]):
    """What the pilot looks up by the engine's client id. A lookup waits for a submission that is under way.

    The engine names a request when it takes it on, and may schedule it before the name is known here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def get(self, client_id: int, default: Any = None) -> Any:
        found = super().get(client_id)
        if found is None:
            with self.lock:
                found = super().get(client_id, default)
        return found


class EngineMetrics(Observer, Protocol):
    """What is measured besides."""

    def counted(self, kind: str, detail: str) -> None: ...
    def in_mode(self, mode: str) -> None: ...


@dataclass(slots=True, eq=False)
class _Job:
    """One request in flight."""

    reply: Reply
    ledger: Ledger
    output_ids: list[int] = field(default_factory=list)
    handle: Handle | None = None
    stage_left: int = 0
    is_cancelled: bool = False

    @property
    def submission(self) -> Submission:
        return self.reply.submission


class TrtllmWorker:
    """Owns the jobs of one TensorRT-LLM engine, on a thread of its own between `start` and `close`."""

    def __init__(
        self,
        front: Front,
        gate: Gate,
        tickets: Tickets,
        mode: Callable[[], str],
        voice: Voice,
        observer: EngineMetrics,
        roster: Roster,
        sessions: Sessions,
        failed: Callable[[BaseException], None],
        stage_end: int | None = None,
        meter: Meter | None = None,
    ) -> None:
        """`mode` is the pilot's; `failed` is called last of all when the engine died."""
        self._front = front
        self._gate = gate
        self._tickets = tickets
        self._mode = mode
        self._voice = voice
        self._observer = observer
        self._roster = roster
        self._sessions = sessions
        self._failed = failed
        self._stage_end = stage_end
        self._meter = meter
        self.tickets = OfferTickets(TICKET_SECONDS)
        self._jobs: dict[RequestId, _Job] = {}
        self._ids: dict[int, RequestId] = {}
        self._entry = threading.Lock()  # makes "refuse from now on" and "hand over" exclude each other
        self._closed = ""
        self._snapshot = Snapshot(0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._run, name="engine-front", daemon=True)

    # From other threads

    def start(self) -> None:
        self._thread.start()

    def submit(self, reply: Reply) -> None:
        """Take a request on. Raises Refusal when it cannot be taken; then nothing will be said to it here."""
        request = reply.submission.request
        with self._entry:
            if self._closed:
                raise Refusal("UNAVAILABLE", self._closed)
            self._roster.enter(request.id, request.prompt_tokens)
            self._loop.call_soon_threadsafe(self._add, reply)

    def cancel(self, reply: Reply) -> None:
        """Forget a request; nothing happens when it has ended."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._drop, reply)

    def cancel_id(self, request_id: str) -> None:
        """The same by id, for a caller who cannot hang up."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._drop_id, request_id)

    def close(self, drain: float) -> None:
        """Refuse what comes, give what is in flight `drain` seconds to end, then answer it UNAVAILABLE."""
        with self._entry:
            self._closed = self._closed or "the model is being unloaded"
        until = time.monotonic() + drain
        while len(self._roster) and self._thread.is_alive() and time.monotonic() < until:
            time.sleep(0.01)
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop)
            self._thread.join()
        self._front.shutdown()

    # From the engine's thread: `trtllm_pilot.Watcher`

    def stepped(self, plan: Plan, report: StepReport, planning: float) -> None:
        ran = {advance.request_id for advance in report.advances}
        drafted = sum(chunk.draft for chunk in plan.chunks if chunk.request_id in ran)
        self._observer.stepped(plan, report, planning, drafted)

    def event(self, kind: str, detail: str) -> None:
        self._observer.counted(kind, detail)

    def planned(self, plan: Plan, clients: Mapping[RequestId, int]) -> None:
        decisions = [(clients[each.request_id], each) for each in plan.decisions if each.request_id in clients]
        evicted = [clients[name] for name in plan.evicted if name in clients]
        if decisions or evicted:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody is left to be told
                self._loop.call_soon_threadsafe(self._told, decisions, evicted)

    def measured(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    # The loop

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._beat())
        except BaseException as error:
            log.exception("the front of the engine failed with %d requests in flight", len(self._jobs))
            self._die(error)
        finally:
            self._loop.run_until_complete(self._end_tasks())
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())

    async def _beat(self) -> None:
        """Look after the engine a few times a second, until it is time to stop."""
        while self._closed != "stopped":
            if not self._front.is_alive:
                raise RuntimeError("TensorRT-LLM's event loop has ended")
            self._observer.in_mode(self._mode())
            seen = self._seen()
            self._observer.turned(seen)
            if self._meter is not None:
                self._meter.read(seen, (job.ledger for job in self._jobs.values()))
            self._turn()
            await asyncio.sleep(BEAT_SECONDS)

    async def _end_tasks(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _seen(self) -> Snapshot:
        """The planner's numbers, with those added that wait in front of the engine."""
        seen = self._snapshot
        return seen if self._jobs else Snapshot(0, 0, 0, 0, seen.num_blocks, seen.num_blocks, 0, 0, 0, 0)

    def _stop(self) -> None:
        self._end_all(Refusal("UNAVAILABLE", self._closed))
        self._closed = "stopped"

    def _die(self, error: BaseException) -> None:
        with self._entry:
            self._closed = self._closed or "the engine has stopped"
        self._end_all(Refusal("INTERNAL", f"engine: {type(error).__name__}: {error}"))
        self._failed(error)

    def _end_all(self, refusal: Refusal) -> None:
        for job in list(self._jobs.values()):
            self._end(job, "failed" if refusal.code == "INTERNAL" else "unavailable")
            self._voice.fail(job.reply, refusal)

    def _add(self, reply: Reply) -> None:
        request = reply.submission.request
        self._voice.open(reply)
        job = _Job(reply, ledger_of(reply.submission), stage_left=request.stages[0].max_new_tokens)
        self._jobs[request.id] = job
        if self._closed:
            self._end(job, "unavailable")
            self._voice.fail(reply, Refusal("UNAVAILABLE", self._closed))
            return
        if reply.is_offer:  # this engine decides too late to decline
            self._voice.accepted(reply, self.tickets.issue(reply), Parked(self.tickets.seconds))
        self._gate.add(request, request.prompt_tokens)
        self._turn()

    def _drop_id(self, request_id: str) -> None:
        job = self._jobs.get(request_id)
        if job is not None:
            self._drop(job.reply)

    def _drop(self, reply: Reply) -> None:
        job = self._jobs.get(reply.submission.request.id)
        if job is not None and job.reply is reply:
            job.is_cancelled = True
            self._end(job, "cancelled")
            self._voice.finish(reply, (), "cancelled", job.ledger.receipt)
            self._turn()

    def _turn(self) -> None:
        """Let the gate move, and do what it says."""
        turn = self._gate.turn(time.monotonic())
        for decision in turn.decisions:
            self._jobs[decision.request_id].ledger.decide(decision)
        for request_id in turn.withdrawn:
            job = self._jobs[request_id]
            job.ledger.preemptions += 1
            if job.handle is not None:
                handle, job.handle = job.handle, None
                self._forget(handle)
        for request_id in turn.released:
            self._release(self._jobs[request_id])

    def _release(self, job: _Job) -> None:
        generation, request = job.submission.generation, job.submission.request
        ticket = Ticket(request, self._stage_end if len(request.stages) > 1 else None)
        try:
            job.handle = self._front.generate(generation, job.output_ids, self._tickets, ticket)
        except ValueError as error:
            self._end(job, "refused")
            self._voice.fail(job.reply, Refusal("INVALID_ARGUMENT", str(error)))
            return
        job.ledger.run(time.monotonic())
        self._ids[job.handle.client_id] = request.id
        task = self._loop.create_task(self._follow(job, job.handle))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _follow(self, job: _Job, handle: Handle) -> None:
        """Pass on what one generation gives, until it ends or is no longer this job's."""
        try:
            async for fresh in handle.results():
                if job.handle is not handle:
                    return
                self._deliver(job, fresh)
        except Exception as error:
            if job.handle is handle:
                log.warning("request %s failed in the engine", job.submission.request.id, exc_info=error)
                self._end(job, "failed")
                self._voice.fail(job.reply, Refusal("INTERNAL", f"engine: {type(error).__name__}: {error}"))
                self._turn()

    def _deliver(self, job: _Job, fresh: Fresh) -> None:
        request, now = job.submission.request, time.monotonic()
        tokens, reason = self._kept(job, fresh)
        if tokens:
            if not job.output_ids:
                self._roster.prefilled(request.id)
            self._book(job, tokens, now)
            self._gate.grow(request.id, request.prompt_tokens + len(job.output_ids))
        if reason is None:
            if tokens:
                self._voice.tokens(job.reply, tokens)
            return
        prompt, session = job.submission.prompt, request.session
        if session is not None and prompt is not None:
            self._sessions.remember(session, round_of(prompt, job.submission.generation, job.output_ids))
        self._end(job, "finished")
        self._voice.finish(job.reply, tokens, reason, job.ledger.receipt)
        self._turn()

    def _kept(self, job: _Job, fresh: Fresh) -> tuple[tuple[int, ...], str | None]:
        """The tokens up to a stop string, which is looked for here; what comes after it is dropped."""
        stop = job.submission.generation.stop
        if stop is not None:
            for count, token in enumerate(fresh.token_ids, start=1):
                if stop(token):
                    return fresh.token_ids[:count], "stop"
        return fresh.token_ids, fresh.finish_reason

    def _book(self, job: _Job, tokens: Sequence[int], now: float) -> None:
        """Add to the ledger, token by token where a stage may end between them."""
        job.output_ids += tokens
        for token in tokens:
            job.stage_left -= 1
            ended = job.stage_left <= 0 or token == self._stage_end
            stages = job.ledger.request.stages
            turns = ended and len(job.ledger.stage_tokens) < len(stages)
            job.ledger.advance(Advance(job.submission.request.id, 0, 1, 0, turns), now)
            if turns:
                job.stage_left = stages[len(job.ledger.stage_tokens) - 1].max_new_tokens

    def _told(self, decisions: Sequence[tuple[int, Decision]], evicted: Sequence[int]) -> None:
        for client, decision in decisions:
            job = self._jobs.get(self._ids.get(client, ""))
            if job is not None:
                job.ledger.decide(decision)
        for client in evicted:
            job = self._jobs.get(self._ids.get(client, ""))
            if job is not None and job.handle is not None:
                job.ledger.preemptions += 1
                job.handle.restarts()

    def _end(self, job: _Job, outcome: str) -> None:
        """Before the last response is queued: a caller that has it may use the request id again."""
        request_id = job.submission.request.id
        del self._jobs[request_id]
        self._gate.leave(request_id)
        self._roster.leave(request_id)
        self._observer.ended(job.ledger, outcome)
        handle, job.handle = job.handle, None
        if handle is not None:
            self._forget(handle)

    def _forget(self, handle: Handle) -> None:
        """Stop a generation in the engine; one that has ended does not mind."""
        self._ids.pop(handle.client_id, None)
        handle.abort()
        self._tickets.pop(handle.client_id, None)
