"""Loads the model that the settings name into its engine, and says what its speed depends on."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import EngineConfig
from .tokenizer import Codec, Tokenizer
from .worker import ServingEngine


@dataclass(frozen=True, slots=True)
class Loaded:
    """An engine with its tokenizer, and the facts that its speed depends on."""

    engine: ServingEngine
    codec: Codec
    vocab_size: int
    host: Mapping[str, Any]
    model: Mapping[str, Any]
    think_end_id: int | None = None


def load_engine(config: EngineConfig, version_dir: Path) -> Loaded:
    """Load the model into the engine that the settings name. Raises ValueError for what cannot be loaded."""
    if config.engine == "tensorrt_llm":
        raise ValueError("engine: tensorrt_llm is measured by `slos-serve trtllm-check`, which writes its time model")
    if config.engine != "torch":
        raise ValueError(f"engine: must be one of torch, tensorrt_llm, got {config.engine!r}")
    import torch

    from .hf_model import load_model
    from .torch_engine import TorchEngine

    threads = config.num_threads or max(1, len(os.sched_getaffinity(0)) - 1)
    torch.set_num_threads(threads)
    folder = version_dir / config.model
    draft_folder = version_dir / config.draft_model if config.draft_model and config.max_draft else None
    target = load_model(folder, dtype=config.dtype, device=config.device, needs_tokenizer=True)
    draft = None if draft_folder is None else load_model(draft_folder, dtype=config.dtype, device=config.device)
    codec = Tokenizer(folder)
    think_end_id = codec.token_id(config.think_end)
    engine = TorchEngine(
        target,
        draft,
        kv_cache_bytes=config.kv_cache_mb * 2**20,
        block_tokens=config.block_tokens,
        max_context=config.max_context,
        max_batch_tokens=config.max_batch_tokens,
        max_batch_requests=config.max_batch_requests,
        max_draft=config.max_draft,
        think_end_id=think_end_id,
    )
    return Loaded(
        engine,
        codec,
        target.vocab_size,
        host_facts(str(target.device), threads),
        model_facts(config.engine, folder, draft_folder, config.dtype),
        think_end_id,
    )


def host_facts(device: str, num_threads: int) -> dict[str, Any]:
    """What the speed of an engine depends on, as far as this machine says it."""
    import torch

    gpu = torch.cuda.get_device_name() if device.startswith("cuda") else None
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "device": device,
        "threads": num_threads,
        "torch": torch.__version__,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def model_facts(engine: str, folder: Path, draft: Path | None, dtype: str) -> dict[str, Any]:
    """What the speed of a model depends on: its shape, not its weights."""
    return {
        "engine": engine,
        "model": _fingerprint(folder),
        "draft_model": None if draft is None else _fingerprint(draft),
        "dtype": dtype,
    }


def _fingerprint(folder: Path) -> str:
    return hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()[:16]


def weights_fingerprint(folder: Path, dtype: str, sample: int = 1 << 16) -> str:
    """Tells models of different answers apart: settings, tokenizer, and the size and end of every weight file."""
    digest = hashlib.sha256(dtype.encode())
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        if path.suffix not in (".json", ".safetensors", ".bin", ".model", ".txt"):
            continue
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(0 if path.suffix == ".json" else max(0, size - sample))
            digest.update(f"{path.name} {size} ".encode() + file.read())
    return digest.hexdigest()[:16]
