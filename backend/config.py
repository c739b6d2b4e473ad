"""The settings of one model, read from `engine.json` beside it.

Unknown keys and values out of range are refused with the known keys and the range. Nothing is written
back, and nothing is read from the environment.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


@dataclass(frozen=True, slots=True)
class SloClass:
    """What an application class is promised. Times in milliseconds.

    The TTFT is `ttft_ms`, or `ttft_slowdown` times the prefill time of the request's own prompt on an idle
    machine, but at least `ttft_floor_ms`. Every later token has `tpot_ms`, a thinking token
    `thinking_tpot_ms` (`tpot_ms` when absent). `weight` is the value of keeping the promise.
    `best_effort` promises nothing and takes none of these times.
    """

    ttft_ms: float | None = None
    ttft_slowdown: float | None = None
    ttft_floor_ms: float = 250.0
    tpot_ms: float | None = None
    thinking_tpot_ms: float | None = None
    weight: float = 1.0
    best_effort: bool = False

    def __post_init__(self) -> None:
        for name in ("ttft_ms", "ttft_slowdown", "ttft_floor_ms", "tpot_ms", "thinking_tpot_ms", "weight"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and value > 0):
                raise ValueError(f"{name}: must be a positive number, got {value!r}")
        timed = (self.ttft_ms, self.ttft_slowdown, self.tpot_ms, self.thinking_tpot_ms)
        if self.best_effort:
            if any(value is not None for value in timed):
                raise ValueError("best_effort: true promises nothing, so it takes no ttft or tpot")
        elif (self.ttft_ms is None) == (self.ttft_slowdown is None):
            raise ValueError("ttft_ms, ttft_slowdown: exactly one of them must be given (or best_effort: true)")
        elif self.tpot_ms is None:
            raise ValueError("tpot_ms: must be given (or best_effort: true)")


# The SLOs of SLOs-Serve (arXiv 2504.08784, table 2) with a floor: a short prompt's bare multiple of its
# prefill time is about one iteration, which no scheduler can promise.
DEFAULT_CLASSES: Final[Mapping[str, SloClass]] = MappingProxyType(
    {
        "chatbot": SloClass(ttft_slowdown=5, tpot_ms=100),
        "coding": SloClass(ttft_slowdown=5, tpot_ms=50),
        "summarization": SloClass(ttft_slowdown=3, tpot_ms=100),
        "tool_calling": SloClass(ttft_slowdown=3, tpot_ms=50),
        "reasoning": SloClass(ttft_slowdown=3, tpot_ms=100, thinking_tpot_ms=50),
        "best_effort": SloClass(best_effort=True),
    }
)

DTYPES: Final = ("float32", "bfloat16", "float16")
MODES: Final = ("auto", "full", "trim", "governor", "shadow")
SPECULATION: Final = ("ngram", "draft_target", "eagle3", "mtp")


@dataclass(frozen=True, slots=True)
class TrtllmConfig:
    """What only the engine tensorrt_llm needs; the other settings of `EngineConfig` mean the same for it."""

    # How much the planner decides: full, trim (takes away from the stock batch), governor (only the queue in front)
    # or shadow (plans along, decides nothing). "auto": the most that the checks at start allow.
    mode: str = "auto"
    # GPUs of this replica. More make iterations shorter, and each sends more.
    tensor_parallel: int = 1
    # Share of the GPU memory that is free after loading, for keys and values. `kv_cache_mb` is not used.
    kv_fraction: float = 0.85
    # Prepare a batch while the one before it runs: hides the host's time, and the planner sees a state one batch old.
    overlap: bool = False
    # Keep the KV of ended requests for others with the same prefix.
    block_reuse: bool = True
    # Record decode-only batches as CUDA graphs: less host time, more start time and memory.
    cuda_graphs: bool = True
    # Drafting: "ngram", "draft_target" or "eagle3" (with `draft_model`), "mtp" (in the model); null: none.
    speculation: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode: must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.speculation is not None and self.speculation not in SPECULATION:
            raise ValueError(f"speculation: must be null or one of {', '.join(SPECULATION)}, got {self.speculation!r}")
        _check("tensor_parallel", self.tensor_parallel, _is_count, "an integer of at least 1", 1)
        if not (_is_number(self.kv_fraction) and 0 < self.kv_fraction < 1):
            raise ValueError(f"kv_fraction: must be a number between 0 and 1, got {self.kv_fraction!r}")
        for name in ("overlap", "block_reuse", "cuda_graphs"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: must be true or false, got {getattr(self, name)!r}")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """One replica: model, engine, scheduler, bounds. Each comment says what changes when the value grows."""

    engine: str = "torch"
    # A folder in Hugging Face format: relative to the model's version folder, or absolute. A larger model
    # makes every iteration longer.
    model: str = "target"
    # A smaller model of the same vocabulary that drafts tokens; null: drafts are looked up in the request's own text.
    draft_model: str | None = None
    # Weights and KV cache; narrower halves the memory and changes the rounding.
    dtype: str = "float32"
    # "auto" takes a GPU when there is one.
    device: str = "auto"
    # CPU threads of the tensor library; 0: one per core but one, which the server's own threads need. With as many
    # threads as cores an iteration waits for whatever else runs, and takes several times as long.
    num_threads: int = 0
    # Memory for keys and values: more lets more and longer requests run at once.
    kv_cache_mb: int = 256
    # Tokens per KV block: more means less bookkeeping, more waste at the end of each request, fewer prefix hits.
    block_tokens: int = 16
    # Longest prompt plus output: more admits longer requests, which hold KV for longer.
    max_context: int = 2048
    # Most tokens of one iteration: more raises throughput and the longest time between two tokens.
    max_batch_tokens: int = 512
    # Most requests of one iteration.
    max_batch_requests: int = 64
    # Most guesses per request and iteration (0: no speculation): more gains when drafts are good, else wastes compute.
    max_draft: int = 4
    # A name of slos_serve.scheduler.POLICIES.
    policy: str = "slos_serve"
    # A time model written by `slos-serve profile`, relative or absolute; null, or one of another host or
    # model: measured for a few seconds at start.
    profile: str | None = None
    # Application classes by name, and the one of a request that names none.
    classes: Mapping[str, SloClass] = field(default_factory=lambda: DEFAULT_CLASSES)
    default_class: str = "chatbot"
    # Most requests in flight, waiting ones included; beyond: OVERLOADED.
    max_requests: int = 512
    # Most prompt tokens waiting for their prefill; beyond: OVERLOADED. More means longer queues.
    max_queued_tokens: int = 131072
    # The token that ends the thinking stage early, where the vocabulary has it.
    think_end: str = "</think>"
    # Output length of a request that names none.
    default_max_tokens: int = 128
    # Token ids kept of recent sessions, so that their next round finds its KV; 0: none.
    session_tokens: int = 262144
    # Threads that send responses: four saturate Triton's response queue, one falls behind at 64 streams.
    sender_threads: int = 4
    # A file that every call to the scheduler is appended to, for `slos-serve replay`, relative or absolute; null: none.
    # It grows by some 10 KB a second under load.
    record: str | None = None
    # Seconds given to requests in flight when the model is unloaded; then they are answered UNAVAILABLE.
    shutdown_drain_s: float = 10.0
    # Settings of the engine tensorrt_llm.
    tensorrt_llm: TrtllmConfig = field(default_factory=TrtllmConfig)

    def __post_init__(self) -> None:
        for name in _COUNTS:
            _check(name, getattr(self, name), _is_count, f"an integer of at least {_COUNTS[name]}", _COUNTS[name])
        for name in ("engine", "model", "device", "policy", "think_end", "default_class"):
            _check(name, getattr(self, name), _is_text, "a non-empty string")
        for name in ("draft_model", "profile", "record"):
            value = getattr(self, name)
            if value is not None:
                _check(name, value, _is_text, "a non-empty string or null")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if not (_is_number(self.shutdown_drain_s) and self.shutdown_drain_s >= 0):
            raise ValueError(f"shutdown_drain_s: must be a number of at least 0, got {self.shutdown_drain_s!r}")
        if self.default_class not in self.classes:
            raise ValueError(
                f"default_class: must be one of {', '.join(sorted(self.classes))}, got {self.default_class!r}"
            )

    def to_json(self) -> dict[str, Any]:
        """The settings as `read_config` takes them."""
        data = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("classes", "tensorrt_llm")}
        data["tensorrt_llm"] = asdict(self.tensorrt_llm)
        data["classes"] = {
            name: {key: value for key, value in asdict(slo).items() if value is not None}
            for name, slo in self.classes.items()
        }
        return data


# Whole numbers and the least each may be.
_COUNTS: Final[Mapping[str, int]] = {
    "num_threads": 0,
    "kv_cache_mb": 1,
    "block_tokens": 1,
    "max_context": 2,
    "max_batch_tokens": 1,
    "max_batch_requests": 1,
    "max_draft": 0,
    "max_requests": 1,
    "max_queued_tokens": 1,
    "default_max_tokens": 1,
    "session_tokens": 0,
    "sender_threads": 1,
}


def _check(name: str, value: object, holds: Callable[..., bool], wanted: str, *limits: int) -> None:
    if not holds(value, *limits):
        raise ValueError(f"{name}: must be {wanted}, got {value!r}")


def _known(data: object, kind: type[Any], what: str) -> Mapping[str, Any]:
    if not isinstance(data, dict):
        raise ValueError(f"{what}: must be a JSON object, got {data!r}")
    names = [f.name for f in fields(kind)]
    unknown = sorted(set(data) - set(names))
    if unknown:
        raise ValueError(f"{what}: unknown key {unknown[0]!r}; known: {', '.join(names)}")
    return data


def _classes(data: object) -> Mapping[str, SloClass]:
    if not isinstance(data, dict) or not data:
        raise ValueError(f"classes: must be a JSON object with at least one class, got {data!r}")
    classes = {}
    for name, entry in data.items():
        try:
            classes[name] = SloClass(**_known(entry, SloClass, f"classes.{name}"))
        except ValueError as error:
            raise ValueError(f"classes.{name}: {error}") from error
    return MappingProxyType(classes)


def _trtllm(data: object) -> TrtllmConfig:
    try:
        return TrtllmConfig(**_known(data, TrtllmConfig, "its settings"))
    except ValueError as error:
        raise ValueError(f"tensorrt_llm: {error}") from error


def parse_config(text: str, source: str = "engine.json") -> EngineConfig:
    """The settings in `text`. Raises ValueError that starts with `source` and names the key."""
    try:
        data = dict(_known(json.loads(text), EngineConfig, "the settings"))
        if "classes" in data:
            data["classes"] = _classes(data["classes"])
        if "tensorrt_llm" in data:
            data["tensorrt_llm"] = _trtllm(data["tensorrt_llm"])
        return EngineConfig(**data)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def read_config(version_dir: Path) -> EngineConfig:
    """The settings of the model in `version_dir`. Raises FileNotFoundError or ValueError."""
    path = version_dir / "engine.json"
    return parse_config(path.read_text(encoding="utf-8"), str(path))
