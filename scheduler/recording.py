"""A live run as lines of text, and the proof that the scheduler is a function of its calls.

    recorder = Recorder(planner, header, write)     a planner that writes down each call as it passes it on
    read(lines)                                     the calls again
    replay(recording, planner)                      the first plan that differs, None when all are equal

Everything a decision depends on comes in through `add`, `cancel`, `plan` and `report`, so a replay must make
equal plans, to the last bit of every predicted time, on any machine with the same numpy and arithmetic.
One JSON array a line: a letter for the call, then numbers; requests are numbered in order of arrival. Opens no file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final, TypeAlias

from .core import Advance, Capabilities, Chunk, Decision, Plan, Request, RequestId, Slo, Snapshot, Stage, StepReport
from .engine import Planner
from .perf import PerfModel

VERSION: Final = 1
_ADD, _CANCEL, _PLAN, _REPORT = "a", "c", "p", "r"
_UNKNOWN: Final = -1  # the number of a request that was never added


@dataclass(frozen=True, slots=True)
class Header:
    """What the planner was made from: a name of `POLICIES` and its two arguments."""

    policy: str
    capabilities: Capabilities
    perf: PerfModel

    def to_json(self) -> dict[str, Any]:
        return {
            "recording": VERSION,
            "policy": self.policy,
            "capabilities": asdict(self.capabilities),
            "perf": self.perf.to_json(),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Header:
        if data["recording"] != VERSION:
            raise ValueError(f"recording: must be of version {VERSION}, got {data['recording']!r}")
        return Header(data["policy"], Capabilities(**data["capabilities"]), PerfModel.from_json(data["perf"]))


@dataclass(frozen=True, slots=True)
class Added:
    request: Request
    now: float


@dataclass(frozen=True, slots=True)
class Cancelled:
    request_id: RequestId


@dataclass(frozen=True, slots=True)
class Planned:
    """`plan(now)` gave this."""

    now: float
    plan: Plan


Call: TypeAlias = Added | Cancelled | Planned | StepReport


@dataclass(frozen=True, slots=True)
class Recording:
    """One run from its start: how the planner was made, and every call to it in order."""

    header: Header
    calls: list[Call] = field(default_factory=list)

    @property
    def requests(self) -> list[Request]:
        return [call.request for call in self.calls if isinstance(call, Added)]

    @property
    def plans(self) -> int:
        return sum(isinstance(call, Planned) for call in self.calls)


class Recorder:
    """A planner that passes every call on to `planner` and hands a line about it to `write`, newline included.

    A call is written down before it is passed on (a plan after it was made): what raised is the last line.
    """

    def __init__(self, planner: Planner, header: Header, write: Callable[[str], object]) -> None:
        self._planner = planner
        self._write = write
        self._numbers: dict[RequestId, int] = {}
        self._gone: list[tuple[RequestId, int]] = []  # ended since the last plan: a report may still name them
        self._count = 0
        self._put(header.to_json())

    def add(self, request: Request, now: float) -> None:
        self._numbers[request.id] = self._count
        self._count += 1
        self._put([_ADD, now, _request_fields(request)])
        self._planner.add(request, now)

    def cancel(self, request_id: RequestId) -> bool:
        number = self._numbers.get(request_id)
        if number is not None:
            self._gone.append((request_id, number))
            self._put([_CANCEL, number])
        return self._planner.cancel(request_id)

    def plan(self, now: float) -> Plan:
        plan = self._planner.plan(now)
        self._forget()
        numbers = self._numbers
        chunks = [[numbers[chunk.request_id], chunk.start, chunk.length, chunk.draft] for chunk in plan.chunks]
        decisions = [[numbers[each.request_id], int(each.admitted), each.reason] for each in plan.decisions]
        evicted = [numbers[name] for name in plan.evicted]
        self._put([_PLAN, now, chunks, evicted, decisions, plan.predicted, plan.wake_at])
        return plan

    def report(self, report: StepReport) -> None:
        rows = []
        for each in report.advances:
            number = self._numbers.get(each.request_id, _UNKNOWN)
            rows.append([number, each.computed, each.new_tokens, each.accepted, int(each.stage_ended), int(each.done)])
            if each.done:
                self._gone.append((each.request_id, number))
        self._put([_REPORT, report.started_at, report.finished_at, rows, report.free_blocks, report.shared_blocks])
        self._planner.report(report)

    def snapshot(self) -> Snapshot:
        return self._planner.snapshot()

    def _forget(self) -> None:
        for request_id, number in self._gone:
            if self._numbers.get(request_id) == number:  # else the id is in use again
                del self._numbers[request_id]
        self._gone.clear()

    def _put(self, line: object) -> None:
        self._write(json.dumps(line, separators=(",", ":")) + "\n")


def _request_fields(request: Request) -> dict[str, Any]:
    """The fields that are not at their defaults."""
    changed = {each.name: getattr(request, each.name) for each in fields(Request)}
    changed = {each.name: changed[each.name] for each in fields(Request) if changed[each.name] != each.default}
    stages = [[each.max_new_tokens, *((each.slo.ttft, each.slo.tpot) if each.slo else ())] for each in request.stages]
    return {**changed, "stages": stages}


def _request(data: Mapping[str, Any]) -> Request:
    stages = tuple(Stage(most, Slo(*slo) if slo else None) for most, *slo in data["stages"])
    return Request(**{**data, "stages": stages})


def read(lines: Iterable[str]) -> list[Recording]:
    """The recordings of one text: each header begins one. A last line without its end is left out.

    Raises ValueError naming the line of what is no recording.
    """
    recordings: list[Recording] = []
    ids: list[RequestId] = []
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):
            break
        try:
            data = json.loads(line)
            if isinstance(data, dict):
                recordings.append(Recording(Header.from_json(data)))
                ids = []
            else:
                recordings[-1].calls.append(_call(data, ids))
        except (ValueError, TypeError, LookupError) as error:
            raise ValueError(f"line {number} is not of a recording: {type(error).__name__}: {error}") from error
    return recordings


def _call(data: Sequence[Any], ids: list[RequestId]) -> Call:
    """One call; `ids` are those of the requests so far, and grow."""
    kind, *rest = data
    if kind == _ADD:
        request = _request(rest[1])
        ids.append(request.id)
        return Added(request, rest[0])
    if kind == _CANCEL:
        return Cancelled(ids[rest[0]])
    if kind == _PLAN:
        now, chunks, evicted, decisions, predicted, wake_at = rest
        return Planned(
            now,
            Plan(
                tuple(Chunk(ids[at], *numbers) for at, *numbers in chunks),
                tuple(ids[at] for at in evicted),
                tuple(Decision(ids[at], bool(admitted), reason) for at, admitted, reason in decisions),
                predicted,
                wake_at,
            ),
        )
    if kind != _REPORT:
        raise ValueError(f"call: must be one of a, c, p, r, got {kind!r}")
    started_at, finished_at, rows, free_blocks, shared_blocks = rest
    advances = tuple(
        Advance(ids[at], computed, new, accepted, bool(ended), bool(done))
        for at, computed, new, accepted, ended, done in rows
        if at != _UNKNOWN
    )
    return StepReport(started_at, finished_at, advances, free_blocks, shared_blocks)


@dataclass(frozen=True, slots=True)
class Difference:
    """The plan number `index` (from 0) of a recording, made at `now`, and what the replay made of it."""

    index: int
    now: float
    recorded: Plan
    replayed: Plan


def replay(recording: Recording, planner: Planner) -> Difference | None:
    """Make the same calls to a fresh planner; the first plan that differs, None when all are equal."""
    index = 0
    for call in recording.calls:
        if isinstance(call, Added):
            planner.add(call.request, call.now)
        elif isinstance(call, Cancelled):
            planner.cancel(call.request_id)
        elif isinstance(call, StepReport):
            planner.report(call)
        else:
            plan = planner.plan(call.now)
            if plan != call.plan:
                return Difference(index, call.now, call.plan, plan)
            index += 1
    return None
