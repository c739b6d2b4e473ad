from trtllm_standin import Executor as PyExecutor

__all__ = ["PyExecutor"]
