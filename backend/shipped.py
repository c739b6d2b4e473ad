"""The time models that come with the package (`scheduler/profiles`), and which of them is about this machine."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from slos_serve.scheduler.perf import PerfModel

# What a model folder's config.json says of the models that profiles are about: hidden size and layers.
SHAPES: Final = {"llama-3-8b": (4096, 32), "opt-13b": (5120, 40)}


def shipped_profile(gpu: str, folder: Path, gpus: int) -> tuple[str, PerfModel] | None:
    """The name and time model for a GPU (its full name) and a model folder; None where none is about both."""
    path = folder / "config.json"
    data = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    shape = (data.get("hidden_size"), data.get("num_hidden_layers"))
    for entry in sorted(files("slos_serve.scheduler").joinpath("profiles").iterdir(), key=lambda each: each.name):
        if not entry.name.endswith(".json"):
            continue
        profile = json.loads(entry.read_text(encoding="utf-8"))
        card = profile["gpu"].partition("-")[0].upper()
        if card in gpu.upper() and SHAPES.get(profile["model"]) == shape and profile["gpus"] == gpus:
            return profile["name"], _with_host(profile)
    return None


def _with_host(profile: dict[str, Any]) -> PerfModel:
    """The fitted kernels' time, and the host's per iteration."""
    model = dict(profile["time_model"])
    model["pieces"] = [[token, step, base + profile["host_seconds"]] for token, step, base in model["pieces"]]
    return PerfModel.from_json(model)
