"""Everything the model exports on /metrics: one table of families, and the numbers added up between updates.

One update costs a round trip of some 20 us into the server, and adding up a step or a request costs the engine
thread more than it has: it only leaves here what happened, and one thread adds that up and publishes it a few
times a second. Probes (request ids that start with `probe-`) leave
no trace in the numbers by class.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Literal, TypeAlias

from slos_serve.scheduler.core import Plan, Snapshot, StepReport

from .receipt import Ledger

log = logging.getLogger(__name__)

PUBLISH_SECONDS: Final = 0.2
PROBE_PREFIX: Final = "probe-"
MODES: Final = ("full", "trim", "governor", "shadow")
DETAILED: Final = ("repair", "difference", "step_down", "refused")  # events whose details are few

TTFT_BUCKETS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
TPOT_BUCKETS: Final = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)
GAP_BUCKETS: Final = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 10.0)


@dataclass(frozen=True, slots=True)
class Family:
    """One metric name. Its labels are `model` and `version`, and `slo_class` and others where `doc` says so."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    doc: str
    buckets: tuple[float, ...] = ()


FAMILIES: Final = (
    Family("slos_serve_requests_total", "counter", "Ended requests by slo_class and outcome"),
    Family("slos_serve_slo_total", "counter", "Finished requests with an SLO by slo_class, admitted, attained"),
    Family("slos_serve_ttft_seconds", "histogram", "Arrival to first token by slo_class", TTFT_BUCKETS),
    Family("slos_serve_tpot_seconds", "histogram", "Mean time per token after the first by slo_class", TPOT_BUCKETS),
    Family("slos_serve_gap_seconds", "histogram", "Longest gap of a request by slo_class", GAP_BUCKETS),
    Family("slos_serve_prompt_tokens_total", "counter", "Prompt tokens of ended requests by slo_class"),
    Family("slos_serve_cached_tokens_total", "counter", "Prompt tokens whose KV was cached by slo_class"),
    Family("slos_serve_generated_tokens_total", "counter", "Generated tokens of ended requests by slo_class"),
    Family("slos_serve_iterations_total", "counter", "Engine steps"),
    Family("slos_serve_iteration_seconds_total", "counter", "Time of engine steps"),
    Family("slos_serve_iteration_predicted_seconds_total", "counter", "Time the plans predicted for them"),
    Family("slos_serve_planning_seconds_total", "counter", "Time spent planning"),
    Family("slos_serve_batch_tokens_total", "counter", "Tokens in engine steps, guesses included"),
    Family("slos_serve_batch_requests_total", "counter", "Requests in engine steps"),
    Family("slos_serve_drafted_tokens_total", "counter", "Guessed tokens"),
    Family("slos_serve_accepted_tokens_total", "counter", "Guessed tokens that were accepted"),
    Family("slos_serve_preemptions_total", "counter", "Requests whose KV was dropped to be computed again"),
    Family("slos_serve_requests", "gauge", "Requests in flight by state: waiting, prefilling, decoding"),
    Family("slos_serve_best_effort_requests", "gauge", "Requests in flight without a promise"),
    Family("slos_serve_waiting_tokens", "gauge", "Known tokens that are still to be computed"),
    Family("slos_serve_kv_blocks", "gauge", "KV blocks by state: used, total"),
    Family("slos_serve_trtllm_mode", "gauge", "1 for the mode the planner is in: full, trim, governor, shadow"),
    Family("slos_serve_trtllm_events_total", "counter", "Of the planner in TensorRT-LLM by kind and detail"),
    Family("slos_serve_engine_heartbeat_seconds", "gauge", "Unix time of the engine thread's last sign of life"),
)

Labels: TypeAlias = tuple[tuple[str, str], ...]
Key: TypeAlias = tuple[str, Labels]


@dataclass(slots=True)
class Numbers:
    """What was added up since the last update."""

    counters: dict[Key, float] = field(default_factory=dict)
    gauges: dict[Key, float] = field(default_factory=dict)
    observations: list[tuple[Key, float]] = field(default_factory=list)

    def add(self, name: str, value: float, **labels: str) -> None:
        if value:
            key = (name, tuple(labels.items()))
            self.counters[key] = self.counters.get(key, 0.0) + value

    def set(self, name: str, value: float, **labels: str) -> None:
        self.gauges[name, tuple(labels.items())] = value

    def observe(self, name: str, value: float | None, **labels: str) -> None:
        if value is not None:
            self.observations.append(((name, tuple(labels.items())), value))


class Metrics:
    """Adds up what happens (see `worker.Observer`) and publishes it from a thread of its own."""

    def __init__(self, exporter: Callable[[Numbers], None]) -> None:
        """`exporter` is called on the publishing thread with what was added since its last call."""
        self._exporter = exporter
        self._numbers = Numbers()
        self._told: list[Callable[[Numbers], None]] = []  # what the publishing thread has to add up
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Publish the rest and end the thread."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def turned(self, snapshot: Snapshot) -> None:
        """The engine thread lives; `snapshot` is the scheduler's state."""
        used = snapshot.num_blocks - snapshot.free_blocks
        with self._lock:
            numbers = self._numbers
            numbers.set("slos_serve_engine_heartbeat_seconds", time.time())
            numbers.set("slos_serve_requests", snapshot.waiting, state="waiting")
            numbers.set("slos_serve_requests", snapshot.prefilling, state="prefilling")
            numbers.set("slos_serve_requests", snapshot.decoding, state="decoding")
            numbers.set("slos_serve_best_effort_requests", snapshot.best_effort)
            numbers.set("slos_serve_waiting_tokens", snapshot.waiting_tokens)
            numbers.set("slos_serve_kv_blocks", used, state="used")
            numbers.set("slos_serve_kv_blocks", snapshot.num_blocks, state="total")

    def stepped(self, plan: Plan, report: StepReport, planning: float, drafted: int) -> None:
        """One engine step: what was planned in `planning` seconds, with `drafted` guesses made, and what came of it."""
        with self._lock:
            self._told.append(partial(_add_step, plan, report, planning, drafted))

    def ended(self, ledger: Ledger, outcome: str) -> None:
        """One request is over: finished, cancelled, refused, failed or unavailable."""
        with self._lock:
            self._told.append(partial(_add_request, ledger, outcome))

    def counted(self, kind: str, detail: str) -> None:
        """Something happened to the planner inside TensorRT-LLM; details of faults are left to the log."""
        known = detail if kind in DETAILED else ""
        with self._lock:
            self._numbers.add("slos_serve_trtllm_events_total", 1, kind=kind, detail=known)

    def in_mode(self, mode: str) -> None:
        """How much the planner decides."""
        with self._lock:
            for name in MODES:
                self._numbers.set("slos_serve_trtllm_mode", float(name == mode), mode=name)

    def refused(self, code: str) -> None:
        """A request was refused before it was taken on."""
        with self._lock:
            self._numbers.add("slos_serve_requests_total", 1, slo_class="", outcome=code.lower())

    def _run(self) -> None:
        stopping = False
        while not stopping:
            stopping = self._stop.wait(PUBLISH_SECONDS)
            with self._lock:
                numbers, self._numbers = self._numbers, Numbers()
                told, self._told = self._told, []
            try:
                for add in told:
                    add(numbers)
                self._exporter(numbers)
            except Exception:
                log.exception("metrics were not updated")


def _add_step(plan: Plan, report: StepReport, planning: float, drafted: int, numbers: Numbers) -> None:
    numbers.add("slos_serve_iterations_total", 1)
    numbers.add("slos_serve_iteration_seconds_total", report.finished_at - report.started_at)
    numbers.add("slos_serve_iteration_predicted_seconds_total", plan.predicted)
    numbers.add("slos_serve_planning_seconds_total", planning)
    numbers.add("slos_serve_batch_tokens_total", sum(chunk.length for chunk in plan.chunks))
    numbers.add("slos_serve_batch_requests_total", len(plan.chunks))
    numbers.add("slos_serve_drafted_tokens_total", drafted)
    numbers.add("slos_serve_accepted_tokens_total", sum(advance.accepted for advance in report.advances))
    numbers.add("slos_serve_preemptions_total", len(plan.evicted))


def _add_request(ledger: Ledger, outcome: str, numbers: Numbers) -> None:
    request = ledger.request
    if request.id.startswith(PROBE_PREFIX):
        return
    name = request.slo_class
    numbers.add("slos_serve_requests_total", 1, slo_class=name, outcome=outcome)
    numbers.add("slos_serve_prompt_tokens_total", request.prompt_tokens, slo_class=name)
    numbers.add("slos_serve_cached_tokens_total", ledger.cached_tokens, slo_class=name)
    numbers.add("slos_serve_generated_tokens_total", len(ledger.token_times), slo_class=name)
    numbers.observe("slos_serve_ttft_seconds", ledger.ttft, slo_class=name)
    numbers.observe("slos_serve_tpot_seconds", ledger.tpot, slo_class=name)
    numbers.observe("slos_serve_gap_seconds", ledger.worst_gap, slo_class=name)
    if outcome == "finished" and not request.is_best_effort:
        kept = {"admitted": _word(ledger.admitted), "attained": _word(ledger.attained)}
        numbers.add("slos_serve_slo_total", 1, slo_class=name, **kept)


def _word(value: bool) -> str:
    return "true" if value else "false"


class TritonExporter:
    """Keeps one Triton metric per name and labels: dropping a handle would remove the metric."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        import triton_python_backend_utils as pb_utils

        self._labels = dict(labels)
        kinds = {
            "counter": pb_utils.MetricFamily.COUNTER,
            "gauge": pb_utils.MetricFamily.GAUGE,
            "histogram": pb_utils.MetricFamily.HISTOGRAM,
        }
        self._tables = {table.name: table for table in FAMILIES}
        self._families = {
            table.name: pb_utils.MetricFamily(name=table.name, description=table.doc, kind=kinds[table.kind])
            for table in FAMILIES
        }
        self._metrics: dict[Key, Any] = {}
        self._metric(("slos_serve_iterations_total", ()))

    def __call__(self, numbers: Numbers) -> None:
        for key, value in numbers.counters.items():
            self._metric(key).increment(value)
        for key, value in numbers.gauges.items():
            self._metric(key).set(value)
        for key, value in numbers.observations:
            self._metric(key).observe(value)

    def _metric(self, key: Key) -> Any:
        metric = self._metrics.get(key)
        if metric is None:
            name, labels = key
            buckets = self._tables[name].buckets
            options = {"buckets": list(buckets)} if buckets else {}
            metric = self._families[name].Metric(labels={**self._labels, **dict(labels)}, **options)
            self._metrics[key] = metric
        return metric
