"""The planner and what it needs to be tried: pure, passive, the same for simulator and engines."""

from typing import Final

from .attainment import attained, due_times
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
from .engine import Engine, Planner, Replica
from .perf import BatchShape, Correction, FitQuality, PerfModel, Piece, fit, quality
from .scheduler import PlannerConfig, Scheduler

POLICIES: Final[dict[str, type[Scheduler]]] = {"slos_serve": Scheduler}

__all__ = [
    "POLICIES",
    "Advance",
    "BatchShape",
    "Capabilities",
    "Chunk",
    "Correction",
    "Decision",
    "Engine",
    "FitQuality",
    "PerfModel",
    "Piece",
    "Plan",
    "Planner",
    "PlannerConfig",
    "Replica",
    "Request",
    "Scheduler",
    "Slo",
    "Snapshot",
    "Stage",
    "StepReport",
    "attained",
    "due_times",
    "fit",
    "quality",
]
