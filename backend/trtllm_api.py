"""Every name that is taken from TensorRT-LLM, in one place; nothing else here imports it.

Imported when an engine is built and not before: the device must have been chosen by then, and a machine
without TensorRT-LLM runs everything else.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any, Final

# Left by an MPI launcher around the server, they would make TensorRT-LLM's own processes join its world.
LAUNCHER_PREFIXES: Final = ("OMPI_", "PMIX_", "PMI_")
MODULES: Final[Mapping[str, tuple[str, ...]]] = {
    "tensorrt_llm": ("LLM", "SamplingParams"),
    "tensorrt_llm.llmapi": ("KvCacheConfig", "SchedulerConfig", "CapacitySchedulerPolicy"),
}
INNER: Final[Mapping[str, tuple[str, ...]]] = {
    "tensorrt_llm._torch.pyexecutor.scheduler": ("RequestScheduler", "SchedulerOutput"),
    "tensorrt_llm._torch.pyexecutor.llm_request": ("LlmRequest", "LlmRequestState"),
    "tensorrt_llm._torch.pyexecutor.py_executor": ("PyExecutor",),
}
# The first name that is there. Eagle of the third kind got a name of its own in 1.3.
SPECULATION: Final[Mapping[str, tuple[str, ...]]] = {
    "ngram": ("NGramDecodingConfig",),
    "draft_target": ("DraftTargetDecodingConfig",),
    "eagle3": ("Eagle3DecodingConfig", "EagleDecodingConfig"),
    "mtp": ("MTPDecodingConfig",),
}


class Api:
    """The names as attributes. `has_inner`: PyExecutor and its kin are where they were; else only the front is ours."""

    def __init__(self, names: Mapping[str, Any], version: str, missing: tuple[str, ...]) -> None:
        self.__dict__.update(names)
        self.version = version
        self.missing = missing

    def __getattr__(self, name: str) -> Any:  # for the reader's and the type checker's sake: names are set above
        raise AttributeError(f"TensorRT-LLM {self.version} has no {name}")

    @property
    def has_inner(self) -> bool:
        return not self.missing


def load() -> Api:
    """Import TensorRT-LLM. Raises ValueError that says what is missing and where it comes from."""
    os.environ.setdefault("TLLM_WORKER_USE_SINGLE_PROCESS", "1")
    for name in [name for name in os.environ if name.startswith(LAUNCHER_PREFIXES)]:
        del os.environ[name]
    try:
        names = _names(MODULES)
        version = str(importlib.import_module("tensorrt_llm").__version__)
    except (ImportError, OSError, AttributeError) as error:
        raise ValueError(
            f"engine: tensorrt_llm cannot be imported ({error}); it comes with NVIDIA's image "
            "nvcr.io/nvidia/tritonserver:YY.MM-trtllm-python-py3 (see docker/), not with this package"
        ) from error
    missing: tuple[str, ...] = ()
    try:
        names |= _names(INNER)
    except (ImportError, AttributeError) as error:
        missing = (str(error),)
    return Api(names, version, missing)


def speculation(kind: str) -> Any:
    """The configuration class of a kind of speculation. Raises ValueError where this release has none."""
    module = importlib.import_module("tensorrt_llm.llmapi")
    for name in SPECULATION[kind]:
        if hasattr(module, name):
            return getattr(module, name)
    raise ValueError(f"speculation: this TensorRT-LLM has no {SPECULATION[kind][-1]} for {kind!r}")


def compiled_llm() -> Any:
    """LLM for compiled engine folders. Raises ValueError where this release has retired them."""
    try:
        return importlib.import_module("tensorrt_llm._tensorrt_engine").LLM
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"model: a compiled engine folder, and this TensorRT-LLM runs none ({error}); "
            "give the Hugging Face folder, or use an image with TensorRT-LLM 1.2 or older"
        ) from error


def _names(modules: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for module, names in modules.items():
        loaded = importlib.import_module(module)
        found |= {name: getattr(loaded, name) for name in names}
    return found
