"""Stands in for the package: the names that ours imports, from the stand-in. `STANDIN_GPU` pretends an A100.

It may say "not PID": for the children of that process only.
"""

import os

import trtllm_llm
from trtllm_llm import RELEASE, SamplingParams

__all__ = ["LLM", "SamplingParams"]
LLM = trtllm_llm.PriorityLLM if RELEASE.switches else trtllm_llm.LLM
__version__ = f"{RELEASE.name}.0+standin"

if os.environ.get("STANDIN_GPU", f"not {os.getpid()}") != f"not {os.getpid()}":
    import torch

    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_capability = lambda *_: (8, 0)
    torch.cuda.get_device_name = lambda *_: "NVIDIA A100-SXM4-80GB (pretended)"
