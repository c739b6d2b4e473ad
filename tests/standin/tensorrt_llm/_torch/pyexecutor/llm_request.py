from trtllm_standin import LlmRequest, LlmRequestState

__all__ = ["LlmRequest", "LlmRequestState"]
