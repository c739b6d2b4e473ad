"""Were the promises kept: the scoring rules, a table per application class, and the same as JSON.

Times are the client's: from sending a request to reading a token, the network and both queues included.
Whether the server kept its promise by its own clock stands beside it, from the receipt. The rules are
those of `scheduler.attainment`. Requests that were refused or did not end are misses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from slos_serve.scheduler.attainment import RULES
from slos_serve.scheduler.core import Slo, Stage

from .play import Ledger, Record


@dataclass(frozen=True, slots=True)
class Judged:
    """One record and what its receipt says it was promised."""

    record: Record
    stages: tuple[Stage, ...]
    stage_tokens: tuple[int, ...]

    @property
    def receipt(self) -> Mapping[str, Any]:
        return self.record.result.receipt if self.record.result else {}

    @property
    def token_times(self) -> tuple[float, ...]:
        return self.record.result.token_times if self.record.result else ()

    def scores(self) -> dict[str, bool]:
        """Each rule by the client's clock, and the server's own verdict; all false unless it was done."""
        if self.record.outcome != "done" or not self.stages:
            return dict.fromkeys(SCORES, False)
        case = (self.stages, self.stage_tokens, self.record.sent_at, self.token_times)
        return {
            "server": bool(self.receipt.get("attained")),
            **{name: rule(*case) for name, rule in RULES.items()},
        }


SCORES: Final = ("server", *RULES)


def judge(record: Record) -> Judged:
    """A record with the stages of its receipt; a record without receipt has none."""
    receipt = record.result.receipt if record.result else {}
    stages = []
    tokens = []
    for stage in receipt.get("stages", ()):
        tpot = stage["tpot_slo_ms"]
        # The TTFT of a later stage is not used; it has to be a positive number all the same.
        ttft = stage["ttft_slo_ms"] or tpot
        stages.append(Stage(max(1, stage["tokens"]), Slo(ttft / 1000, tpot / 1000) if tpot else None))
        tokens.append(stage["tokens"])
    return Judged(record, tuple(stages), tuple(tokens))


def _spread(seconds: Sequence[float], slos: Sequence[float]) -> dict[str, float | None]:
    """Percentiles in milliseconds and the SLO they are held against (the median where SLOs differ)."""
    p50, p99 = np.percentile(seconds, (50, 99)).tolist() if seconds else (None, None)
    return {"p50_ms": _ms(p50), "p99_ms": _ms(p99), "slo_ms": _ms(float(np.median(slos)) if slos else None)}


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)


def _ttft(cases: Iterable[Judged]) -> dict[str, float | None]:
    done = [case for case in cases if case.token_times]
    slos = [case.stages[0].slo.ttft for case in done if case.stages and case.stages[0].slo]
    return _spread([case.token_times[0] - case.record.sent_at for case in done], slos)


def _tpot(cases: Iterable[Judged], stage: int) -> dict[str, float | None]:
    """Mean seconds per token of one stage of each request, over the requests that have at least one gap in it."""
    means, slos = [], []
    for case in cases:
        counts = case.stage_tokens
        if stage < len(counts):
            start = max(sum(counts[:stage]) - 1, 0)
            times = case.token_times[start : sum(counts[: stage + 1])]
            if len(times) > 1:
                means.append((times[-1] - times[0]) / (len(times) - 1))
                slo = case.stages[stage].slo
                slos += [slo.tpot] if slo else []
    return _spread(means, slos)


def _scores(cases: Sequence[Judged]) -> list[dict[str, bool]]:
    """The scores of one class's requests; none for a class that is served best effort by definition."""
    if any(case.stages and case.stages[0].slo is None for case in cases):
        return []
    return [case.scores() for case in cases]


def _shares(scores: Sequence[Mapping[str, bool]]) -> dict[str, float | None]:
    return {name: sum(score[name] for score in scores) / len(scores) if scores else None for name in SCORES}


def summary(cases: Sequence[Judged]) -> dict[str, Any]:
    """One class in numbers. Attainment is a share of all its requests, null where nothing was asked for."""
    receipts = [case.receipt for case in cases if case.record.outcome == "done"]
    num_stages = max((len(case.stages) for case in cases), default=0)
    return {
        "requests": len(cases),
        "outcomes": dict(Counter(case.record.outcome for case in cases)),
        "admitted": sum(bool(receipt.get("admitted")) for receipt in receipts),
        "best_effort": sum(not receipt.get("admitted") for receipt in receipts),
        "ttft": _ttft(cases),
        "tpot": [_tpot(cases, stage) for stage in range(max(num_stages, 1))],
        "attained": _shares(_scores(cases)),
        "tokens": sum(len(case.token_times) for case in cases),
        **{name: sum(receipt.get(name, 0) for receipt in receipts) for name in ("drafted", "accepted", "preemptions")},
    }


def report(ledger: Ledger) -> dict[str, Any]:
    """Everything measured, as JSON values: per class, over all, the generator's own lag, and the faults."""
    classes: dict[str, list[Judged]] = {}
    for record in sorted(ledger.records, key=lambda record: record.sent_at):
        classes.setdefault(record.arrival.slo_class, []).append(judge(record))
    late = [record.sent_at - record.due_at for record in ledger.records]
    return {
        "classes": {name: summary(cases) for name, cases in sorted(classes.items())},
        "requests": len(ledger.sent),
        "outcomes": dict(Counter(record.outcome for record in ledger.records)),
        "transports": dict(Counter(record.transport for record in ledger.records)),
        "attained": _shares([score for cases in classes.values() for score in _scores(cases)]),
        "generator_lag": {**_spread(late, ()), "max_ms": max(late, default=0.0) * 1000},
        "faults": ledger.faults(),
    }


_HEADER: Final = (
    "class", "requests", "admitted", "best effort", "refused", "TTFT p50/p99 (SLO) ms", "TPOT p50/p99 (SLO) ms",
    "attained", "by server", "tokens", "accepted/drafted",
)  # fmt: skip


def table(measured: Mapping[str, Any]) -> str:
    """The report as text: a line per class, one more for each further stage of it."""
    lines: list[tuple[str, ...]] = [_HEADER]
    for name, row in measured["classes"].items():
        lines.append(
            (
                name,
                str(row["requests"]),
                str(row["admitted"]),
                str(row["best_effort"]),
                str(row["outcomes"].get("refused", 0)),
                _shown(row["ttft"]),
                _shown(row["tpot"][0]),
                percent(row["attained"]["strict"]),
                percent(row["attained"]["server"]),
                str(row["tokens"]),
                f"{row['accepted']}/{row['drafted']}" if row["drafted"] else "-",
            )
        )
        lines += [("  then answering", *[""] * 5, _shown(stage), *[""] * 4) for stage in row["tpot"][1:]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADER))]
    return "\n".join("  ".join(_aligned(line, widths)).rstrip() for line in lines)


def _aligned(line: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    yield line[0].ljust(widths[0])
    for cell, width in zip(line[1:], widths[1:], strict=True):
        yield cell.rjust(width)


def _shown(spread: Mapping[str, float | None]) -> str:
    if spread["p50_ms"] is None:
        return "-"
    slo = spread["slo_ms"]
    return f"{spread['p50_ms']:.0f} / {spread['p99_ms']:.0f}" + ("" if slo is None else f" ({slo:.0f})")


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
