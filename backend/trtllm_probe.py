"""Looks at the TensorRT-LLM that is there, and says how far the planner may go with it, and why not further.

Features are detected, versions are not compared. Every check has a name, the mode that it is needed for and,
where it fails, what was found and what to change. Reads only, but for what `prepare` says it sets.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from slos_serve.scheduler.core import Capabilities

from .trtllm_batch import Limits
from .trtllm_pilot import Mode
from .trtllm_view import REQUEST_ATTRIBUTES

OUTPUT_FIELDS: Final = ("context_requests", "generation_requests", "paused_requests", "num_fitting_requests")
ABSTRACT: Final = {"schedule_request", "can_schedule", "scheduling_state_range"}
EXECUTOR_METHODS: Final = ("_schedule", "_handle_responses")
UNBOUNDED: Final = 0x7FFFFFFF


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at. `needed_for`: without it the mode is the next one below."""

    name: str
    needed_for: Mode
    found: str
    remedy: str = ""  # what to change; empty when the check passed

    @property
    def passed(self) -> bool:
        return not self.remedy


@dataclass(frozen=True, slots=True)
class Findings:
    """All checks of one engine, and the highest mode that they allow."""

    checks: tuple[Check, ...]

    @property
    def mode(self) -> Mode:
        failed = {check.needed_for for check in self.checks if not check.passed}
        if Mode.GOVERNOR in failed or Mode.TRIM in failed:
            return Mode.GOVERNOR
        return Mode.TRIM if Mode.FULL in failed else Mode.FULL

    @property
    def reasons(self) -> tuple[str, ...]:
        return tuple(f"{c.name}: {c.found}; {c.remedy}" for c in self.checks if not c.passed)


def probe(api: Any, engine: Any) -> Findings:
    """Check the interfaces of `api` and the live `engine` (a PyExecutor)."""
    return Findings((*_interfaces(api), *_engine(engine)))


def _interfaces(api: Any) -> Iterator[Check]:
    names = tuple(inspect.signature(api.RequestScheduler.schedule_request).parameters)
    yield _check(
        "schedule_request", Mode.TRIM, names[1:3] == ("active_requests", "inflight_request_ids") or len(names) == 3,
        f"arguments {names}", "this release changed the scheduler's interface; use mode governor",
    )  # fmt: skip
    abstract = set(api.RequestScheduler.__abstractmethods__)
    yield _check(
        "abstract methods", Mode.TRIM, abstract <= ABSTRACT, f"{sorted(abstract)}",
        "this release asks more of a scheduler; use mode governor",
    )  # fmt: skip
    fields = getattr(api.SchedulerOutput, "_fields", ())
    yield _check(
        "SchedulerOutput", Mode.TRIM, set(OUTPUT_FIELDS) <= set(fields), f"fields {fields}",
        "this release returns something else; use mode governor",
    )  # fmt: skip
    missing = [name for name in EXECUTOR_METHODS if not hasattr(api.PyExecutor, name)]
    yield _check(
        "PyExecutor", Mode.TRIM, not missing, f"missing {missing}", "this release has another loop; use mode governor"
    )
    states = [name for name in ("CONTEXT_INIT", "GENERATION_IN_PROGRESS") if not hasattr(api.LlmRequestState, name)]
    yield _check("LlmRequestState", Mode.TRIM, not states, f"missing {states}", "use mode governor")


def _engine(engine: Any) -> Iterator[Check]:
    def refuse(name: str, mode: Mode, value: Any, wrong: bool, remedy: str) -> Check:
        return _check(name, mode, not wrong, str(value), remedy)

    for name in ("scheduler", "active_requests", "kv_cache_manager", "max_num_tokens", "max_batch_size", "dist"):
        yield _check(f"engine.{name}", Mode.TRIM, hasattr(engine, name), "missing", "use mode governor")
    pp = getattr(getattr(engine, "dist", None), "pp_size", 1)
    yield refuse("pipeline parallel", Mode.TRIM, f"{pp} stages", pp != 1, "set pipeline_parallel_size to 1")
    adp = bool(getattr(engine, "enable_attention_dp", False))
    yield refuse("attention data parallel", Mode.TRIM, adp, adp, "set enable_attention_dp to false")
    transceiver = getattr(engine, "kv_cache_transceiver", None)
    yield refuse(
        "disaggregated serving", Mode.TRIM, type(transceiver).__name__, transceiver is not None,
        "remove cache_transceiver_config",
    )  # fmt: skip
    beams = getattr(engine, "max_beam_width", 1)
    yield refuse("beam search", Mode.TRIM, f"width {beams}", beams != 1, "set max_beam_width to 1")
    cache = getattr(engine, "kv_cache_manager", None)
    kind = type(cache).__name__
    yield refuse(
        "KV manager", Mode.TRIM, kind, "V2" in kind or cache is None,
        "set kv_cache_config.use_kv_cache_manager_v2 to false: version 2 allocates inside its own scheduler",
    )  # fmt: skip
    windows = bool(getattr(cache, "is_vswa", False))
    yield refuse("sliding windows", Mode.FULL, windows, windows, "blocks of several windows are not counted")
    for name in ("tokens_per_block", "get_num_free_blocks", "enable_block_reuse"):
        yield _check(f"kv_cache_manager.{name}", Mode.FULL, hasattr(cache, name), "missing", "use mode trim")
    overlap = not getattr(engine, "disable_overlap_scheduler", True)
    known = not overlap or hasattr(engine, "previous_batch")
    yield _check("overlap", Mode.FULL, known, "previous_batch is missing", "set disable_overlap_scheduler to true")
    length = getattr(engine, "max_input_len", UNBOUNDED)
    yield refuse(
        "max_input_len", Mode.FULL, length, length < UNBOUNDED, "call prepare(): a pause would cut longer sequences"
    )


def check_requests(api: Any) -> Check:
    """Whether LlmRequest has what is read of it. Attributes set in `__init__` show only on an instance."""
    found = {name for name in REQUEST_ATTRIBUTES if _mentions(api.LlmRequest, name)}
    missing = sorted(set(REQUEST_ATTRIBUTES) - found)
    return _check("LlmRequest", Mode.TRIM, not missing, f"missing {missing}", "use mode governor")


def _mentions(kind: type, name: str) -> bool:
    if hasattr(kind, name):
        return True
    try:
        return f"self.{name}" in inspect.getsource(kind)
    except (OSError, TypeError):
        return False


def _check(name: str, mode: Mode, passed: bool, found: str, remedy: str) -> Check:
    return Check(name, mode, "" if passed else found, "" if passed else remedy)


def prepare(engine: Any) -> None:
    """The one thing that must be set on a live engine: a pause keeps all tokens, however many.

    Releases up to 1.2 leave `max_input_len` at 2048, where a longer sequence is cut or ends the loop.
    """
    engine.max_input_len = UNBOUNDED


def limits_of(engine: Any, chunked: bool, max_draft: int = 0) -> Limits:
    """The engine's constants as the batch rules need them. `chunked`: enable_chunked_prefill."""
    cache = engine.kv_cache_manager
    block_tokens = int(cache.tokens_per_block)
    return Limits(
        max_tokens=int(engine.max_num_tokens),
        max_requests=int(engine.max_batch_size),
        max_slots=int(engine.max_batch_size),
        block_tokens=block_tokens,
        chunk_unit=block_tokens if chunked else None,
        reserve=2 + -(-max_draft // block_tokens),
        extra_tokens=int(getattr(cache, "num_extra_kv_tokens", 0)),
        pauses_mid_prefill=not cache.enable_block_reuse,
    )


def capabilities_of(limits: Limits, num_blocks: int, max_context: int, max_draft: int = 0) -> Capabilities:
    """What the planner is told. The reserve is not its to plan with; prompts take their whole memory at once."""
    return Capabilities(
        num_blocks=num_blocks - limits.reserve,
        block_tokens=limits.block_tokens,
        max_batch_tokens=limits.max_tokens,
        max_batch_requests=limits.max_requests,
        max_context=max_context,
        chunk_multiple=limits.chunk_unit or max_context,
        max_draft=max_draft,
        per_request_draft=False,
        can_preempt_mid_prefill=False,
    )


def scheduler_class(api: Any) -> Callable[[Any], Any]:
    """A RequestScheduler of this release that passes every call to a `Pilot`."""

    class PlannerScheduler(api.RequestScheduler):  # type: ignore[misc]
        def __init__(self, pilot: Any) -> None:
            super().__init__()
            self.pilot = pilot

        def schedule_request(self, active_requests: Any, inflight_request_ids: Any) -> Any:
            return self.pilot.schedule(active_requests, inflight_request_ids)

        def can_schedule(self, requests: Any) -> bool:
            return bool(self.pilot.can_schedule(requests))

        @property
        def scheduling_state_range(self) -> Any:
            return self.pilot.stock.scheduling_state_range

    return PlannerScheduler
