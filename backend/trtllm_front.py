"""TensorRT-LLM's LLM API as the worker sees it: requests go in, token ids come out. Runs on its asyncio loop."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from slos_serve.scheduler import Request

from .generation import Generation, SamplingParams
from .trtllm_pilot import Ticket
from .trtllm_worker import Fresh, Tickets


class LlmHandle:
    """One generation of TensorRT-LLM's LLM API."""

    def __init__(self, output: Any, finishes_prompts: bool = False) -> None:
        """`finishes_prompts`: see `abort`."""
        self._output = output
        self._given = 0
        self._finishes_prompts = finishes_prompts
        self._least = 1 if finishes_prompts else 0  # tokens before which it is not given up
        self._is_unwanted = False

    @property
    def client_id(self) -> int:
        return int(self._output.request_id)

    async def results(self) -> AsyncIterator[Fresh]:
        async for output in self._output:
            completion = output.outputs[0]
            new = tuple(completion.token_ids[self._given :])
            self._given += len(new)
            self._stop_if_unwanted()
            reason = str(completion.finish_reason or "length") if output.finished else None
            yield Fresh(new, reason)
            if reason is not None:
                return

    def abort(self) -> None:
        """Give it up; with `finishes_prompts` not before its first token, so somebody must go on reading `results`.

        With block reuse, releases before PR 12673 hand on the blocks of a prompt that was given up in its middle as
        if they had been computed, and others with the same beginning would read what is not there.
        """
        self._is_unwanted = True
        self._stop_if_unwanted()

    def restarts(self) -> None:
        """It was paused: all that it knows is a prompt again."""
        if self._finishes_prompts:
            self._least = self._given + 1

    def _stop_if_unwanted(self) -> None:
        if self._is_unwanted and self._given >= self._least and not self._output.finished:
            self._output.abort()


class LlmFront:
    """TensorRT-LLM's LLM: what goes in and out of it. `engine` is its PyExecutor where that is in this process."""

    def __init__(
        self,
        llm: Any,
        make_params: Any,
        end_ids: Sequence[int],
        engine: Any,
        closes: Callable[[], None],
        takes_priority: bool = False,
        finishes_prompts: bool = False,
    ) -> None:
        """`closes` is called when the engine is gone; `takes_priority`: its waiting queue is ordered by it;
        `finishes_prompts`: see `LlmHandle.abort`."""
        self._closes = closes
        self._finishes_prompts = finishes_prompts
        self._takes_priority = takes_priority
        self._llm = llm
        self._make_params = make_params
        self._end_ids = tuple(end_ids)
        self.engine = engine

    @property
    def is_alive(self) -> bool:
        thread = getattr(self.engine, "worker_thread", None)
        return thread is None or bool(thread.is_alive())

    def generate(
        self, generation: Generation, already: Sequence[int], tickets: Tickets, ticket: Ticket | None
    ) -> LlmHandle:
        """Start one; `already` was generated before it was taken back. Raises ValueError for what is refused."""
        left = sum(generation.stage_limits) - len(already)
        params = self._make_params(**sampling_arguments(generation.sampling, left, self._end_ids))
        with tickets.lock:
            output = self._llm.generate_async(
                [*generation.token_ids, *already], params, streaming=True, **self._priority(ticket)
            )
            if ticket is not None:
                tickets[int(output.request_id)] = ticket
        return LlmHandle(output, self._finishes_prompts)

    def _priority(self, ticket: Ticket | None) -> dict[str, float]:
        return {"priority": priority(ticket.request)} if self._takes_priority and ticket is not None else {}

    def shutdown(self) -> None:
        """End the engine and let go of it: it holds the GPU's memory. The second time does nothing."""
        llm, self._llm, self.engine = self._llm, None, None
        if llm is not None:
            llm.shutdown()
            self._closes()


def priority(request: Request) -> float:
    """Between 0 and 1, 0.5 being what a request has that says nothing: promises above it, the tightest highest."""
    slo = request.stages[0].slo
    return 0.0 if slo is None else 0.5 + 0.5 / (1.0 + slo.ttft)


def sampling_arguments(sampling: SamplingParams, max_tokens: int, end_ids: Sequence[int]) -> dict[str, Any]:
    """Arguments of TensorRT-LLM's SamplingParams. Greedy is a top-k of 1 there; seeds draw other numbers than ours."""
    ends = (sampling.end_id,) if sampling.end_id is not None else tuple(end_ids)
    arguments: dict[str, Any] = {
        "max_tokens": max_tokens,
        "end_id": ends[0] if ends else -1,
        "pad_id": ends[0] if ends else 0,
        "ignore_eos": sampling.ignore_eos,
        "min_tokens": sampling.min_tokens or None,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "detokenize": False,
    }
    if len(ends) > 1 and not sampling.ignore_eos:
        arguments["stop_token_ids"] = list(ends[1:])
    if sampling.is_greedy:
        return {**arguments, "top_k": 1}
    return {
        **arguments,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": max(sampling.top_k, 0),
        "min_p": sampling.min_p,
        "seed": sampling.seed,
    }
