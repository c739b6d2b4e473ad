"""Retired in 1.3."""

import trtllm_llm

if trtllm_llm.RELEASE.switches:
    raise ImportError("the TensorRT backend has been retired")

LLM = trtllm_llm.CompiledLLM
