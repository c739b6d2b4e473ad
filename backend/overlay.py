"""A model repository with some settings changed for one run: links to everything, and an `engine.json` of its own.

Never writes into the repository it is given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from .config import parse_config

SETTINGS: Final = "engine.json"


def parse_settings(given: Sequence[str]) -> dict[str, Any]:
    """`NAME=VALUE` to values: JSON where it is JSON, text where it is not. Raises ValueError."""
    settings = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not equals:
            raise ValueError(f"--set: must be NAME=VALUE, got {each!r}")
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
    return settings


def overlay(repository: Path, folder: Path, settings: Mapping[str, Any]) -> Path:
    """A repository in `folder` like `repository`, with `settings` in every model that has an `engine.json`.

    Raises ValueError when no model has one, or when a setting is unknown or out of range.
    """
    changed = 0
    for model in sorted(path for path in repository.iterdir() if path.is_dir()):
        for entry in sorted(model.iterdir()):
            copy = folder / model.name / entry.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            if (entry / SETTINGS).is_file():
                _overlay_version(entry, copy, settings)
                changed += 1
            else:
                copy.symlink_to(entry.resolve())
    if not changed:
        raise ValueError(f"{repository}: no model in it has an {SETTINGS} whose settings could be changed")
    return folder


def _overlay_version(version: Path, copy: Path, settings: Mapping[str, Any]) -> None:
    copy.mkdir()
    for entry in version.iterdir():
        if entry.name != SETTINGS:
            (copy / entry.name).symlink_to(entry.resolve())
    source = version / SETTINGS
    text = json.dumps({**json.loads(source.read_text(encoding="utf-8")), **settings}, indent=1)
    parse_config(text, f"{source} with {', '.join(settings)} changed")
    (copy / SETTINGS).write_text(text + "\n", encoding="utf-8")
