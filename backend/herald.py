"""Tells whoever watches how busy this instance is, a few times a second.

The engine thread leaves its latest load here; one thread of its own sends it. So a watcher can tell a busy
engine (loads go on coming, `engine_age` grows) from a frozen or dead process (nothing comes). A watch ends by
itself after `WATCH_SECONDS`, since Triton cannot unload a model while a request is open; the next one is
refused while the server is going down.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import numpy as np

from slos_serve.scheduler.core import Capabilities, Snapshot
from slos_serve.scheduler.dispatch import Ask, Fleet, Load, load_of, predict
from slos_serve.scheduler.perf import BatchShape

from .receipt import Ledger
from .responder import Outlet

log = logging.getLogger(__name__)

PUSH_SECONDS: Final = 0.1
WATCH_SECONDS: Final = 2.0
TOLD_SECONDS: Final = 0.5  # the end of a session's round is told so long, to watchers that missed a message too


class Meter:
    """Reads the load of this instance; used by the engine thread, read by others."""

    def __init__(self, capabilities: Capabilities, seconds: Callable[[BatchShape], float]) -> None:
        """`seconds` is the time of a batch as learned so far."""
        self._capabilities = capabilities
        self._seconds = seconds
        self.load = Load()
        self.read_at = time.monotonic()
        self._rounds: deque[tuple[float, str, int]] = deque(maxlen=512)
        self.predicted_ttft(1)  # compiled now, not by the engine thread when it first declines

    def read(self, snapshot: Snapshot, ledgers: Iterable[Ledger]) -> Load:
        """The load now, of the requests in flight. One that was declined has no promise any more."""
        queued = context = 0
        tightest = float("inf")
        for ledger in ledgers:
            request = ledger.request
            promised = not request.is_best_effort and (ledger.admitted or not ledger.is_decided)
            if ledger.token_times:
                context += request.prompt_tokens + len(ledger.token_times)
            elif promised:
                queued += request.prompt_tokens - ledger.cached_tokens
            slo = request.stages[len(ledger.stage_tokens) - 1].slo
            if promised and slo is not None:
                tightest = min(tightest, slo.tpot)
        self.load = load_of(
            snapshot,
            self._capabilities,
            self._seconds,
            queued_tokens=queued,
            decode_context=context,
            tightest=tightest,
        )
        self.read_at = time.monotonic()
        return self.load

    def round_ended(self, session: str, tokens: int) -> None:
        """The cache holds so many tokens of a session whose round has just ended."""
        self._rounds.append((time.monotonic(), session, tokens))

    def rounds(self) -> dict[str, int]:
        """Sessions whose rounds ended here in the last `TOLD_SECONDS`, with their tokens."""
        since = time.monotonic() - TOLD_SECONDS
        return {session: tokens for at, session, tokens in tuple(self._rounds) if at >= since}

    def predicted_ttft(self, prompt_tokens: int) -> float:
        """Seconds until the first token of a best-effort request of so many tokens."""
        fleet = Fleet(["here"])
        fleet.tell("here", self.load)
        return float(predict(fleet, Ask(float(prompt_tokens)))[0])


class Herald(threading.Thread):
    """Sends the load to every watcher until its watch is over. `facts` go with every message."""

    def __init__(self, meter: Meter, facts: Mapping[str, Any]) -> None:
        super().__init__(name="herald", daemon=True)
        self._meter = meter
        self._facts = dict(facts)
        self._watchers: list[tuple[Outlet, float]] = []
        self._lock = threading.Lock()
        self._woken = threading.Event()
        self._closing = False

    def watch(self, outlet: Outlet) -> None:
        """Somebody watches; the first message goes at once."""
        with self._lock:
            self._watchers.append((outlet, time.monotonic() + WATCH_SECONDS))
        self._woken.set()

    def close(self) -> None:
        """End every watch and the thread."""
        self._closing = True
        self._woken.set()
        if self.is_alive():
            self.join()

    def run(self) -> None:
        while True:
            self._woken.wait(PUSH_SECONDS if self._watchers else None)
            self._woken.clear()
            closing = self._closing
            with self._lock:
                watchers, self._watchers = self._watchers, []
            tensors = self._message(closing)
            now = time.monotonic()
            kept = [each for each in watchers if self._send(each[0], tensors, closing or now >= each[1])]
            with self._lock:
                self._watchers += kept
            if closing:
                return

    def _message(self, closing: bool) -> dict[str, Any]:
        state = {
            **self._facts,
            "load": self._meter.load.to_json(),
            "engine_age": round(time.monotonic() - self._meter.read_at, 3),
            "draining": closing,
            "sessions": self._meter.rounds(),
        }
        return {"control_output": np.array([json.dumps(state).encode()], dtype=np.object_)}

    def _send(self, outlet: Outlet, tensors: Mapping[str, Any], final: bool) -> bool:
        """Whether it goes on watching."""
        try:
            outlet.send(tensors, final=final)
        except Exception:
            log.exception("a watcher could not be told")
            return False
        return not final
