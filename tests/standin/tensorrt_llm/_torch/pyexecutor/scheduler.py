"""The abstract scheduler and its output, as this release has them."""

from trtllm_llm import RELEASE
from trtllm_standin import api

RequestScheduler = api(RELEASE).RequestScheduler
SchedulerOutput = api(RELEASE).SchedulerOutput
