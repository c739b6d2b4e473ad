"""TensorRT-LLM's own settings, from ours: what is forced on it, and the official switches where a release has them.

    SchedulerConfig.use_python_scheduler     (PR 11884) the stock scheduler in Python, on the very request objects
    SchedulerConfig.waiting_queue_policy     (PR 11330; "priority" since PR 12362) order in front of the active list,
      and generate_async(priority=...)       by the promise; without both the queue is first come, first served
    draft_len_schedule                       guesses per decode by batch size. A drafter asks it anew for each batch,
                                             and the planner answers in its place (`trtllm_engine.install`); where the
                                             engine looks lengths up by itself (PR 10860) they follow the time model
    KvCacheConfig.use_kv_cache_manager_v2    off: that one allocates inside its own scheduler

A switch is there when its field or its argument is; versions are not compared.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from slos_serve.scheduler import BatchShape, PerfModel

from . import trtllm_api
from .config import EngineConfig

ACCEPTANCE: Final = 0.7  # share of right guesses that a schedule counts on: nobody has guessed yet
CONTEXT: Final = 1024  # tokens per decode that it counts on


def load(config: EngineConfig, version_dir: Path, api: Any, is_compiled: bool, perf: PerfModel | None) -> Any:
    """The LLM. `perf` is the time model where it is known beforehand. Raises ValueError when it cannot be loaded."""
    own = config.tensorrt_llm
    arguments: dict[str, Any] = {
        "model": str(version_dir / config.model),
        "tensor_parallel_size": own.tensor_parallel,
        "skip_tokenizer_init": True,
        "kv_cache_config": _kv_cache(config, api),
        "enable_chunked_prefill": True,
    }
    if not is_compiled:
        arguments |= {
            "dtype": config.dtype,
            "max_batch_size": config.max_batch_requests,
            "max_num_tokens": config.max_batch_tokens,
            "max_seq_len": config.max_context,
            "disable_overlap_scheduler": not own.overlap,
            "scheduler_config": _scheduler(api),
            "enable_iter_perf_stats": True,
        }
        if not own.cuda_graphs:
            arguments["cuda_graph_config"] = None
        if own.speculation is not None:
            arguments["speculative_config"] = _speculation(config, version_dir, perf)
    make = trtllm_api.compiled_llm() if is_compiled else api.LLM
    try:
        return make(**arguments)
    except Exception as error:
        raise ValueError(
            f"engine: tensorrt_llm {api.version} cannot load {arguments['model']}: {type(error).__name__}: {error}"
        ) from error


def _kv_cache(config: EngineConfig, api: Any) -> Any:
    values: dict[str, Any] = {
        "free_gpu_memory_fraction": config.tensorrt_llm.kv_fraction,
        "enable_block_reuse": config.tensorrt_llm.block_reuse,
        "tokens_per_block": config.block_tokens,
    }
    if "use_kv_cache_manager_v2" in known_fields(api.KvCacheConfig):
        values["use_kv_cache_manager_v2"] = False
    return api.KvCacheConfig(**values)


def _scheduler(api: Any) -> Any:
    """What the stock scheduler does by itself, and under us as a fallback: nobody is let in who may not be finished."""
    known = known_fields(api.SchedulerConfig)
    values: dict[str, Any] = {"capacity_scheduler_policy": api.CapacitySchedulerPolicy.GUARANTEED_NO_EVICT}
    if "use_python_scheduler" in known:
        values["use_python_scheduler"] = True
    if takes_priority(api):
        values["waiting_queue_policy"] = "priority"
    return api.SchedulerConfig(**values)


def takes_priority(api: Any) -> bool:
    """Whether requests can be given a priority that orders the engine's waiting queue."""
    field = known_fields(api.SchedulerConfig).get("waiting_queue_policy")
    policies = getattr(field, "annotation", field)
    return hasattr(policies, "PRIORITY") and "priority" in inspect.signature(api.LLM.generate_async).parameters


def _speculation(config: EngineConfig, version_dir: Path, perf: PerfModel | None) -> Any:
    kind = config.tensorrt_llm.speculation
    assert kind is not None
    make = trtllm_api.speculation(kind)
    known = known_fields(make)
    # MTP counts its layers; other kinds, and newer releases of it, count guesses.
    length = "num_nextn_predict_layers" if "num_nextn_predict_layers" in known else "max_draft_len"
    arguments: dict[str, Any] = {length: config.max_draft}
    if config.draft_model:
        name = "speculative_model" if "speculative_model" in known else "speculative_model_dir"
        arguments[name] = str(version_dir / config.draft_model)
    if "draft_len_schedule" not in known:
        return make(**arguments)
    looks_up = getattr(getattr(make(**arguments), "spec_dec_mode", None), "support_dynamic_draft_len", None)
    if looks_up is not None and looks_up():
        if perf is not None:
            arguments["draft_len_schedule"] = draft_schedule(perf, config.max_draft, config.max_batch_requests)
    elif kind in ("ngram", "draft_target"):
        # Always the most, whether a key says from which batch size on (up to 1.2) or up to which (later). What
        # counts is that there is a schedule: with it the drafter is asked for the length of each batch.
        arguments["draft_len_schedule"] = dict.fromkeys((1, config.max_batch_requests), config.max_draft)
    return make(**arguments)


def draft_schedule(perf: PerfModel, most: int, largest: int) -> dict[int, int]:
    """How many guesses bring the most tokens per second, by the largest batch size each number is for.

    The smallest key has `most`, which the engine demands. One guess at least: a drafter inside the model that pauses
    finds holes in its own cache when it goes on (PR 16888).
    """
    sizes = [2**power for power in range(largest.bit_length()) if 2**power < largest] + [largest]
    schedule: dict[int, int] = {}
    longest = most
    for size in sizes:
        longest = max(range(1, longest + 1), key=lambda guesses: _tokens_per_second(perf, size, guesses))
        schedule[size] = longest if schedule else most
    return schedule


def _tokens_per_second(perf: PerfModel, size: int, guesses: int) -> float:
    kept = sum(ACCEPTANCE**i for i in range(guesses + 1))
    return size * kept / perf.seconds(BatchShape(size * (1 + guesses), size * CONTEXT, 0.0, guesses))


def known_fields(model: Any) -> Mapping[str, Any]:
    """The settings that a configuration class of TensorRT-LLM knows, by name."""
    return getattr(model, "model_fields", None) or getattr(model, "__annotations__", {})
