"""The scoring rules on token times made by hand, and the table."""

from __future__ import annotations

import json
from typing import Any

import pytest

from slos_serve.client import Result
from slos_serve.loadtest.play import Ledger, Outcome, Record
from slos_serve.loadtest.report import judge, report, table
from slos_serve.loadtest.workload import Arrival
from slos_serve.scheduler.attainment import attained, block_attained, mean_attained
from slos_serve.scheduler.core import Slo, Stage

SLO = Slo(ttft=1.0, tpot=0.1)


def paced(count: int, first: float = 1.0, gap: float = 0.1) -> list[float]:
    return [first + gap * index for index in range(count)]


def scores(times: list[float], stages: tuple[Stage, ...] = (Stage(100, SLO),), counts: Any = None) -> tuple[bool, ...]:
    """Strict, blocks of ten, mean; the request arrived at 0."""
    counts = (len(times),) if counts is None else counts
    return tuple(rule(stages, counts, 0.0, times) for rule in (attained, block_attained, mean_attained))


def test_tokens_exactly_at_their_due_times_attain_every_rule() -> None:
    """On time means not after."""
    assert scores(paced(30)) == (True, True, True)


def test_a_late_first_token_misses_every_rule() -> None:
    """TTFT counts in each of them, however quick the rest."""
    assert scores(paced(30, first=1.01, gap=0.01)) == (False, False, False)


def test_an_early_first_token_earns_slack_under_the_strict_rule_only() -> None:
    """A stall after it keeps every due time, but it is a slow block and a slow mean."""
    times = [*paced(10, first=0.2), *paced(20, first=1.8)]
    assert scores(times) == (True, False, False)


def test_one_long_gap_hides_in_the_mean_but_not_in_its_block() -> None:
    """Quick tokens before and after make the mean good."""
    times = [*paced(20, gap=0.01), *paced(20, first=3.4, gap=0.01)]
    assert scores(times) == (False, False, True)


def test_a_token_a_little_late_can_pass_the_block() -> None:
    """The mean of ten gaps forgives a token that its successors make up for."""
    times = paced(11)
    times[5] += 0.05
    assert scores(times) == (False, True, True)


def test_the_last_block_may_be_short() -> None:
    """Ten good gaps do not excuse the eleventh."""
    times = [*paced(11, gap=0.05), paced(11, gap=0.05)[-1] + 0.15]
    assert scores(times) == (True, False, True)


def test_each_stage_has_its_own_pace() -> None:
    """Thinking at 50 ms and answering at 100 ms: a slow answer is judged by the answer's pace."""
    stages = (Stage(10, Slo(1.0, 0.05)), Stage(10, Slo(1.0, 0.1)))
    times = paced(10, gap=0.05)
    good = [*times, *paced(10, first=times[-1] + 0.1, gap=0.1)]
    slow = [*times, *paced(10, first=times[-1] + 0.12, gap=0.12)]
    assert scores(good, stages, (10, 10)) == (True, True, True)
    assert scores(slow, stages, (10, 10)) == (False, False, False)
    assert scores(paced(20, gap=0.06), stages, (10, 10)) == (False, False, False)


def test_one_token_needs_only_its_ttft() -> None:
    """There is no gap to judge."""
    assert scores([0.9]) == (True, True, True)


def test_nothing_promised_or_nothing_delivered_attains_nothing() -> None:
    """Best effort and empty answers are never successes."""
    assert scores(paced(3), (Stage(3),)) == (False, False, False)
    assert scores([]) == (False, False, False)


def record(
    number: int,
    slo_class: str = "chatbot",
    outcome: Outcome = "done",
    times: tuple[float, ...] = (10.5, 10.6, 10.7),
    **receipt: Any,
) -> Record:
    """A request sent at 10 s; its receipt promises 1 s and 100 ms."""
    stage = {"tokens": len(times), "ttft_slo_ms": 1000.0, "tpot_slo_ms": 100.0}
    receipt = {"admitted": True, "attained": True, "drafted": 4, "accepted": 3, "stages": [stage], **receipt}
    result = Result("x" * len(times), tuple(range(len(times))), times, "length", receipt)
    arrival = Arrival(0.0, slo_class, 10, 3)
    return Record(
        f"{slo_class}-{number}", arrival, "grpc", outcome, 9.99, 10.0, result if outcome == "done" else None, ""
    )


def ledger(*records: Record) -> Ledger:
    kept = Ledger()
    for each in records:
        kept.open(each.id)
        kept.close(each)
    return kept


BEST_EFFORT = [{"tokens": 3, "ttft_slo_ms": None, "tpot_slo_ms": None}]


def test_a_class_is_summed_up() -> None:
    """Counts, percentiles and attainment of one class."""
    late = record(1, times=(12.0, 12.1, 12.2), attained=False, admitted=False)
    chatbot = report(ledger(record(0), late, record(2, outcome="refused")))["classes"]["chatbot"]
    assert chatbot["requests"] == 3
    assert (chatbot["admitted"], chatbot["best_effort"]) == (1, 1)
    assert chatbot["outcomes"] == {"done": 2, "refused": 1}
    assert chatbot["ttft"] == {"p50_ms": 1250.0, "p99_ms": pytest.approx(1985), "slo_ms": 1000.0}
    assert chatbot["tpot"][0]["p50_ms"] == pytest.approx(100)
    assert chatbot["attained"] == pytest.approx(dict.fromkeys(("server", "strict", "blocks", "mean"), 1 / 3))
    assert (chatbot["tokens"], chatbot["drafted"], chatbot["accepted"]) == (6, 8, 6)


def test_best_effort_has_no_attainment_and_does_not_count_in_the_whole() -> None:
    """Nothing was asked for, so nothing is attained or missed; a refusal in that class is no miss either."""
    measured = report(
        ledger(
            record(0),
            record(0, "best_effort", admitted=False, attained=None, stages=BEST_EFFORT),
            record(1, "best_effort", outcome="refused"),
        )
    )
    assert measured["classes"]["best_effort"]["attained"]["strict"] is None
    assert measured["attained"]["strict"] == 1.0


def test_client_and_server_may_disagree() -> None:
    """A token that the server finished in time but that came late is a miss for the client only."""
    slow_network = record(0, times=(11.5, 11.6, 11.7), attained=True)
    assert judge(slow_network).scores() == {"server": True, "strict": False, "blocks": False, "mean": False}


def test_the_report_is_json_and_tells_the_generators_lag() -> None:
    """Everything survives a round trip through JSON; requests were sent 10 ms late."""
    measured = json.loads(json.dumps(report(ledger(record(0)))))
    assert measured["generator_lag"]["max_ms"] == pytest.approx(10)
    assert measured["faults"] == []


@pytest.mark.parametrize("outcome", ["lost", "duplicated", "hanging", "failed"])
def test_every_unfair_end_is_a_fault(outcome: Outcome) -> None:
    """What a request may not end with is reported, with its id."""
    (fault,) = report(ledger(record(0), record(1, outcome=outcome)))["faults"]
    assert "chatbot-1" in fault
    assert outcome in fault


def test_the_ledger_sees_missing_and_double_ends() -> None:
    """Every id that was sent ends exactly once, and no id is sent twice."""
    kept = ledger(record(0))
    kept.close(record(0))
    kept.open("never-ended")
    assert kept.faults() == ["chatbot-0: ended 2 times", "never-ended: no end recorded"]
    with pytest.raises(ValueError, match="sent before"):
        kept.open("never-ended")


def test_the_table_has_a_line_per_class_and_stage() -> None:
    """Classes in order of name, thinking and answering on two lines, SLOs in brackets."""
    stages = [
        {"tokens": 2, "ttft_slo_ms": 1000.0, "tpot_slo_ms": 50.0},
        {"tokens": 1, "ttft_slo_ms": None, "tpot_slo_ms": 100.0},
    ]
    lines = table(report(ledger(record(0), record(0, "reasoning", stages=stages)))).splitlines()
    assert [line.split()[0] for line in lines] == ["class", "chatbot", "reasoning", "then"]
    assert "500 / 500 (1000)" in lines[1]
    assert "100 / 100 (50)" in lines[2]
    assert "100 / 100 (100)" in lines[3]
    assert "3/4" in lines[1]


def test_an_empty_run_has_a_report() -> None:
    """Nothing sent is no crash."""
    assert table(report(Ledger())).startswith("class")
