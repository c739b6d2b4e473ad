"""What is asked of TensorRT-LLM, checked before it is loaded: settings, device, folders. Imports nothing of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from slos_serve.scheduler import POLICIES

from .config import EngineConfig
from .tokenizer import Tokenizer

LEAST_SM: Final = 80  # A100; older ones lack bfloat16 and the paged attention kernels


def check_settings(config: EngineConfig, version_dir: Path) -> None:
    """Raise ValueError for settings that contradict each other or cannot be served."""
    own = config.tensorrt_llm
    if config.policy not in POLICIES:
        raise ValueError(f"policy: must be one of {', '.join(POLICIES)}, got {config.policy!r}")
    if config.dtype == "float32":
        raise ValueError("dtype: tensorrt_llm computes in bfloat16 or float16, got 'float32'")
    if own.speculation in ("draft_target", "eagle3") and not config.draft_model:
        raise ValueError(f"draft_model: speculation {own.speculation!r} needs one, got null")
    if own.speculation in ("ngram", "mtp") and config.draft_model:
        raise ValueError(f"draft_model: speculation {own.speculation!r} has none, got {config.draft_model!r}")
    if own.speculation and not config.max_draft:
        raise ValueError(f"max_draft: speculation {own.speculation!r} needs at least 1, got 0")
    if own.speculation and own.overlap and own.mode not in ("governor", "shadow"):
        raise ValueError("overlap: must be false with speculation, but in mode governor or shadow")
    if config.block_tokens & (config.block_tokens - 1):
        raise ValueError(f"block_tokens: must be a power of two, got {config.block_tokens}")
    if config.max_batch_tokens < config.block_tokens:
        raise ValueError(
            f"max_batch_tokens: must hold one block of {config.block_tokens} tokens, got {config.max_batch_tokens}"
        )
    if config.profile and not (version_dir / config.profile).exists():
        raise ValueError(f"profile: there is no file {version_dir / config.profile}; set null to measure at start")
    if config.draft_model:
        _check_vocabularies(version_dir / config.model, version_dir / config.draft_model, own.speculation)


def _check_vocabularies(target: Path, draft: Path, kind: str | None) -> None:
    sizes = [_read(folder / "config.json").get("vocab_size") for folder in (target, draft)]
    if kind == "draft_target" and sizes[0] != sizes[1]:
        raise ValueError(f"draft_model: {draft} has a vocabulary of {sizes[1]}, {target} one of {sizes[0]}")


def check_compiled(folder: Path, config: EngineConfig) -> None:
    """Raise ValueError for a compiled engine that cannot be served, or not by these settings."""
    data = _read(folder / "config.json")
    built, plugins = data.get("build_config", {}), data.get("build_config", {}).get("plugin_config", {})
    for name, text in (("paged_kv_cache", "a paged KV cache"), ("use_paged_context_fmha", "chunked context")):
        if plugins.get(name) is False:
            raise ValueError(f"model: {folder} was built without {text}: build it again with {name} enabled")
    ranks = len(list(folder.glob("rank*.engine")))
    if ranks != config.tensorrt_llm.tensor_parallel:
        raise ValueError(f"tensor_parallel: {folder} was built for {ranks}, got {config.tensorrt_llm.tensor_parallel}")
    for ours, theirs in (("max_batch_tokens", "max_num_tokens"), ("max_context", "max_seq_len")):
        most, asked = built.get(theirs), getattr(config, ours)
        if most is not None and asked > most:
            raise ValueError(f"{ours}: {folder} was built for at most {most}, got {asked}")
    if config.tensorrt_llm.mode not in ("auto", "governor"):
        raise ValueError(f"mode: a compiled engine can only be governed, got {config.tensorrt_llm.mode!r}")


def check_built_by(folder: Path, version: str) -> None:
    """Raise ValueError where a compiled engine is another release's: its plan is one TensorRT version's alone."""
    built = str(_read(folder / "config.json").get("version", ""))
    if built and built.split(".")[:2] != version.split(".")[:2]:
        raise ValueError(f"model: {folder} was built by TensorRT-LLM {built}, this is {version}: build it again")


def check_device(tensor_parallel: int) -> None:
    """Raise ValueError where there is no GPU that TensorRT-LLM runs on, or too few."""
    import torch

    count = torch.cuda.device_count()
    if count < tensor_parallel:
        raise ValueError(f"tensor_parallel: {tensor_parallel} GPUs are needed, {count} are there")
    major, minor = torch.cuda.get_device_capability()
    if 10 * major + minor < LEAST_SM:
        raise ValueError(
            f"device: {torch.cuda.get_device_name()} has compute capability {major}.{minor}, at least 8.0 is needed"
        )


# The folder


def end_ids(folder: Path) -> tuple[int, ...]:
    """The tokens that end a text, of the generation settings or the model's."""
    for name in ("generation_config.json", "config.json"):
        found = _read(folder / name).get("eos_token_id") if (folder / name).exists() else None
        if found is not None:
            return tuple(found) if isinstance(found, list) else (int(found),)
    return ()


def vocab_size(folder: Path, codec: Tokenizer) -> int:
    data = _read(folder / "config.json")
    return int(data.get("vocab_size") or data.get("pretrained_config", {}).get("vocab_size") or codec.vocab_size)


def _read(path: Path) -> dict[str, Any]:
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"model: {path} is not JSON: {error}") from error
    return data
