"""Was the promise kept? The one judge, used by receipts, reports, the simulator and the exam.

Strict rule: output token k of the first stage is due at arrival + TTFT + (k - 1) * TPOT; the tokens of a
later stage go on from the last due time at that stage's TPOT. Every token must be on time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .core import Stage

TOLERANCE = 1e-9  # seconds: absorbs the rounding of sums, nothing else


def due_times(stages: Sequence[Stage], stage_tokens: Sequence[int], arrived_at: float) -> Iterator[float]:
    """When each output token was due, in absolute seconds; infinite where a stage promises nothing.

    `stage_tokens` are the tokens each stage really produced; a stage that ended early hands its pace over.
    """
    due = arrived_at
    first = True
    for stage, count in zip(stages, stage_tokens, strict=False):
        for _ in range(count):
            if stage.slo is None:
                yield float("inf")
            else:
                due += stage.slo.ttft if first else stage.slo.tpot
                yield due
            first = False


def attained(
    stages: Sequence[Stage], stage_tokens: Sequence[int], arrived_at: float, token_times: Sequence[float]
) -> bool:
    """Whether every token came by its due time. A request without SLO or without a token attains nothing."""
    if stages[0].slo is None or not token_times:
        return False
    dues = due_times(stages, stage_tokens, arrived_at)
    return all(at <= due + TOLERANCE for at, due in zip(token_times, dues, strict=True))
