"""Settings classes, as in tensorrt_llm/llmapi/llm_args.py. 1.3 calls Eagle of the third kind by its name."""

import trtllm_llm
from trtllm_llm import (
    CapacitySchedulerPolicy,
    DraftTargetDecodingConfig,
    KvCacheConfig,
    MTPDecodingConfig,
    NGramDecodingConfig,
    SchedulerConfig,
)

__all__ = [
    "CapacitySchedulerPolicy",
    "DraftTargetDecodingConfig",
    "KvCacheConfig",
    "MTPDecodingConfig",
    "NGramDecodingConfig",
    "SchedulerConfig",
]

if trtllm_llm.RELEASE.switches:
    Eagle3DecodingConfig = trtllm_llm.EagleDecodingConfig
else:
    EagleDecodingConfig = trtllm_llm.EagleDecodingConfig
