"""Settings classes, as in tensorrt_llm/llmapi/llm_args.py."""

from trtllm_llm import (
    CapacitySchedulerPolicy,
    DraftTargetDecodingConfig,
    KvCacheConfig,
    NGramDecodingConfig,
    SchedulerConfig,
)

__all__ = [
    "CapacitySchedulerPolicy",
    "DraftTargetDecodingConfig",
    "KvCacheConfig",
    "NGramDecodingConfig",
    "SchedulerConfig",
]
