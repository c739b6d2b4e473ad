"""Our planner with a part of it switched off or set otherwise, by name: what the ablations compare.

The exam's headline uses `""`, the planner as it is shipped; no cell is tuned for us.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final

from slos_serve.scheduler import PlannerConfig


@dataclass(frozen=True, slots=True)
class Setting:
    """Keywords of `PlannerConfig` that differ, and whether requests tell their output length beforehand."""

    changes: Mapping[str, Any] = field(default_factory=dict)
    told_lengths: bool = False

    def config(self) -> PlannerConfig:
        return PlannerConfig(**self.changes)


_FIELDS: Final = {each.name for each in fields(PlannerConfig)}
_SWITCHES: Final[Mapping[str, Mapping[str, Any]]] = {
    "commit_at_arrival": {"commit_late": False},
    "longest_period": {"just_in_time": False},
    "no_prefill_only": {"prefill_only": False},
    "no_margin": {"margin": 0.0},
    "fixed_margin": {"margin": 0.1},
    "no_overcommit": {"overcommit": 1.0},
    "no_kv_admission": {"overcommit": 10.0},
    "no_reserve": {"reserve": 1.0},
    "cap_30ms": {"cap": 0.03},
    "cap_60ms": {"cap": 0.06},
    "cap_100ms": {"cap": 0.1},
}
ABLATIONS: Final[Mapping[str, Setting]] = {
    name: Setting(changes) for name, changes in _SWITCHES.items() if changes.keys() <= _FIELDS
}
LENGTHS: Final[Mapping[str, Setting]] = {
    "lengths_exact": Setting(told_lengths=True),
    "lengths_class_mean": Setting({"lengths": "class_mean"}),
    "lengths_quantile": Setting({"lengths": "quantile"}),
    "lengths_none": Setting({"lengths": "none"}),
}
SETTINGS: Final[Mapping[str, Setting]] = {"": Setting(), **ABLATIONS, **LENGTHS}
