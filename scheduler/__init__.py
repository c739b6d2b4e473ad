"""The planner and what it needs to be tried: pure, passive, the same for simulator and engines."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from .attainment import attained, due_times
from .baselines import DecodeFirst, EarliestDue, PrefillFirst
from .core import (
    Advance,
    Capabilities,
    Chunk,
    Decision,
    Plan,
    Request,
    Slo,
    Snapshot,
    Stage,
    StepReport,
)
from .engine import Engine, Planner
from .exact import AdmissionProblem, AdmissionResult, Speculation, admit_exact
from .paper import Published
from .perf import BatchShape, FitQuality, PerfModel, Piece, fit, quality
from .scheduler import PlannerConfig, Scheduler

# How to make each policy's planner from what the engine can do and its time model. Adding one: see `policies`.
POLICIES: Final[Mapping[str, Callable[[Capabilities, PerfModel], Planner]]] = {
    "slos_serve": Scheduler,
    "slos_serve_paper": partial(Scheduler, policy=Published()),
    "vllm": partial(Scheduler, policy=PrefillFirst()),
    "sarathi": partial(Scheduler, policy=DecodeFirst()),
    "qoserve": partial(Scheduler, policy=EarliestDue()),
}

__all__ = [
    "POLICIES",
    "AdmissionProblem",
    "AdmissionResult",
    "Advance",
    "BatchShape",
    "Capabilities",
    "Chunk",
    "Decision",
    "DecodeFirst",
    "EarliestDue",
    "Engine",
    "FitQuality",
    "PerfModel",
    "Piece",
    "Plan",
    "Planner",
    "PlannerConfig",
    "PrefillFirst",
    "Published",
    "Request",
    "Scheduler",
    "Slo",
    "Snapshot",
    "Speculation",
    "Stage",
    "StepReport",
    "admit_exact",
    "attained",
    "due_times",
    "fit",
    "quality",
]
