"""Plays arrivals against a running server, open loop, and keeps the ledger of how each request ended.

A request is sent when it is due, however slow the server is; how late it really was sent is recorded. A
later round of a session is due `tool_delay` after the round before it has ended. Every request sent ends
in exactly one `Record`; what is still open at the end of the time allowed is recorded as hanging.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, Protocol, TypeAlias

import numpy as np

from slos_serve.client.client import Stream
from slos_serve.client.stream import Duplicated, Refused, Result, StreamError

from . import text
from .workload import Arrival

Outcome: TypeAlias = Literal["done", "refused", "cancelled", "failed", "lost", "duplicated", "hanging"]

# How a request may end without anybody having done wrong.
FAIR_ENDS: Final = frozenset({"done", "refused", "cancelled"})
# The server may say so under load; any other refusal of a valid request is a failure.
LOAD_CODES: Final = frozenset({"OVERLOADED"})


class Caller(Protocol):
    """A client that can start a request, over gRPC or HTTP."""

    def generate(self, prompt: str, *, request_id: str = "", timeout: float | None = None, **fields: Any) -> Stream: ...


@dataclass(frozen=True, slots=True)
class Shot:
    """One request as it will be sent: its new prompt text and the caller that carries it."""

    id: str
    arrival: Arrival
    text: str
    transport: str
    caller: Caller


@dataclass(frozen=True, slots=True)
class Record:
    """How one request ended. Times are monotonic seconds; `result` is there when it was done or cancelled."""

    id: str
    arrival: Arrival
    transport: str
    outcome: Outcome
    due_at: float
    sent_at: float
    result: Result | None = None
    error: str = ""


@dataclass(slots=True)
class Ledger:
    """What was sent and how it ended."""

    sent: set[str] = field(default_factory=set)
    records: list[Record] = field(default_factory=list)

    def open(self, request_id: str) -> None:
        """A request is about to be sent. Raises ValueError for an id that was sent before."""
        if request_id in self.sent:
            raise ValueError(f"request id {request_id!r} was sent before")
        self.sent.add(request_id)

    def close(self, record: Record) -> None:
        """A request has ended."""
        self.records.append(record)

    def faults(self) -> list[str]:
        """One line per request that did not end exactly once and fairly; empty when all is well."""
        ends = Counter(record.id for record in self.records)
        unfair = [
            f"{record.id} ({record.arrival.slo_class}, {record.transport}): {record.outcome} {record.error}"
            for record in self.records
            if record.outcome not in FAIR_ENDS
        ]
        unfair += [f"{request_id}: ended {ends[request_id]} times" for request_id in ends if ends[request_id] > 1]
        return unfair + [f"{request_id}: no end recorded" for request_id in sorted(self.sent - ends.keys())]


def shots(
    arrivals: Sequence[Arrival],
    callers: Sequence[tuple[str, Caller, float]],
    rng: np.random.Generator,
    prefix: str = "",
) -> list[Shot]:
    """Every request's text and way, drawn in the order of the arrivals, so that a seed fixes them.

    `callers` are (name, caller, share of the requests). `prefix` goes before request and session ids, to
    keep apart those of several players of one server.
    """
    shares = np.array([share for _, _, share in callers])
    ways = rng.choice(len(callers), len(arrivals), p=shares / shares.sum()).tolist()
    ready = []
    for number, (arrival, way) in enumerate(zip(arrivals, ways, strict=True)):
        new_tokens = arrival.prompt_tokens - arrival.reusable_prefix_tokens
        new_text = text.prompt(rng, new_tokens, text.style_of(arrival.slo_class))
        session = None if arrival.session is None else prefix + arrival.session
        named = replace(arrival, session=session)
        ready.append(Shot(f"{prefix}{arrival.slo_class}-{number}", named, new_text, *callers[way][:2]))
    return ready


def fields(arrival: Arrival) -> dict[str, Any]:
    """The request fields of an arrival. Its length is kept: the end-of-sequence token does not end it."""
    return {
        "max_tokens": arrival.output_tokens,
        "slo_class": arrival.slo_class,
        "ignore_eos": True,
        "thinking_tokens": arrival.thinking_tokens or None,
        "session_id": arrival.session,
    }


async def play(
    ready: Sequence[Shot],
    *,
    grace: float,
    on_tick: Callable[[Ledger, float], None],
    tick: float = 0.5,
    enough: asyncio.Event | None = None,
) -> Ledger:
    """Send every request when it is due and wait at most `grace` seconds after the last for the ends.

    `on_tick` is called every `tick` seconds with the ledger so far and the seconds since the start.
    Rounds after one that was not done are never sent. Once `enough` is set no new session or single request
    is sent, and the ends are waited for as after the last.
    """
    ledger = Ledger()
    start = time.monotonic()
    enough = enough or asyncio.Event()
    sending = asyncio.create_task(_send(_chains(ready), start, ledger, enough))
    stop_at = start + max((shot.arrival.at for shot in ready), default=0.0) + grace
    try:
        while not sending.done() and time.monotonic() < stop_at:
            if enough.is_set():
                stop_at = min(stop_at, time.monotonic() + grace)
                grace = math.inf
            await asyncio.wait([sending], timeout=tick)
            on_tick(ledger, time.monotonic() - start)
    finally:
        if sending.cancel():
            await asyncio.wait([sending])
    if not sending.cancelled() and (error := sending.exception()):
        raise error
    return ledger


def _chains(ready: Sequence[Shot]) -> list[list[Shot]]:
    """Requests by session, rounds in order; a request without session is a chain of one. By first arrival."""
    chains: dict[str, list[Shot]] = {}
    for shot in ready:
        chains.setdefault(f"session {shot.arrival.session}" if shot.arrival.session else shot.id, []).append(shot)
    ordered = [sorted(chain, key=lambda shot: shot.arrival.round) for chain in chains.values()]
    return sorted(ordered, key=lambda chain: chain[0].arrival.at)


async def _send(chains: Iterable[list[Shot]], start: float, ledger: Ledger, enough: asyncio.Event) -> None:
    running = []
    try:
        for chain in chains:
            with contextlib.suppress(asyncio.TimeoutError):
                due = start + chain[0].arrival.at - time.monotonic()
                await asyncio.wait_for(enough.wait(), due) if due > 0 else await asyncio.sleep(0)
            if enough.is_set():
                break
            running.append(asyncio.create_task(_run_chain(chain, start, ledger)))
        await asyncio.gather(*running)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def _sleep_until(at: float) -> None:
    await asyncio.sleep(max(0.0, at - time.monotonic()))


async def _run_chain(chain: Sequence[Shot], start: float, ledger: Ledger) -> None:
    said, due = "", start
    for shot in chain:
        due = max(start + shot.arrival.at, due + shot.arrival.tool_delay)
        await _sleep_until(due)
        record = await _run_shot(shot, said + shot.text, due, ledger)
        if record.outcome != "done" or record.result is None:
            return
        said += shot.text + record.result.text
        due = time.monotonic()


async def _run_shot(shot: Shot, prompt: str, due: float, ledger: Ledger) -> Record:
    ledger.open(shot.id)
    sent = time.monotonic()

    def ended(outcome: Outcome, result: Result | None = None, error: str = "") -> Record:
        record = Record(shot.id, shot.arrival, shot.transport, outcome, due, sent, result, error)
        ledger.close(record)
        return record

    try:
        result = await shot.caller.generate(prompt, request_id=shot.id, **fields(shot.arrival)).drain()
    except Refused as error:
        return ended("refused" if error.code in LOAD_CODES else "failed", error=str(error))
    except StreamError as error:
        return ended("duplicated" if isinstance(error, Duplicated) else "lost", error=str(error))
    except asyncio.CancelledError:
        ended("hanging", error=f"no end after {time.monotonic() - sent:.1f} s")
        raise
    except Exception as error:
        return ended("failed", error=f"{type(error).__name__}: {error}")
    return ended("cancelled" if result.finish_reason == "cancelled" else "done", result)


async def probe(ready: Sequence[Shot], concurrency: int, seconds: float) -> float:
    """Output tokens per second of a closed loop that keeps `concurrency` of these requests running, again
    and again, for `seconds`; what still runs then is cancelled. One request goes before, to warm up."""
    counts = [0]
    turns = itertools.count()
    await _probe_one(ready, turns, counts)
    tasks = [asyncio.create_task(_loop(ready, turns, counts)) for _ in range(concurrency)]
    await asyncio.wait(tasks, timeout=seconds / 3)  # the first prompts are not yet a steady state
    started_at, counts[0] = time.monotonic(), 0
    done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    rate = counts[0] / (time.monotonic() - started_at)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()
    return rate


async def _loop(ready: Sequence[Shot], turns: Iterator[int], counts: list[int]) -> None:
    while True:
        await _probe_one(ready, turns, counts)


async def _probe_one(ready: Sequence[Shot], turns: Iterator[int], counts: list[int]) -> None:
    number = next(turns)
    shot = ready[number % len(ready)]
    stream = shot.caller.generate(
        shot.text,
        request_id=f"{shot.id}-probe-{number}",
        max_tokens=shot.arrival.output_tokens,
        slo_class="best_effort",
        ignore_eos=True,
    )
    async for delta in stream:
        counts[0] += len(delta.token_ids)
