"""Our planner with a part of it switched off or set otherwise, by name: what the ablations compare.

The exam's headline uses `""`, the planner as it is shipped; no cell is tuned for us.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from slos_serve.scheduler import PlannerConfig


@dataclass(frozen=True, slots=True)
class Setting:
    """Keywords of `PlannerConfig` that differ, and whether requests tell their output length beforehand."""

    changes: Mapping[str, Any] = field(default_factory=dict)
    told_lengths: bool = False

    def config(self) -> PlannerConfig:
        return PlannerConfig(**self.changes)


ABLATIONS: Final[Mapping[str, Setting]] = {
    "commit_at_arrival": Setting({"commit_late": False}),
    "longest_period": Setting({"reserve": 100.0}),
    "little_reserve": Setting({"reserve": 1.15}),
    "short_iterations": Setting({"wait": 0.0}),
    "no_prefill_only": Setting({"prefill_only": False}),
    "lead_unspent": Setting({"lead": "unspent"}),
    "lead_whole": Setting({"lead": "whole"}),
    "rounds_alone": Setting({"whole_sessions": False}),
    "no_margin": Setting({"margin": 0.0}),
    "fixed_margin": Setting({"margin": 0.1}),
    "no_overcommit": Setting({"overcommit": 1.0}),
    "no_kv_admission": Setting({"overcommit": 10.0}),
    "cap_30ms": Setting({"cap": 0.03}),
    "cap_200ms": Setting({"cap": 0.2}),
    "pace_2": Setting({"pace": 2.0}),
}
LENGTHS: Final[Mapping[str, Setting]] = {
    "lengths_exact": Setting(told_lengths=True),
    "lengths_class_mean": Setting({"lengths": "class_mean"}),
    "lengths_quantile": Setting({"lengths": "quantile"}),
    "lengths_none": Setting({"lengths": "none"}),
}
SETTINGS: Final[Mapping[str, Setting]] = {"": Setting(), **ABLATIONS, **LENGTHS}
