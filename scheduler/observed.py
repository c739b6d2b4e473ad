"""How long things took in a recorded run: a time model, its noise, and the pauses between steps.

An engine measured alone knows nothing of what else a server does with its cores: reading requests, sending tokens.
A step that serves many carries more of it, so it is fitted from the steps of a run, as a time model is from batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .core import Chunk, StepReport
from .perf import BatchShape, PerfModel, fit, nonnegative_least_squares
from .recording import Added, Call, Cancelled, Planned
from .simulator import Turnaround


@dataclass(frozen=True, slots=True)
class Observed:
    """`perf`: median seconds of a step; `noise`: standard deviation of their logarithm around it."""

    perf: PerfModel
    noise: float
    turnaround: Turnaround


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a run. `pause`: seconds until the next was planned, None where there was nothing to run."""

    shape: BatchShape
    chunks: int
    seconds: float
    pause: float | None = None


def shape_of(chunks: Iterable[Chunk]) -> BatchShape:
    """What the time of these chunks depends on. Of several tokens, or the first of a request, they are prefill."""
    tokens, context, area, draft = 0, 0, 0.0, 0
    for chunk in chunks:
        tokens += chunk.length
        draft = max(draft, chunk.draft)
        if chunk.start > 0 and chunk.length == 1 + chunk.draft:
            context += chunk.start
        else:
            area += chunk.length * (chunk.start + 0.5 * chunk.length)
    return BatchShape(tokens, context, area, draft)


def phase(calls: Sequence[Call], belongs: Callable[[str], bool]) -> Sequence[Call]:
    """The calls from the first request that belongs to the last token of one; none where none does.

    Others may come in between, such as the requests that ask whether a server lives.
    """
    start: int | None = None
    end = 0
    for index, call in enumerate(calls):
        if isinstance(call, Added):
            if start is None and belongs(call.request.id):
                start = index
        elif isinstance(call, StepReport) and any(belongs(advance.request_id) for advance in call.advances):
            end = index + 1
    return [] if start is None else calls[start:end]


def steps(calls: Iterable[Call]) -> list[Step]:
    """Every step of these calls, in order. They begin where no request is live."""
    found: list[Step] = []
    live = 0
    shape, chunks = BatchShape(0), 0
    finished: float | None = None  # of the last step, while there is something to run
    for call in calls:
        if isinstance(call, Added):
            live += 1
        elif isinstance(call, Cancelled):
            live -= 1
        elif isinstance(call, Planned):
            shape, chunks = shape_of(call.plan.chunks), len(call.plan.chunks)
            if not chunks:
                finished = None
        else:
            if finished is not None:
                found[-1] = replace(found[-1], pause=call.started_at - finished)
            if chunks:
                found.append(Step(shape, chunks, call.finished_at - call.started_at))
            live -= sum(advance.done for advance in call.advances)
            finished = call.finished_at if live > 0 and found else None
    return found


def observe(parts: Iterable[Iterable[Call]]) -> Observed:
    """Fit what these parts of a run tell. Raises ValueError when they hold fewer than four steps."""
    found = [step for calls in parts for step in steps(calls) if step.seconds > 0.0]
    perf = fit([step.shape for step in found], [step.seconds for step in found])
    ratios = np.log([step.seconds / perf.seconds(step.shape) for step in found])
    noise = float(np.std(ratios))
    return Observed(perf.scaled(float(np.exp(-0.5 * noise * noise))), noise, _turnaround(found))


def _turnaround(found: Iterable[Step]) -> Turnaround:
    """The line through the pauses over the chunks of the step before; their mean where it would fall."""
    rows = [(1.0, step.chunks, step.pause) for step in found if step.pause is not None]
    if not rows:
        return Turnaround()
    table = np.array(rows, dtype=np.float64)
    return Turnaround(*nonnegative_least_squares(table[:, :2], table[:, 2]).tolist())
