"""The LLM API over the stand-in executor: a thread that turns its loop, and results as asyncio iterators.

Mirrors tensorrt_llm/llmapi/llm.py and executor/result.py as far as a front needs them, and their settings classes
as far as they are given. `STANDIN_RELEASE` chooses the release, `STANDIN_PACE` the seconds of an iteration.
"""

from __future__ import annotations

import asyncio
import enum
import itertools
import json
import os
import queue
import threading
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from trtllm_standin import DEFAULT_PRIORITY, RELEASES, Dist, Drafter, Executor, guarded

RELEASE = {release.name: release for release in RELEASES}[os.environ.get("STANDIN_RELEASE", "1.2")]


class Field:
    """What a pydantic model tells about one of its fields."""

    def __init__(self, annotation: Any = Any) -> None:
        self.annotation = annotation


class Settings:
    """A configuration object that takes the keys it knows, like upstream's strict models."""

    model_fields: ClassVar[dict[str, Field]] = {}

    def __init__(self, **values: Any) -> None:
        unknown = set(values) - set(self.model_fields)
        if unknown:
            raise ValueError(f"{type(self).__name__}: unexpected {sorted(unknown)}")
        for name in self.model_fields:
            setattr(self, name, values.get(name))


def fields(*names: str, later: Sequence[str] = (), **typed: Any) -> dict[str, Field]:
    """Fields of all releases, and those that came with the official switches."""
    new = {**{name: Field() for name in later}, **{name: Field(kind) for name, kind in typed.items()}}
    return {**{name: Field() for name in names}, **(new if RELEASE.switches else {})}


class KvCacheConfig(Settings):
    model_fields = fields(
        "free_gpu_memory_fraction", "enable_block_reuse", "tokens_per_block", later=["use_kv_cache_manager_v2"]
    )


class CapacitySchedulerPolicy(enum.Enum):
    GUARANTEED_NO_EVICT = "GUARANTEED_NO_EVICT"
    MAX_UTILIZATION = "MAX_UTILIZATION"


class WaitingQueuePolicy(enum.Enum):
    FCFS = "fcfs"
    PRIORITY = "priority"


class SchedulerConfig(Settings):
    model_fields = fields(
        "capacity_scheduler_policy", "context_chunking_policy", "dynamic_batch_config",
        later=["use_python_scheduler", "enable_prefix_aware_scheduling"], waiting_queue_policy=WaitingQueuePolicy,
    )  # fmt: skip

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        if "waiting_queue_policy" in values:
            self.waiting_queue_policy = self.model_fields["waiting_queue_policy"].annotation(
                values["waiting_queue_policy"]
            )


class SpeculativeDecodingMode:
    """_torch/speculative/interface.py. Whether the engine looks draft lengths up by itself is asked since 1.3."""

    def __init__(self, inner: bool) -> None:
        if RELEASE.switches:
            self.support_dynamic_draft_len = lambda: inner


class DecodingConfig(Settings):
    """Base of what follows: its check of the schedule is that of DecodingBaseConfig, before and since 1.3."""

    is_inner = False

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        schedule, most = self.draft_len_schedule, self.max_draft_len  # type: ignore[attr-defined]
        if schedule is not None:
            first = min(schedule) if RELEASE.switches else 1
            if schedule.get(first) != most or max(schedule.values()) > most or min(schedule) < 1:
                raise ValueError(f"draft_len_schedule[{first}] must equal max_draft_len {most}, got {schedule}")

    @property
    def spec_dec_mode(self) -> SpeculativeDecodingMode:
        return SpeculativeDecodingMode(self.is_inner)


class NGramDecodingConfig(DecodingConfig):
    model_fields = fields("max_draft_len", "draft_len_schedule", "max_matching_ngram_size")


class DraftTargetDecodingConfig(DecodingConfig):
    model_fields = fields("max_draft_len", "draft_len_schedule", "speculative_model")


class EagleDecodingConfig(DecodingConfig):
    """Guesses inside the model, unless told otherwise."""

    model_fields = fields("max_draft_len", "draft_len_schedule", "speculative_model", "eagle3_one_model")
    is_inner = True


class MTPDecodingConfig(DecodingConfig):
    model_fields = fields("num_nextn_predict_layers", "max_draft_len", "draft_len_schedule")
    is_inner = True

    def __init__(self, **values: Any) -> None:
        super().__init__(**{"max_draft_len": values.get("num_nextn_predict_layers"), **values})


class SamplingParams(Settings):
    model_fields = fields(
        "max_tokens", "end_id", "pad_id", "ignore_eos", "min_tokens", "repetition_penalty", "presence_penalty",
        "frequency_penalty", "detokenize", "stop_token_ids", "temperature", "top_p", "top_k", "min_p", "seed",
    )  # fmt: skip


class Completion:
    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None


class RequestOutput:
    """One generation; an asynchronous iterator over itself, one turn per response."""

    def __init__(self, llm: LLM, request_id: int) -> None:
        self.request_id = request_id
        self.outputs = [Completion()]
        self.finished = False
        self._llm = llm
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[tuple[list[int], str | None]] = asyncio.Queue()

    def abort(self) -> None:
        self._llm.calls.put(("cancel", self.request_id))

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        return self

    async def __anext__(self) -> RequestOutput:
        if self.finished:
            raise StopAsyncIteration
        tokens, reason = await self._news.get()
        if reason == "error":
            raise RuntimeError("the event loop has ended")
        self.outputs[0].token_ids += tokens
        self.outputs[0].finish_reason = reason
        self.finished = reason is not None
        return self

    def push(self, tokens: list[int], reason: str | None) -> None:
        self._loop.call_soon_threadsafe(self._news.put_nowait, (tokens, reason))


class Worker:
    """GenerationExecutorWorker, in the same process: its engine is an attribute."""

    def __init__(self, engine: Executor) -> None:
        self.engine = engine


class LLM:
    """Takes the arguments that the real one takes, and refuses others."""

    known = (
        "model", "tensor_parallel_size", "skip_tokenizer_init", "kv_cache_config", "enable_chunked_prefill", "dtype",
        "max_batch_size", "max_num_tokens", "max_seq_len", "disable_overlap_scheduler", "scheduler_config",
        "enable_iter_perf_stats", "cuda_graph_config", "speculative_config",
    )  # fmt: skip

    def __init__(self, **arguments: Any) -> None:
        unknown = set(arguments) - set(self.known)
        if unknown:
            raise ValueError(f"LLM: unexpected {sorted(unknown)}")
        self.args = arguments
        self.calls: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._ids = itertools.count(1)
        self._outputs: dict[int, RequestOutput] = {}
        self._stop = False
        self.fails_at = int(os.environ.get("STANDIN_FAILS_AT", "-1"))
        pace = float(os.environ.get("STANDIN_PACE", "0.002"))
        size = int(arguments["kv_cache_config"].tokens_per_block)
        blocks = 2 + 6 * -(-arguments["max_seq_len"] // size)
        drafting = arguments.get("speculative_config")
        config = json.loads((Path(arguments["model"]) / "config.json").read_text())
        config = config.get("pretrained_config", config)  # of a compiled folder
        ranks = int(arguments["tensor_parallel_size"])
        from tensorrt_llm._torch.pyexecutor.py_executor_creator import create_py_executor

        inboxes: tuple[Any, ...] = tuple(queue.SimpleQueue() for _ in range(ranks))
        make = partial(
            create_py_executor, RELEASE, overlap=not arguments["disable_overlap_scheduler"],
            num_blocks=blocks, tokens_per_block=size,
            max_batch_size=arguments["max_batch_size"], max_num_tokens=arguments["max_num_tokens"],
            reuse=bool(arguments["kv_cache_config"].enable_block_reuse),
            drafter=None if drafting is None or drafting.is_inner else guesser(drafting),
            inner=guesser(drafting) if drafting is not None and drafting.is_inner else None,
            python_scheduler=bool(getattr(arguments["scheduler_config"], "use_python_scheduler", False)),
            by_priority=getattr(arguments["scheduler_config"], "waiting_queue_policy", None)
            is WaitingQueuePolicy.PRIORITY,
            seconds=lambda tokens, context: pace * (1 + tokens / 200), vocabulary=int(config["vocab_size"]),
        )  # fmt: skip
        engines = [make(dist=Dist(rank, tp_size=ranks, inboxes=inboxes)) for rank in range(ranks)]
        for each in engines:
            for part in (each.kv_cache_manager, each.drafter, each):
                if part is not None:
                    part.__class__ = guarded(type(part))
        engine = engines[0]
        engine.on_tokens = self._on_tokens
        engine.worker_thread = threading.Thread(target=self._run, daemon=True)
        # The ranks of several GPUs are processes of their own there, and threads here: out of the front's sight.
        is_here = ranks == 1 and os.environ.get("TLLM_WORKER_USE_SINGLE_PROCESS") == "1"
        self._executor = Worker(engine) if is_here else None
        self._engine = engine
        self.others = engines[1:]
        for other in self.others:
            threading.Thread(target=self._follow, args=(other,), daemon=True).start()
        self._thread: threading.Thread = engine.worker_thread
        self._thread.start()

    def generate_async(self, inputs: Sequence[int], params: SamplingParams, streaming: bool) -> RequestOutput:
        return self._generate(inputs, params, DEFAULT_PRIORITY)

    def _generate(self, inputs: Sequence[int], params: SamplingParams, priority: float) -> RequestOutput:
        longest = self.args["max_seq_len"]
        if len(inputs) + params.max_tokens > longest:  # type: ignore[attr-defined]
            raise ValueError(f"prompt length and max_tokens exceed max_seq_len {longest}")
        output = RequestOutput(self, next(self._ids))
        self._outputs[output.request_id] = output
        end_id = -1 if params.ignore_eos else params.end_id  # type: ignore[attr-defined]
        new = params.max_tokens  # type: ignore[attr-defined]
        self.calls.put(("add", output.request_id, list(inputs), new, end_id, priority))
        return output

    def shutdown(self) -> None:
        self._stop = True
        self.calls.put(("wake",))
        self._thread.join()

    def _on_tokens(self, client_id: int, tokens: list[int], reason: str | None) -> None:
        output = self._outputs[client_id]
        output.push(tokens, reason)
        if reason is not None:
            del self._outputs[client_id]

    def _follow(self, engine: Executor) -> None:
        """Another rank: the same requests at the same iterations, the same loop."""
        while (calls := engine.dist.broadcast(None)) is not None:
            self._apply(engine, calls)
            engine.step()

    def _apply(self, engine: Executor, calls: Sequence[tuple[Any, ...]]) -> None:
        for kind, *values in calls:
            if kind == "add":
                engine.enqueue(*values)
            elif kind == "cancel":
                engine.cancel(*values)

    def _run(self) -> None:
        engine, batches = self._engine, 0
        while not self._stop:
            calls = self._take(wait=engine.is_idle)
            self._apply(engine, calls)
            engine.dist.broadcast(calls)
            before = engine.clock
            batches += engine.step() > 0
            if batches == self.fails_at:
                break  # as after an exception in the loop: nobody answers any more
            time.sleep(max(engine.clock - before, 0.0))
        engine.dist.broadcast(None)

    def _take(self, wait: bool) -> list[tuple[Any, ...]]:
        calls: list[tuple[Any, ...]] = []
        try:
            call = self.calls.get(timeout=0.2) if wait else self.calls.get_nowait()
            while True:
                if call[0] == "add" or (call[0] == "cancel" and call[1] in self._outputs):
                    calls.append(call)
                call = self.calls.get_nowait()
        except queue.Empty:
            return calls


def guesser(config: DecodingConfig) -> Drafter:
    """Who guesses, by its configuration. Before 1.3 nobody looks a schedule up inside a model."""
    heeds = RELEASE.switches or not config.is_inner
    schedule = config.draft_len_schedule if heeds else None  # type: ignore[attr-defined]
    return Drafter(config.max_draft_len, schedule=schedule, up_to=RELEASE.switches)  # type: ignore[attr-defined]


class CompiledLLM(LLM):
    """tensorrt_llm/_tensorrt_engine: runs a compiled folder under the C++ executor, which has no Python engine."""

    known = ("model", "tensor_parallel_size", "skip_tokenizer_init", "kv_cache_config", "enable_chunked_prefill")

    def __init__(self, **arguments: Any) -> None:
        if unknown := set(arguments) - set(self.known):
            raise ValueError(f"LLM: unexpected {sorted(unknown)}")
        folder = Path(arguments["model"])
        if not list(folder.glob("rank*.engine")):
            raise RuntimeError(f"{folder} has no engine")
        built = json.loads((folder / "config.json").read_text())["build_config"]
        rest = {
            "max_seq_len": built.get("max_seq_len", 128), "max_batch_size": built.get("max_batch_size", 8),
            "max_num_tokens": built.get("max_num_tokens", 64), "disable_overlap_scheduler": True,
            "scheduler_config": SchedulerConfig(),
        }  # fmt: skip
        self.known = (*self.known, *rest)
        super().__init__(**arguments, **rest)
        self._executor = None


class PriorityLLM(LLM):
    """LLM since 1.3: a request may have a priority."""

    def generate_async(
        self, inputs: Sequence[int], params: SamplingParams, streaming: bool, priority: float = DEFAULT_PRIORITY
    ) -> RequestOutput:
        if not 0 <= priority <= 1:
            raise ValueError(f"priority must be in [0, 1], got {priority}")
        return self._generate(inputs, params, priority)
