"""Settings are read exactly or refused with the key and what was got."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slos_serve.backend.config import DEFAULT_CLASSES, EngineConfig, SloClass, parse_config, read_config

REPOSITORY = Path(__file__).parents[1] / "model_repository"


def test_an_empty_object_is_the_default() -> None:
    """Every setting has a default, and settings survive being written and read."""
    assert parse_config("{}") == EngineConfig()
    assert parse_config(json.dumps(EngineConfig().to_json())) == EngineConfig()
    assert parse_config("{}").classes == DEFAULT_CLASSES


@pytest.mark.parametrize(
    "path", sorted(REPOSITORY.glob("*/1/engine.json")), ids=lambda path: str(path.parent.parent.name)
)
def test_the_settings_in_the_repository_are_valid(path: Path) -> None:
    """What is shipped can be read."""
    read_config(path.parent)


def test_classes_replace_the_default_table() -> None:
    """A model may have its own classes."""
    config = parse_config(
        '{"classes": {"gold": {"ttft_ms": 300, "tpot_ms": 20, "weight": 5}}, "default_class": "gold"}'
    )
    assert config.classes == {"gold": SloClass(ttft_ms=300, tpot_ms=20, weight=5)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modle": "x"}, "unknown key 'modle'; known: engine, model, "),
        ({"max_context": "long"}, "max_context: must be an integer of at least 2, got 'long'"),
        ({"max_context": True}, "max_context"),
        ({"kv_cache_mb": 0}, "kv_cache_mb"),
        ({"max_draft": -1}, "max_draft"),
        ({"model": ""}, "model: must be a non-empty string, got ''"),
        ({"draft_model": 5}, "draft_model: must be a non-empty string or null, got 5"),
        ({"dtype": "int3"}, "dtype: must be one of float32, bfloat16, float16, got 'int3'"),
        ({"default_class": "vip"}, "default_class: must be one of best_effort, chatbot"),
        ({"shutdown_drain_s": -1}, "shutdown_drain_s"),
        ({"classes": {}}, "classes: must be a JSON object with at least one class"),
        ({"classes": {"a": {"tpot": 5}}}, "classes.a: unknown key 'tpot'"),
        ({"classes": {"a": {"tpot_ms": 5}}}, "classes.a: ttft_ms, ttft_slowdown: exactly one"),
        ({"classes": {"a": {"ttft_ms": 5}}}, "classes.a: tpot_ms: must be given"),
        ({"classes": {"a": {"ttft_ms": -5, "tpot_ms": 5}}}, "classes.a: ttft_ms: must be a positive number, got -5"),
        ({"classes": {"a": {"best_effort": True, "tpot_ms": 5}}}, "classes.a: best_effort"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    """The message starts with the file and names the key."""
    with pytest.raises(ValueError, match=r"^engine\.json: ") as caught:
        parse_config(json.dumps(settings))
    assert message in str(caught.value)


def test_malformed_json_is_named() -> None:
    """A file that is no JSON object says so."""
    for text in ("{", "[]", "5"):
        with pytest.raises(ValueError, match=r"^engine\.json: "):
            parse_config(text)
