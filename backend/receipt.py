"""What one request was promised and what it got: kept by the engine thread as counts and times.

Token times are when the engine finished them; sending them is not included. Whether a promise was kept
is decided by `scheduler.attainment` alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from slos_serve.scheduler.attainment import attained, due_times
from slos_serve.scheduler.core import Advance, Decision, Request, Stage


@dataclass(slots=True)
class Ledger:
    """The history of one request in flight; mutable because every iteration adds to it.

    Once the request has ended nothing changes any more: other threads read it then.
    """

    request: Request
    admitted: bool = False
    is_decided: bool = False
    reason: str = "not decided before the end"
    cached_tokens: int = 0
    first_run_at: float | None = None
    preemptions: int = 0
    drafted: int = 0
    accepted: int = 0
    token_times: list[float] = field(default_factory=list)
    stage_tokens: list[int] = field(default_factory=lambda: [0])
    resumed_tokens: int = 0  # delivered by another instance: the first of `token_times`
    predicted_ttft: float | None = None  # seconds, of one that was declined

    def decide(self, decision: Decision) -> None:
        self.admitted, self.reason, self.is_decided = decision.admitted, decision.reason, True

    def run(self, started_at: float) -> None:
        """A chunk was started."""
        if self.first_run_at is None:
            self.first_run_at = started_at

    def advance(self, advance: Advance, at: float) -> None:
        """New tokens came at `at`."""
        self.accepted += advance.accepted
        self.token_times += [at] * advance.new_tokens
        self.stage_tokens[-1] += advance.new_tokens
        if advance.stage_ended and len(self.stage_tokens) < len(self.request.stages):
            self.stage_tokens.append(0)

    @property
    def ttft(self) -> float | None:
        """Seconds from arrival to the first token."""
        return self.token_times[0] - self.request.arrived_at if self.token_times else None

    @property
    def tpot(self) -> float | None:
        """Mean seconds per token after the first."""
        return _tpot(self.token_times)

    @property
    def worst_gap(self) -> float | None:
        """The longest time between two tokens, in seconds."""
        return max(_gaps(self.token_times), default=None)

    @property
    def attained(self) -> bool:
        """Whether every token came by its due time."""
        return attained(self.request.stages, self.stage_tokens, self.request.arrived_at, self.token_times)

    def receipt(self) -> dict[str, Any]:
        """The receipt as JSON values: times in milliseconds from arrival, null where there is none."""
        waited = None if self.first_run_at is None else self.first_run_at - self.request.arrived_at
        predicted = self.predicted_ttft
        return {
            "slo_class": self.request.slo_class,
            "admitted": self.admitted,
            "reason": self.reason,
            "attained": None if self.request.is_best_effort else self.attained,
            "prompt_tokens": self.request.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "tokens": len(self.token_times),
            "resumed_tokens": self.resumed_tokens,
            "queue_ms": _ms(waited),
            "ttft_ms": _ms(self.ttft),
            "tpot_ms": _ms(self.tpot),
            "worst_gap_ms": _ms(self.worst_gap),
            "preemptions": self.preemptions,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "stages": list(self._stages()),
            **({} if predicted is None else {"predicted_ttft_ms": _ms(min(predicted, 1e6))}),
        }

    def _stages(self) -> Iterator[dict[str, Any]]:
        dues = due_times(self.request.stages, self.stage_tokens, self.request.arrived_at).tolist()
        end = 0
        for index, (stage, count) in enumerate(zip(self.request.stages, self.stage_tokens, strict=False)):
            start, end = end, end + count
            yield self._stage(stage, index == 0, dues[start:end], self.token_times[start:end])

    def _stage(self, stage: Stage, first: bool, dues: list[float], times: list[float]) -> dict[str, Any]:
        arrived, slo = self.request.arrived_at, stage.slo
        late = [at - due for at, due in zip(times, dues, strict=True)]
        return {
            "tokens": len(times),
            "ttft_slo_ms": _ms(slo.ttft) if slo and first else None,
            "tpot_slo_ms": _ms(slo.tpot) if slo else None,
            "first_token_due_ms": _ms(dues[0] - arrived) if slo and dues else None,
            "first_token_ms": _ms(times[0] - arrived) if times else None,
            "tpot_ms": _ms(_tpot(times)),
            "worst_gap_ms": _ms(max(_gaps(times), default=None)),
            "worst_lateness_ms": _ms(max(late)) if slo and late else None,
        }


def _gaps(times: list[float]) -> Iterator[float]:
    return (after - before for before, after in itertools.pairwise(times))


def _tpot(times: list[float]) -> float | None:
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)
