"""What the planner may know of TensorRT-LLM's requests, read once per iteration. Reads, never writes.

The only attributes read of an `LlmRequest` (`tensorrt_llm/_torch/pyexecutor/llm_request.py` and its C++ half)
are those of `REQUEST_ATTRIBUTES`; the probe checks that they are there.

With overlap the scheduler is called while the batch before is still running, so its tokens are not on the
host yet. `believed` counts them: what a request will know when the batch that is planned now starts.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Final

REQUEST_ATTRIBUTES: Final = (
    "request_id", "py_client_id", "state", "context_current_position", "context_chunk_size", "orig_prompt_len",
    "prompt_len", "get_num_tokens", "get_tokens", "num_draft_tokens", "py_batch_idx", "py_max_new_tokens", "is_dummy",
)  # fmt: skip


class Phase(enum.Enum):
    """Where a request stands for the engine."""

    NEW = "new"  # holds nothing: never scheduled, or paused
    PREFILL = "prefill"  # inside its prompt; holds a slot and the blocks of the whole prompt
    DECODE = "decode"
    RETIRING = "retiring"  # will end with the batch that runs; must not be scheduled, still holds everything
    FOREIGN = "foreign"  # a padding dummy or a state of disaggregated serving: not ours to move


@dataclass(slots=True, eq=False)
class Seen:
    """One active request. `position` of its `prompt` tokens are computed; `tokens` are on the host."""

    request: Any
    number: int  # the engine's id
    client: int  # the front's id
    phase: Phase
    position: int
    prompt: int
    tokens: int
    is_running: bool  # in the batch that is still on the device

    @property
    def name(self) -> str:
        """Its id for the planner."""
        return str(self.number)

    @property
    def believed(self) -> int:
        """Tokens, one more where the batch on the device gives it one: a decode, or a prompt that has just ended.

        Which prompts end is seen here, after the fact: a prefix hit can end one earlier than it was planned.
        """
        return self.tokens + (self.is_running and self.phase in (Phase.DECODE, Phase.RETIRING))

    @property
    def left(self) -> int:
        """Prompt tokens to compute."""
        return self.prompt - self.position

    @property
    def computed(self) -> int:
        """Tokens that will have keys and values when the next batch starts."""
        return self.believed - 1 if self.phase in (Phase.DECODE, Phase.RETIRING) else self.position

    @property
    def is_started(self) -> bool:
        """Whether it holds a slot and blocks."""
        return self.phase in (Phase.PREFILL, Phase.DECODE, Phase.RETIRING)

    @property
    def is_runnable(self) -> bool:
        return self.phase in (Phase.NEW, Phase.PREFILL, Phase.DECODE)

    @property
    def draft(self) -> int:
        """Guesses that the engine has set for it, read when asked: they change after the first look."""
        return int(self.request.num_draft_tokens)


def look(active: Iterable[Any], states: Any, running: Collection[int]) -> list[Seen]:
    """All active requests, in the engine's order. `states` is `LlmRequestState`, `running` the engine's ids of the
    requests in the batch that is still on the device."""
    phases = {
        states.CONTEXT_INIT: Phase.NEW,
        states.GENERATION_IN_PROGRESS: Phase.DECODE,
        states.GENERATION_TO_COMPLETE: Phase.RETIRING,
    }
    return [_see(request, phases, running) for request in active]


def _see(request: Any, phases: dict[Any, Phase], running: Collection[int]) -> Seen:
    phase = Phase.FOREIGN if request.is_dummy else phases.get(request.state, Phase.FOREIGN)
    position = int(request.context_current_position) if phase is Phase.NEW else 0
    if position:
        phase = Phase.PREFILL
    number = int(request.request_id)
    return Seen(
        request=request,
        number=number,
        client=request.py_client_id,
        phase=phase,
        position=position,
        prompt=int(request.prompt_len),
        tokens=int(request.get_num_tokens(0)),
        is_running=number in running,
    )
