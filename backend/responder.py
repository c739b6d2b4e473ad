"""Sends what the engine thread produced, on threads of its own, and notices callers that are gone.

One send is a round trip of about a tenth of a millisecond into the server, so the engine thread only
queues, a few lanes send, and a lane joins all tokens that wait for a request into one response. All events
of a request pass through one lane, in order, so its text decoder and its outlet need no lock.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

import numpy as np

from slos_serve.client.wire import Array

from .parked import Parked
from .refusal import Refusal

if TYPE_CHECKING:
    from .translate import Submission

log = logging.getLogger(__name__)

Receipt: TypeAlias = Callable[[], Mapping[str, Any]]

POLL_SECONDS: Final = 0.1
TOGETHER_SECONDS: Final = 0.02


class Outlet(Protocol):
    """The way back to one caller. After a final `send` or a `fail` it is closed for good."""

    @property
    def is_closed(self) -> bool: ...
    def send(self, tensors: Mapping[str, Array], *, final: bool) -> None: ...
    def fail(self, refusal: Refusal) -> None: ...
    def is_cancelled(self) -> bool: ...


@dataclass(slots=True, eq=False)
class Reply:
    """What is still to be said to one caller, who waits until `deadline` (monotonic seconds)."""

    submission: Submission
    outlet: Outlet
    deadline: float = math.inf
    lane: int = 0
    ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    token_index: int = 0
    finish_reason: str | None = None
    receipt: Receipt | None = None
    is_abandoned: bool = False
    is_offer: bool = False  # answered with a ticket, with which somebody will claim the stream
    hold_until: float = 0.0  # monotonic seconds until which tokens wait for others

    def __post_init__(self) -> None:
        self.token_index = self.submission.generation.resumed

    def push(self, ids: Sequence[int]) -> None:
        """Add tokens to what waits."""
        if not self.token_index and not self.ids and self.submission.echo:
            self.text.append(self.submission.echo)  # not when resumed: token_index counts what was delivered
        self.ids += ids
        self.text += map(self.submission.text.push, ids)

    def flush(self) -> None:
        """Send what waits, if the caller wants it now and there is any."""
        final = self.finish_reason is not None
        if final:
            self.text.append(self.submission.text.flush())
        text = "".join(self.text)
        if final or (self.submission.streaming and (text or (self.submission.return_token_ids and self.ids))):
            self.hold_until = self._hold_until(time.monotonic())
            tensors = self._tensors(text)
            self.ids, self.text = [], []
            self.outlet.send(tensors, final=final)

    def _hold_until(self, now: float) -> float:
        """Until when the next tokens may wait for others: never beyond three quarters of the way to their due time."""
        coalesce = self.submission.coalesce
        if not coalesce:
            return 0.0
        slo = self.submission.request.stages[0].slo
        if slo is None:
            return now + coalesce
        sent = self.token_index + len(self.ids) - self.submission.generation.resumed
        due = self.submission.request.arrived_at + slo.ttft + sent * slo.tpot
        return min(now + coalesce, due - 0.25 * slo.tpot)

    def _tensors(self, text: str) -> dict[str, Array]:
        self.token_index += len(self.ids)
        tensors: dict[str, Array] = {
            "text_output": np.array([text.encode("utf-8", "replace")], dtype=np.object_),
            "token_index": np.array([self.token_index], dtype=np.int32),
        }
        if self.submission.return_token_ids:
            tensors["output_ids"] = np.array(self.ids, dtype=np.int32)
        if self.finish_reason is not None:
            tensors["finish_reason"] = np.array([self.finish_reason.encode()], dtype=np.object_)
            receipt = self.receipt() if self.receipt is not None else None
            tensors["receipt"] = np.array([json.dumps(receipt).encode()], dtype=np.object_)
        return tensors


@dataclass(frozen=True, slots=True)
class Opened:
    """The engine thread has taken the request."""

    reply: Reply


@dataclass(frozen=True, slots=True)
class Tokens:
    """New tokens; with a finish reason and a receipt they are the last."""

    reply: Reply
    ids: Sequence[int]
    finish_reason: str | None = None
    receipt: Receipt | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """No more tokens, an error instead."""

    reply: Reply
    refusal: Refusal


@dataclass(frozen=True, slots=True)
class Accepted:
    """The request, which was offered, will be served: whoever has this ticket may claim its stream."""

    reply: Reply
    ticket: str
    parked: Parked


@dataclass(frozen=True, slots=True)
class Claimed:
    """Somebody came with the ticket."""

    reply: Reply
    outlet: Outlet


Event = Opened | Tokens | Failed | Accepted | Claimed


class Lane(threading.Thread):
    """One sender thread. `gone` is told the reply whose caller cancelled or went away."""

    def __init__(self, name: str, gone: Callable[[Reply], None]) -> None:
        super().__init__(name=name, daemon=True)
        self.events: SimpleQueue[Event | None] = SimpleQueue()
        self._gone = gone
        self._open: set[Reply] = set()
        self._held: dict[Reply, None] = {}  # tokens wait for others, the first of them until `_due`
        self._due = 0.0
        self._now = 0.0
        self._poll_at = 0.0

    def run(self) -> None:
        running = True
        while running:
            events = self._take()
            running = None not in events
            waiting: dict[Reply, None] = {}
            self._now = time.monotonic()
            for event in events:
                if event is not None:
                    self._apply(event, waiting)
            if self._held and (self._now >= self._due or not running):
                self._release(waiting, math.inf if not running else self._now + TOGETHER_SECONDS)
            for reply in waiting:
                self._guarded(reply, reply.flush)
            self._poll()

    def _take(self) -> list[Event | None]:
        """All events that wait; at least one, or none after the poll interval or when held tokens are to go."""
        events: list[Event | None] = []
        timeout = POLL_SECONDS if self._open else None
        if self._held:
            timeout = min(max(self._due - time.monotonic(), 0.0), POLL_SECONDS)
        try:
            events.append(self.events.get(timeout=timeout))
            while True:
                events.append(self.events.get_nowait())
        except Empty:
            return events

    def _release(self, waiting: dict[Reply, None], until: float) -> None:
        """Let go what was held long enough, and a little early what would be next: fewer wake-ups."""
        for reply in [reply for reply in self._held if reply.hold_until <= until]:
            del self._held[reply]
            if not reply.outlet.is_closed:
                waiting[reply] = None
        self._due = min((reply.hold_until for reply in self._held), default=0.0)

    def _apply(self, event: Event, waiting: dict[Reply, None]) -> None:
        reply = event.reply
        if isinstance(event, Opened):
            self._open.add(reply)
        elif isinstance(event, Claimed):
            self._claim(reply, event.outlet)
        elif reply.outlet.is_closed:
            return
        elif isinstance(event, Accepted):
            self._guarded(reply, lambda: reply.outlet.send(_control({"ticket": event.ticket}), final=True))
            reply.outlet = event.parked
            self._open.add(reply)
        elif isinstance(event, Failed):
            waiting.pop(reply, None)
            self._held.pop(reply, None)
            self._guarded(reply, reply.flush)
            self._guarded(reply, lambda: reply.outlet.fail(event.refusal))
        else:
            self._guarded(reply, lambda: reply.push(event.ids))
            reply.finish_reason, reply.receipt = event.finish_reason, event.receipt
            if event.finish_reason is not None or self._now >= reply.hold_until:
                waiting[reply] = None
                self._held.pop(reply, None)
            elif reply not in self._held:
                self._due = min(self._due, reply.hold_until) if self._held else reply.hold_until
                self._held[reply] = None

    def _claim(self, reply: Reply, outlet: Outlet) -> None:
        """What was said meanwhile goes first; a ticket that expired is refused."""
        parked = reply.outlet
        if not isinstance(parked, Parked) or parked.is_closed:
            outlet.fail(Refusal("UNAVAILABLE", "ticket: it has expired"))
            return
        reply.outlet = outlet
        self._open.add(reply)
        for tensors, final in parked.said:
            if not outlet.is_closed:
                self._guarded(reply, lambda t=tensors, f=final: outlet.send(t, final=f))  # type: ignore[misc]
        refusal = parked.refusal
        if refusal is not None and not outlet.is_closed:
            self._guarded(reply, lambda: outlet.fail(refusal))

    def _guarded(self, reply: Reply, act: Callable[[], None]) -> None:
        """Run `act`; a response that cannot be made or sent ends its own request only."""
        try:
            act()
        except Exception as error:
            log.exception("request %s: response failed", reply.submission.request.id)
            if not reply.outlet.is_closed:
                reply.outlet.fail(Refusal("INTERNAL", f"the response could not be sent: {error}"))
            self._abandon(reply)
        if reply.outlet.is_closed:
            self._open.discard(reply)

    def _poll(self) -> None:
        now = time.monotonic()
        if now < self._poll_at:
            return
        self._poll_at = now + POLL_SECONDS
        for reply in list(self._open):
            if reply.is_abandoned or reply.outlet.is_closed:
                continue
            if now >= reply.deadline or reply.outlet.is_cancelled():
                self._abandon(reply)

    def _abandon(self, reply: Reply) -> None:
        if not reply.is_abandoned:
            reply.is_abandoned = True
            self._gone(reply)
        if isinstance(reply.outlet, Parked) and reply.outlet.has_ended:  # nobody is left to end it
            reply.outlet.close()
            self._open.discard(reply)


def _control(values: Mapping[str, Any]) -> dict[str, Array]:
    return {"control_output": np.array([json.dumps(values).encode()], dtype=np.object_)}


class Responder:
    """The lanes. Everything but `start`, `claim` and `close` is called by the engine thread."""

    def __init__(self, lanes: int) -> None:
        self._count = lanes
        self._lanes: list[Lane] = []
        self._turn = itertools.count()

    def start(self, gone: Callable[[Reply], None]) -> None:
        self._lanes = [Lane(f"sender-{index}", gone) for index in range(self._count)]
        for lane in self._lanes:
            lane.start()

    def open(self, reply: Reply) -> None:
        """From now on the caller is watched; must come before the reply's other events."""
        reply.lane = next(self._turn) % self._count
        self._put(Opened(reply))

    def tokens(self, reply: Reply, ids: Sequence[int]) -> None:
        self._put(Tokens(reply, ids))

    def finish(self, reply: Reply, ids: Sequence[int], reason: str, receipt: Receipt) -> None:
        """`receipt` is called by the sender: what it reads must no longer change."""
        self._put(Tokens(reply, ids, reason, receipt))

    def fail(self, reply: Reply, refusal: Refusal) -> None:
        self._put(Failed(reply, refusal))

    def accepted(self, reply: Reply, ticket: str, parked: Parked) -> None:
        self._put(Accepted(reply, ticket, parked))

    def claim(self, reply: Reply, outlet: Outlet) -> None:
        """From Triton's thread: the stream of a parked reply goes to `outlet` from now on."""
        self._put(Claimed(reply, outlet))

    def close(self, timeout: float) -> None:
        """Send what is queued and end the threads, waiting at most `timeout` seconds."""
        for lane in self._lanes:
            lane.events.put(None)
        until = time.monotonic() + timeout
        for lane in self._lanes:
            lane.join(max(0.0, until - time.monotonic()))

    def _put(self, event: Event) -> None:
        self._lanes[event.reply.lane].events.put(event)
