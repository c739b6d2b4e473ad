"""The queue in front of TensorRT-LLM: who goes in next, and who comes out again.

In every mode it keeps more requests out than the engine's list of active ones takes, the most urgent first. In
governor mode it is all there is: it admits by predicted time to first token, bounds how many run at once so that
the tightest pace is kept, and takes a best-effort request back when a promised one finds the engine full. Counts
and seconds only; the same `PerfModel` as the planner's. Not for several threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from slos_serve.scheduler.core import Decision, Request, RequestId
from slos_serve.scheduler.perf import BatchShape, PerfModel


@dataclass(slots=True)
class Entry:
    """One request in front of or in the engine. `tokens` it knows: prompt and what was generated."""

    request: Request
    tokens: int
    is_promised: bool
    order: int

    @property
    def due(self) -> float:
        slo = self.request.stages[0].slo
        return self.request.arrived_at + slo.ttft if slo else math.inf

    @property
    def tpot(self) -> float:
        slo = self.request.stages[0].slo
        return slo.tpot if slo and self.is_promised else math.inf


@dataclass(slots=True)
class Turn:
    """What to do now: send `released` to the engine, take `withdrawn` back, tell `decisions`."""

    released: list[RequestId] = field(default_factory=list)
    withdrawn: list[RequestId] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)


class Gate:
    """Waiting and running requests of one engine."""

    def __init__(
        self, perf: PerfModel, most: int, prefill_seconds: Callable[[int], float], governs: Callable[[], bool]
    ) -> None:
        """`most` requests may be in the engine; `governs` says whether nobody behind the gate decides."""
        self._perf = perf
        self._most = most
        self._prefill_seconds = prefill_seconds
        self._governs = governs
        self._waiting: dict[RequestId, Entry] = {}
        self._running: dict[RequestId, Entry] = {}
        self._order = 0

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def add(self, request: Request, tokens: int) -> None:
        """A request arrives, or comes back with `tokens` known."""
        self._order += 1
        self._waiting[request.id] = Entry(request, tokens, not request.is_best_effort, self._order)

    def grow(self, request_id: RequestId, tokens: int) -> None:
        """It knows so many tokens now."""
        entry = self._running.get(request_id)
        if entry is not None:
            entry.tokens = tokens

    def leave(self, request_id: RequestId) -> bool:
        """It has ended, or was cancelled; whether it was in the engine."""
        self._waiting.pop(request_id, None)
        return self._running.pop(request_id, None) is not None

    def turn(self, now: float) -> Turn:
        """Fill the engine, most urgent first."""
        turn = Turn()
        governs = self._governs()
        for entry in sorted(self._waiting.values(), key=lambda e: (not e.is_promised, e.due, e.order)):
            if governs:
                self._decide(entry, now, turn)
            is_full = len(self._running) >= self._limit(entry, governs)
            if is_full and not (governs and entry.is_promised and self._make_way(turn)):
                break
            del self._waiting[entry.request.id]
            self._running[entry.request.id] = entry
            turn.released.append(entry.request.id)
        return turn

    def _decide(self, entry: Entry, now: float, turn: Turn) -> None:
        """Once per request: can its first token still be in time, if it goes in now?"""
        request = entry.request
        if not entry.is_promised or entry.tokens > request.prompt_tokens:
            return
        prompts = [e.tokens for e in self._running.values() if e.tokens <= e.request.prompt_tokens]
        ahead = sum(map(self._prefill_seconds, prompts))
        fits = now + ahead + self._prefill_seconds(entry.tokens) <= entry.due
        entry.is_promised = fits
        reason = "admitted" if fits else "its first token would be late"
        turn.decisions.append(Decision(request.id, fits, reason))

    def _limit(self, entry: Entry, governs: bool) -> int:
        """How many may run: the engine's bound, and in governor mode what the tightest pace allows."""
        if not governs:
            return self._most
        everybody = [*self._running.values(), entry]
        tightest = min(each.tpot for each in everybody)
        context = sum(each.tokens for each in everybody) / len(everybody)
        low, high = 1, self._most
        while low < high:
            middle = (low + high + 1) // 2
            if self._perf.seconds(BatchShape(middle, int(middle * context))) <= tightest:
                low = middle
            else:
                high = middle - 1
        return low

    def _make_way(self, turn: Turn) -> bool:
        """Take the youngest best-effort request back into the queue; False when there is none."""
        spare = [e for e in self._running.values() if not e.is_promised and e.request.id not in turn.released]
        if not spare:
            return False
        victim = max(spare, key=lambda entry: entry.order)
        del self._running[victim.request.id]
        self._waiting[victim.request.id] = victim
        turn.withdrawn.append(victim.request.id)
        return True
