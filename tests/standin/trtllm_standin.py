"""A small TensorRT-LLM: the two loops of PyExecutor, LlmRequest, the KV manager and the stock scheduler, without a GPU.

Written from the public sources of 1.1 to 1.3, in our own words, to fail where they would fail:

    LlmRequest          cpp/include/tensorrt_llm/batch_manager/llmRequest.h, _torch/pyexecutor/llm_request.py
    Cache               _torch/pyexecutor/resource_manager.py (KVCacheManager) and kvCacheManager.cpp
    Executor            _torch/pyexecutor/py_executor.py: `_executor_loop`, `_executor_loop_overlap`
    Executor._forward   _torch/pyexecutor/model_engine.py: `_prepare_tp_inputs`
    SimpleScheduler     _torch/pyexecutor/scheduler.py and microBatchScheduler.cpp, capacityScheduler.cpp

    WaitingQueues       _torch/pyexecutor/scheduler/waiting_queue.py (1.3)
    Drafter             _torch/speculative/drafter.py, utils.py: `get_draft_len_for_batch_size`

The "model" is a hash of all tokens whose keys and values lie in the blocks of a request. A wrong position, a token
that was never computed, or a block with another request's contents therefore changes what is generated, and
`expected_tokens` says what should have been. What kills or hangs the real loop raises `Crash`. The adapter may read
and write what `MAY_READ` and `MAY_WRITE` say, and upstream has; anything else raises AttributeError for it: of a
request in every call of the scheduler, of the engine and its parts where the LLM API made them.
"""

from __future__ import annotations

import enum
import functools
import heapq
import itertools
import sys
import warnings
from abc import ABC, abstractmethod
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

VOCABULARY = 997
END_ID = 0
UNBOUNDED = 0x7FFFFFFF
HOLE = -1  # a position whose keys and values were never written


class Crash(Exception):
    """What would end the event loop, or corrupt memory on the device."""


# What the adapter relies on, by the upstream file that has it. The rest of these objects is its engine's own.
MAY_READ = {
    "LlmRequest": {  # _torch/pyexecutor/llm_request.py and the bindings under it (nanobind/batch_manager/bindings.cpp)
        "request_id", "py_client_id", "state", "context_current_position", "context_chunk_size", "orig_prompt_len",
        "prompt_len", "get_num_tokens", "get_tokens", "num_draft_tokens", "py_max_new_tokens", "is_dummy",
    },
    "Executor": {  # _torch/pyexecutor/py_executor.py
        "scheduler", "active_requests", "kv_cache_manager", "max_num_tokens", "max_batch_size", "max_input_len", "dist",
        "enable_attention_dp", "kv_cache_transceiver", "max_beam_width", "disable_overlap_scheduler", "previous_batch",
        "drafter", "max_num_active_requests", "worker_thread",
    },
    "KVCacheManager": {  # _torch/pyexecutor/resource_manager.py
        "tokens_per_block", "get_num_free_blocks", "get_max_resource_count", "enable_block_reuse", "is_vswa",
        "num_extra_kv_tokens",
    },
    "Drafter": {"get_draft_len_for_batch_size", "draft_len_schedule", "max_draft_len"},  # _torch/speculative/drafter.py
}  # fmt: skip
MAY_WRITE = {
    "LlmRequest": {"context_chunk_size", "py_batch_idx"},
    "Executor": {"scheduler", "max_input_len"},
    "Drafter": {"get_draft_len_for_batch_size"},
}
ADAPTER = "slos_serve."


class Guarded:
    """Lets the adapter, and nobody else, touch only what it may."""

    def __getattribute__(self, name: str) -> Any:
        if sys._getframe(1).f_globals["__name__"].startswith(ADAPTER) and not name.startswith("__"):
            kind = type(self).__name__
            if name not in MAY_READ[kind]:
                raise AttributeError(f"the adapter may not rely on {kind}.{name}")
        return super().__getattribute__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if sys._getframe(1).f_globals["__name__"].startswith(ADAPTER):
            kind = type(self).__name__
            if name not in MAY_WRITE.get(kind, ()):
                raise AttributeError(f"the adapter may not set {kind}.{name}")
        super().__setattr__(name, value)


@functools.cache
def guarded(kind: type) -> type:
    return type(kind.__name__, (Guarded, kind), {})


class LlmRequestState(enum.Enum):
    CONTEXT_INIT = 10
    GENERATION_IN_PROGRESS = 13
    GENERATION_TO_COMPLETE = 14
    GENERATION_COMPLETE = 20


@dataclass(frozen=True)
class Release:
    """In what the releases differ, as far as a scheduler can feel it.

    `pauses_late`: the KV of paused requests is freed first and `pause()` called after the previous batch was
    read (1.3; 1.1 does both at once). `retires`: requests that will end are put into GENERATION_TO_COMPLETE.
    `settles_empty`: an empty batch still reads the previous one. `stores_computed_only`: a release keeps only
    blocks that were computed. `can_schedule`: the scheduler must have that method. `switches`: the stock scheduler
    in Python, the priority queue, and draft lengths that hold up to a batch size instead of from it on.
    """

    name: str
    pauses_late: bool
    retires: bool
    settles_empty: bool
    stores_computed_only: bool
    can_schedule: bool
    switches: bool


RELEASES = (
    Release("1.1", False, False, False, False, False, False),
    Release("1.2", True, False, True, False, True, False),
    Release("1.3", True, True, True, True, True, True),
)


def next_token(tokens: Sequence[int], vocabulary: int = VOCABULARY) -> int:
    """The model: what follows these tokens."""
    return hash(tuple(tokens)) % vocabulary


def expected_tokens(prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    """What a request must generate, whatever batches it runs in."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_new_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] == END_ID:
            break
    return tokens[len(prompt) :]


class LlmRequest:
    """One request; the properties check what the C++ setters check."""

    def __init__(self, request_id: int, client_id: int, prompt: Sequence[int], max_new_tokens: int) -> None:
        self.request_id = self.py_request_id = request_id
        self.py_client_id = client_id
        self.prompt_len = self.orig_prompt_len = self.py_prompt_len = self.py_orig_prompt_len = len(prompt)
        self.max_new_tokens = self.py_max_new_tokens = max_new_tokens
        self.state = LlmRequestState.CONTEXT_INIT
        self.context_current_position = 0
        self.prepopulated_prompt_len = 0
        self.seq_slot: int | None = None
        self.py_seq_slot: int | None = None
        self.py_batch_idx: int | None = None
        self.draft_tokens: list[int] = []
        self.py_draft_tokens: list[int] = []
        self.py_num_accepted_draft_tokens = 0
        self.py_rewind_len = 0
        self.py_decoding_iter = 0
        self.py_last_context_chunk: tuple[int, int] = (0, 0)
        self.end_id = END_ID
        self.is_dummy = self.is_attention_dp_dummy = self.is_cuda_graph_dummy = False
        self._tokens = list(prompt)
        self._chunk = len(prompt)

    def get_num_tokens(self, beam: int) -> int:
        return len(self._tokens)

    def get_tokens(self, beam: int) -> list[int]:
        return list(self._tokens)

    def get_last_tokens(self, beam: int) -> int:
        return self._tokens[-1]

    @property
    def max_beam_num_tokens(self) -> int:
        return len(self._tokens)

    @property
    def num_draft_tokens(self) -> int:
        return len(self.draft_tokens)

    @property
    def context_remaining_length(self) -> int:
        return self.prompt_len - self.context_current_position

    @property
    def is_first_context_chunk(self) -> bool:
        return self.context_current_position == self.prepopulated_prompt_len

    @property
    def is_last_context_chunk(self) -> bool:
        return self.context_current_position + self._chunk == self.prompt_len

    @property
    def context_chunk_size(self) -> int:
        if self.state != LlmRequestState.CONTEXT_INIT:
            raise Crash("context_chunk_size is only there in the context phase")
        return self._chunk

    @context_chunk_size.setter
    def context_chunk_size(self, size: int) -> None:
        if self.state != LlmRequestState.CONTEXT_INIT or size < 0:
            raise Crash(f"context_chunk_size set to {size} in {self.state}")
        self._chunk = min(size, self.context_remaining_length)

    def move_to_next_context_chunk(self) -> None:
        self.context_current_position += self._chunk
        self._chunk = 0

    def add_new_token(self, token: int, beam: int) -> None:
        self._tokens.append(token)

    def pause(self, max_input_len: int) -> None:
        """Start over with a prompt of everything so far. Python's mirrors of the lengths are not refreshed."""
        length = min(max_input_len, self.prompt_len + len(self._tokens) - self.prompt_len)
        if length < len(self._tokens):
            raise Crash(f"pause of {len(self._tokens)} tokens with a max_input_len of {max_input_len}")
        self.max_new_tokens -= length - self.prompt_len
        self.prompt_len = length
        self.state = LlmRequestState.CONTEXT_INIT
        self.context_current_position = self.prepopulated_prompt_len = 0
        self._chunk = length
        self.seq_slot = None

    def will_complete_next_iteration(self) -> bool:
        return len(self._tokens) + 1 >= self.orig_prompt_len + self.py_max_new_tokens


class Cache:
    """KVCacheManager V1: blocks of a whole prompt at its first chunk, one token at a time after it, prefix reuse.

    Blocks that nobody holds but whose contents are remembered count as free.
    """

    def __init__(self, num_blocks: int, tokens_per_block: int, reuse: bool, computed_only: bool) -> None:
        self.tokens_per_block = tokens_per_block
        self.enable_block_reuse = reuse
        self.is_vswa = False
        self.max_blocks = num_blocks
        self._computed_only = computed_only
        self._contents: list[list[int]] = [[HOLE] * tokens_per_block for _ in range(num_blocks)]
        self._holders = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._known: dict[tuple[int, ...], int] = {}
        self._key_of: dict[int, tuple[int, ...]] = {}
        self._blocks: dict[int, list[int]] = {}
        self._length: dict[int, int] = {}
        self.least_free = num_blocks

    def get_num_free_blocks(self) -> int:
        return len(self._free)

    def get_max_resource_count(self) -> int:
        return self.max_blocks

    def get_num_kv_blocks(self, tokens: int) -> int:
        return -(-tokens // self.tokens_per_block)

    def holds(self, request_id: int) -> bool:
        return request_id in self._blocks

    def blocks_of(self, request_id: int) -> int:
        return len(self._blocks.get(request_id, ()))

    def add_sequence(self, request: LlmRequest) -> None:
        """Blocks for the whole prompt. A reused prefix moves the position and re-aligns the end of the chunk."""
        name, tokens = request.py_request_id, request.get_tokens(0)[: request.prompt_len]
        if name in self._blocks:
            raise Crash(f"sequence {name} is added twice")
        size = self.tokens_per_block
        blocks: list[int] = []
        while self.enable_block_reuse and (len(blocks) + 1) * size < len(tokens):
            found = self._known.get(tuple(tokens[: (len(blocks) + 1) * size]))
            if found is None:
                break
            self._take(found)
            blocks.append(found)
        reused = len(blocks) * size
        self._blocks[name] = blocks
        self._length[name] = len(tokens)
        while len(blocks) < self.get_num_kv_blocks(len(tokens)):
            blocks.append(self._allocate())
        if reused:
            chunk = request.context_chunk_size
            if request.context_current_position + chunk < request.prompt_len:
                chunk = (reused + chunk) // size * size - reused
            request.prepopulated_prompt_len = request.context_current_position = reused
            request.context_chunk_size = chunk
        end = request.context_current_position + request.context_chunk_size
        if end < request.prompt_len and end % size:
            raise Crash(f"a chunk ends at {end}, inside a block of {size}")

    def add_token(self, name: int) -> None:
        if name not in self._blocks:
            raise Crash(f"sequence {name} is not there")
        self._length[name] += 1
        if self._length[name] > len(self._blocks[name]) * self.tokens_per_block:
            self._blocks[name].append(self._allocate())

    def rewind(self, name: int, count: int) -> None:
        for _ in range(count):
            self._length[name] -= 1
            if self._length[name] <= (len(self._blocks[name]) - 1) * self.tokens_per_block:
                self._release(self._blocks[name].pop())

    def remove_sequence(self, request: LlmRequest) -> None:
        """Free a request's blocks. With reuse the full ones of all tokens but the last are remembered, computed or not.

        That is the release path before PR 12673; after it only computed blocks are remembered.
        """
        blocks = self._blocks.pop(request.py_request_id, None)
        if blocks is None:
            return
        del self._length[request.py_request_id]
        if self.enable_block_reuse:
            self._remember(blocks, request.get_tokens(0)[:-1])
        for block in reversed(blocks):
            self._release(block)

    def store_context(self, request: LlmRequest) -> None:
        """The blocks of a finished prompt can be reused by others at once."""
        if self.enable_block_reuse and request.py_request_id in self._blocks:
            self._remember(self._blocks[request.py_request_id], request.get_tokens(0)[: request.prompt_len - 1])

    def write(self, name: int, position: int, tokens: Sequence[int]) -> None:
        blocks, size = self._blocks[name], self.tokens_per_block
        for i, token in enumerate(tokens, start=position):
            if i // size >= len(blocks):
                raise Crash(f"illegal memory access: position {i} of {name}, which has {len(blocks)} blocks")
            block = blocks[i // size]
            if self._holders[block] > 1 and self._contents[block][i % size] != token:
                raise Crash(f"a shared block is overwritten at position {i} of {name}")
            self._contents[block][i % size] = token

    def read(self, name: int, length: int) -> list[int]:
        size = self.tokens_per_block
        return [self._contents[self._blocks[name][i // size]][i % size] for i in range(length)]

    def check(self) -> None:
        """Every block is either free or held."""
        held = {block for blocks in self._blocks.values() for block in blocks}
        assert held.isdisjoint(self._free)
        assert len(held) + len(self._free) == self.max_blocks

    def _remember(self, blocks: Sequence[int], tokens: Sequence[int]) -> None:
        size = self.tokens_per_block
        for i in range(min(len(tokens) // size, len(blocks))):
            key, block = tuple(tokens[: (i + 1) * size]), blocks[i]
            if self._computed_only and HOLE in self._contents[block]:
                return
            if key not in self._known and block not in self._key_of:
                self._known[key] = block
                self._key_of[block] = key

    def _take(self, block: int) -> None:
        self._free.pop(block, None)
        self._holders[block] += 1
        self.least_free = min(self.least_free, len(self._free))

    def _allocate(self) -> int:
        if not self._free:
            raise Crash("no free KV block")
        block = next(iter(self._free))
        self._take(block)
        if block in self._key_of:
            del self._known[self._key_of.pop(block)]
        self._contents[block] = [HOLE] * self.tokens_per_block
        return block

    def _release(self, block: int) -> None:
        self._holders[block] -= 1
        if not self._holders[block]:
            self._free[block] = None


# Named after upstream's class: the adapter tells V1 from V2 by it.
KVCacheManager = type("KVCacheManager", (Cache,), {})

SchedulerOutput = namedtuple(
    "SchedulerOutput",
    [
        "context_requests",
        "generation_requests",
        "paused_requests",
        "fitting_disagg_gen_init_requests",
        "num_fitting_requests",
    ],
)
NewerSchedulerOutput = namedtuple(
    "NewerSchedulerOutput",
    ["encoder_requests", *SchedulerOutput._fields, "scheduled_mm_encoder_items", "recompute_paused_requests"],
    defaults=[None, ()],
)


class RequestScheduler(ABC):
    @abstractmethod
    def schedule_request(self, active_requests: list[LlmRequest], inflight_request_ids: set[int]) -> Any: ...


class LaterRequestScheduler(RequestScheduler):
    @abstractmethod
    def can_schedule(self, requests: list[LlmRequest]) -> bool: ...


@dataclass
class SimpleScheduler:
    """The stock: first come first served, generations first; reserves whole requests, or one step and pauses."""

    cache: Cache
    max_num_requests: int
    max_batch_size: int
    max_num_tokens: int
    unit: int | None
    max_utilization: bool = False
    calls: int = 0

    def schedule_request(self, active: list[LlmRequest], inflight: set[int]) -> SchedulerOutput:
        self.calls += 1
        running = [r for r in active if r.state != LlmRequestState.GENERATION_COMPLETE]
        fitting, paused = self._capacity(running)
        contexts, generations = self._micro_batch([r for r in fitting if r.request_id not in inflight])
        return SchedulerOutput(contexts, generations, paused, [], len(fitting))

    def can_schedule(self, requests: list[LlmRequest]) -> bool:
        return len(self._capacity(requests)[0]) == len(requests)

    def _capacity(self, active: list[LlmRequest]) -> tuple[list[LlmRequest], list[LlmRequest]]:
        return self._one_step(active) if self.max_utilization else self._to_completion(active)

    def _to_completion(self, active: list[LlmRequest]) -> tuple[list[LlmRequest], list[LlmRequest]]:
        cache = self.cache
        free = cache.get_num_free_blocks()
        fitting = [r for r in active if cache.holds(r.py_request_id)]
        free -= sum(self._rest(r) for r in fitting)
        for request in active:
            if cache.holds(request.py_request_id):
                continue
            need = self._rest(request)
            if need > free or len(fitting) >= self.max_num_requests:
                break
            free -= need
            fitting.append(request)
        return fitting, []

    def _rest(self, request: LlmRequest) -> int:
        whole = request.orig_prompt_len + request.py_max_new_tokens + request.num_draft_tokens
        return max(0, self.cache.get_num_kv_blocks(whole) - self.cache.blocks_of(request.py_request_id))

    def _one_step(self, active: list[LlmRequest]) -> tuple[list[LlmRequest], list[LlmRequest]]:
        free = self.cache.get_num_free_blocks()
        fitting: list[LlmRequest] = []
        paused: list[LlmRequest] = []
        pool = list(active)
        while pool:
            request = pool[0]
            ahead = request.max_beam_num_tokens + 2 + request.num_draft_tokens
            need = max(0, self.cache.get_num_kv_blocks(ahead) - self.cache.blocks_of(request.py_request_id))
            if need <= free and len(fitting) < self.max_num_requests:
                free -= need
                fitting.append(pool.pop(0))
                continue
            victim = next((r for r in reversed(pool) if self.cache.holds(r.py_request_id)), None)
            if victim is None or need <= free:
                break
            if victim.state == LlmRequestState.GENERATION_TO_COMPLETE or victim.context_current_position == 0:
                pool.remove(victim)
                continue
            pool.remove(victim)
            paused.append(victim)
            free += self.cache.blocks_of(victim.py_request_id)
        return fitting, paused

    def _micro_batch(self, fitting: list[LlmRequest]) -> tuple[list[LlmRequest], list[LlmRequest]]:
        generations: list[LlmRequest] = []
        tokens = 0
        for request in fitting:
            cost = 1 + request.num_draft_tokens
            if request.state != LlmRequestState.GENERATION_IN_PROGRESS:
                continue
            if tokens + cost > self.max_num_tokens or len(generations) >= self.max_batch_size:
                break
            generations.append(request)
            tokens += cost
        contexts: list[LlmRequest] = []
        for request in fitting:
            if request.state != LlmRequestState.CONTEXT_INIT:
                continue
            left = request.context_remaining_length
            room = min(left, self.max_num_tokens - tokens)
            if room < left:
                end = request.context_current_position + room
                room = 0 if self.unit is None else end // self.unit * self.unit - request.context_current_position
            if room <= 0 or len(contexts) + len(generations) >= self.max_batch_size:
                break
            request.context_chunk_size = room
            tokens += room
            contexts.append(request)
        contexts.sort(key=lambda r: r.is_last_context_chunk)
        return contexts, generations


class SimpleUnifiedScheduler(SimpleScheduler):
    """The same decisions, made in Python (1.3, `use_python_scheduler`)."""


class WaitingQueue:
    """Requests that are not active yet, in order of arrival. A priority that is not heeded is warned about (1.3)."""

    def __init__(self) -> None:
        self._items: list[tuple[float, int, LlmRequest]] = []
        self._order = itertools.count()

    def rank(self, priority: float) -> float:
        if priority != DEFAULT_PRIORITY:
            warnings.warn("the FCFS waiting queue ignores priorities", UserWarning, stacklevel=3)
        return 0.0

    def append(self, request: LlmRequest, priority: float) -> None:
        heapq.heappush(self._items, (self.rank(priority), next(self._order), request))

    def popleft(self) -> LlmRequest:
        return heapq.heappop(self._items)[2]

    def remove(self, request: LlmRequest) -> None:
        self._items = [item for item in self._items if item[2] is not request]
        heapq.heapify(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Any:
        return (request for _, _, request in sorted(self._items, key=lambda item: item[:2]))


class PriorityWaitingQueue(WaitingQueue):
    """The highest priority first, equals in order of arrival."""

    def rank(self, priority: float) -> float:
        return -priority


DEFAULT_PRIORITY = 0.5


@dataclass
class Dist:
    """One rank of a group. The others' inboxes are where a broadcast of rank 0 goes."""

    rank: int = 0
    pp_size: int = 1
    tp_size: int = 1
    inboxes: tuple[SimpleQueue[Any], ...] = ()

    def broadcast(self, value: Any, root: int = 0) -> Any:
        if self.rank == root:
            for inbox in self.inboxes[1:]:
                inbox.put(value)
            return value
        return self.inboxes[self.rank].get(timeout=60)


class ScheduledRequests:
    def __init__(self) -> None:
        self.context_requests: list[LlmRequest] = []
        self.generation_requests: list[LlmRequest] = []
        self.paused_requests: list[LlmRequest] = []

    @property
    def batch_size(self) -> int:
        return len(self.context_requests) + len(self.generation_requests)


@dataclass
class SampleState:
    """What a batch sampled; on the device at once, on the host when it is read."""

    batch: ScheduledRequests
    tokens: dict[int, list[int]]
    drafted: dict[int, int]


def scheduled_length(schedule: Mapping[int, int], batch_size: int, up_to: bool) -> int:
    """The draft length of a batch. A key is the smallest batch of its length, or since 1.3 (`up_to`) the largest."""
    keys = sorted(schedule)
    if up_to:
        return next((schedule[key] for key in keys if batch_size <= key), 0)
    return schedule[max(key for key in keys if key <= batch_size)]


class Drafter:
    """Guesses the truth, and every `wrong`-th time something else. One length for the whole batch."""

    def __init__(
        self, max_draft_len: int, wrong: int = 3, schedule: Mapping[int, int] | None = None, up_to: bool = False
    ) -> None:
        self.draft_len_schedule = schedule
        self.max_draft_len = max_draft_len
        self.max_total_draft_tokens = max_draft_len
        self._up_to = up_to
        self._wrong = wrong
        self._count = 0

    def get_draft_len_for_batch_size(self, batch_size: int) -> int:
        assert self.draft_len_schedule is not None
        return scheduled_length(self.draft_len_schedule, batch_size, self._up_to)

    def update_max_total_draft_tokens(self, length: int) -> None:
        self.max_total_draft_tokens = length

    def prepare_draft_tokens(self, batch: ScheduledRequests) -> None:
        for request in batch.generation_requests:
            tokens = request.get_tokens(0)
            guesses: list[int] = []
            for _ in range(self.max_total_draft_tokens):
                self._count += 1
                token = next_token([*tokens, *guesses])
                guesses.append((token + 1) % VOCABULARY if self._count % self._wrong == 0 else token)
            request.py_draft_tokens = guesses


class Executor:
    """PyExecutor on one rank. `step` is one turn of its loop, overlapped or not.

    `drafter` is asked from outside the model; `inner` guesses inside it, and the loop looks its length up.
    """

    def __init__(
        self,
        release: Release,
        *,
        overlap: bool,
        num_blocks: int = 64,
        tokens_per_block: int = 4,
        max_batch_size: int = 8,
        max_num_tokens: int = 32,
        max_num_active_requests: int = 64,
        chunked: bool = True,
        reuse: bool = False,
        max_utilization: bool = False,
        drafter: Drafter | None = None,
        inner: Drafter | None = None,
        python_scheduler: bool = False,
        by_priority: bool = False,
        seconds: Callable[[int, int], float] = lambda tokens, context: 0.01 + 0.0001 * tokens,
        vocabulary: int = VOCABULARY,
        dist: Dist | None = None,
    ) -> None:
        self.vocabulary = vocabulary
        self.release = release
        self.disable_overlap_scheduler = not overlap
        self.kv_cache_manager = KVCacheManager(num_blocks, tokens_per_block, reuse, release.stores_computed_only)
        self.max_batch_size = max_batch_size
        self.max_num_tokens = max_num_tokens
        self.max_num_active_requests = max_num_active_requests
        self.max_input_len = 2048
        self.max_beam_width = 1
        self.enable_attention_dp = False
        self.kv_cache_transceiver = None
        self.dist = dist or Dist()
        self.drafter = drafter
        self._drafting = drafter or inner
        self.active_requests: list[LlmRequest] = []
        self.inflight_req_ids: set[int] = set()
        self.previous_batch: SampleState | None = None
        self.use_spec_decode = self._drafting is not None
        unit = tokens_per_block if chunked else None
        stock = SimpleUnifiedScheduler if python_scheduler else SimpleScheduler
        self.scheduler: Any = stock(
            self.kv_cache_manager, max_batch_size, max_batch_size, max_num_tokens, unit, max_utilization
        )
        self.clock = 0.0
        self.iterations = 0
        self.outputs: dict[int, list[int]] = {}
        self.finished: dict[int, str] = {}
        self.on_tokens: Callable[[int, list[int], str | None], None] = lambda client_id, tokens, reason: None
        self._seconds = seconds
        self._waiting = PriorityWaitingQueue() if by_priority else WaitingQueue()
        self._cancelled: set[int] = set()
        self._slots: dict[int, int] = {}
        self._device: dict[int, int] = {}
        self._sent: dict[int, int] = {}
        self._ids = max_batch_size

    # What the front does

    def enqueue(
        self,
        client_id: int,
        prompt: Sequence[int],
        max_new_tokens: int,
        end_id: int = END_ID,
        priority: float = DEFAULT_PRIORITY,
    ) -> None:
        self._ids += 1
        request = LlmRequest(self._ids, client_id, prompt, max_new_tokens)
        request.end_id = end_id
        self._waiting.append(request, priority)
        self.outputs[client_id] = []

    def cancel(self, client_id: int) -> None:
        self._cancelled.add(client_id)

    @property
    def is_idle(self) -> bool:
        return not self.active_requests and not self._waiting

    # One turn

    def step(self) -> int:
        """Returns how many requests ran."""
        self.iterations += 1
        self._fetch()
        if not self.active_requests:
            self._drop_cancelled_waiting()
            return 0
        self._set_drafts()
        batch = self._schedule()
        self._check(batch)
        return self._overlapped(batch) if not self.disable_overlap_scheduler else self._plain(batch)

    def _fetch(self) -> None:
        while self._waiting and len(self.active_requests) < self.max_num_active_requests:
            self.active_requests.append(self._waiting.popleft())

    def _set_drafts(self) -> None:
        drafter = self._drafting
        if drafter is None:
            return
        length = drafter.max_draft_len
        if drafter.draft_len_schedule is not None:
            length = drafter.get_draft_len_for_batch_size(len(self.active_requests))
            drafter.update_max_total_draft_tokens(length)
        self.use_spec_decode = length > 0
        for request in self.active_requests:
            if request.state == LlmRequestState.GENERATION_IN_PROGRESS:
                request.draft_tokens = [0] * length
                request.py_draft_tokens = [0] * length

    def _schedule(self) -> ScheduledRequests:
        for request in self.active_requests:
            request.__class__ = guarded(LlmRequest)
        output = self.scheduler.schedule_request(self.active_requests, self.inflight_req_ids)
        for request in self.active_requests:
            request.__class__ = LlmRequest
        batch = ScheduledRequests()
        batch.context_requests = output.context_requests
        batch.generation_requests = output.generation_requests
        batch.paused_requests = output.paused_requests
        return batch

    def _check(self, batch: ScheduledRequests) -> None:
        """What upstream presumes of a batch, most of it without saying so."""
        both = [*batch.context_requests, *batch.generation_requests, *batch.paused_requests]
        if len({id(r) for r in both}) < len(both) or any(all(r is not a for a in self.active_requests) for r in both):
            raise Crash("a request is scheduled twice, or is not active")
        for request in batch.generation_requests:
            if request.state != LlmRequestState.GENERATION_IN_PROGRESS:
                raise Crash(f"{request.state} is scheduled as a generation")
        lasts = [r.is_last_context_chunk for r in batch.context_requests]
        if lasts != sorted(lasts):
            raise Crash("a prompt's middle comes after a prompt's end: sampling would take the wrong row")
        if any(r.context_chunk_size < 1 for r in batch.context_requests):
            raise Crash("an empty chunk is scheduled")
        if batch.batch_size > self.max_batch_size:
            raise Crash(f"{batch.batch_size} requests in a batch of {self.max_batch_size}")
        if len({r.num_draft_tokens for r in batch.generation_requests}) > 1:
            raise Crash("generations of different draft length")
        for request in batch.paused_requests:
            if not self.kv_cache_manager.holds(request.py_request_id):
                raise Crash("a request is paused that has not started")
            if request.state == LlmRequestState.GENERATION_TO_COMPLETE:
                raise Crash("a retiring request is paused")

    def _plain(self, batch: ScheduledRequests) -> int:
        self._release_paused(batch)
        self._pause(batch)
        if not batch.batch_size:
            return 0
        self._prepare(batch)
        if self._drafting is not None and self.use_spec_decode:
            self._drafting.prepare_draft_tokens(batch)
        state = self._forward(batch, None)
        self._advance_contexts(batch)
        self._update(state)
        self._handle_cancelled()
        self._handle_responses()
        self._update_resources(batch)
        return batch.batch_size

    def _overlapped(self, batch: ScheduledRequests) -> int:
        early, late = (self._release_paused, self._pause)
        early(batch)
        if not self.release.pauses_late:
            late(batch)
        state = None
        if batch.batch_size:
            self._prepare(batch)
            batch.generation_requests.sort(key=lambda r: r.py_batch_idx is not None)
            state = self._forward(batch, self.previous_batch)
        settles = batch.batch_size > 0 or self.release.settles_empty
        if self.previous_batch is not None and settles:
            self._update(self.previous_batch)
        if self.release.pauses_late:
            late(batch)
        if state is not None:
            self._advance_contexts(batch)
        if self.previous_batch is not None and settles:
            self._handle_cancelled()
            self._handle_responses()
            self._update_resources(self.previous_batch.batch)
        if state is not None or self.release.settles_empty:
            self.previous_batch = state
        return batch.batch_size

    # Its parts

    def _release_paused(self, batch: ScheduledRequests) -> None:
        if not self.release.pauses_late:
            self._pause(batch)
        for request in batch.paused_requests:
            self._terminate(request)

    def _pause(self, batch: ScheduledRequests) -> None:
        for request in batch.paused_requests:
            if request.seq_slot is not None:  # not paused already, as in the releases that do both at once
                request.pause(self.max_input_len)

    def _terminate(self, request: LlmRequest) -> None:
        self.kv_cache_manager.remove_sequence(request)
        self._slots.pop(request.py_request_id, None)

    def _prepare(self, batch: ScheduledRequests) -> None:
        """Slots and blocks, in the order in which upstream's managers are asked."""
        for request in (*batch.context_requests, *batch.generation_requests):
            if request.state == LlmRequestState.CONTEXT_INIT and request.seq_slot is None:
                free = set(range(self.max_batch_size)) - set(self._slots.values())
                if not free:
                    raise Crash("no sequence slot is free")
                request.seq_slot = request.py_seq_slot = self._slots[request.py_request_id] = min(free)
        cache = self.kv_cache_manager
        for request in batch.context_requests:
            if request.is_first_context_chunk and not cache.holds(request.py_request_id):
                cache.add_sequence(request)
        for request in batch.generation_requests:
            for _ in range(1 + len(request.py_draft_tokens)):
                cache.add_token(request.py_request_id)

    def _forward(self, batch: ScheduledRequests, previous: SampleState | None) -> SampleState:
        cache, sampled, drafted = self.kv_cache_manager, {}, {}
        tokens = context = 0
        for request in batch.context_requests:
            start, size = request.context_current_position, request.context_chunk_size
            if size < 1:
                raise Crash("an empty chunk reaches the model")
            cache.write(request.py_request_id, start, request.get_tokens(0)[start : start + size])
            request.py_batch_idx = request.py_seq_slot
            tokens += size
            if request.is_last_context_chunk:
                sampled[request.py_request_id] = [self._next(request.py_request_id, start + size)]
        for request in batch.generation_requests:
            if previous is None or request.py_batch_idx is None:
                known, past = request.get_last_tokens(0), request.max_beam_num_tokens - 1
            else:
                known, past = self._device.get(request.py_batch_idx, HOLE), request.max_beam_num_tokens
            inputs = [known, *request.py_draft_tokens]
            cache.write(request.py_request_id, past, inputs)
            request.py_batch_idx = request.py_seq_slot
            tokens += len(inputs)
            context += past
            drafted[request.py_request_id] = len(inputs) - 1
            sampled[request.py_request_id] = self._verify(request.py_request_id, past, inputs)
        if tokens > self.max_num_tokens:
            raise Crash(f"{tokens} tokens in a batch of at most {self.max_num_tokens}")
        for request in (*batch.context_requests, *batch.generation_requests):
            if request.py_request_id in sampled and request.py_seq_slot is not None:
                self._device[request.py_seq_slot] = sampled[request.py_request_id][-1]
        self.clock += self._seconds(tokens, context)
        return SampleState(batch, sampled, drafted)

    def _next(self, name: int, length: int) -> int:
        return next_token(self.kv_cache_manager.read(name, length), self.vocabulary)

    def _verify(self, name: int, past: int, inputs: Sequence[int]) -> list[int]:
        """One token more than the guesses that the model agrees with."""
        gained: list[int] = []
        for i in range(len(inputs)):
            gained.append(self._next(name, past + i + 1))
            if i + 1 < len(inputs) and inputs[i + 1] != gained[-1]:
                break
        return gained

    def _advance_contexts(self, batch: ScheduledRequests) -> None:
        for request in batch.context_requests:
            if request.state == LlmRequestState.CONTEXT_INIT:
                start = request.context_current_position
                request.py_last_context_chunk = (start, start + request.context_chunk_size)
                request.move_to_next_context_chunk()
                if request.context_remaining_length == 0:
                    request.state = LlmRequestState.GENERATION_IN_PROGRESS
                    self._maybe_retire(request)
        for request in batch.generation_requests:
            if request.state == LlmRequestState.GENERATION_IN_PROGRESS:
                self._maybe_retire(request)

    def _maybe_retire(self, request: LlmRequest) -> None:
        overlap = not self.disable_overlap_scheduler
        if self.release.retires and overlap and request.will_complete_next_iteration():
            request.state = LlmRequestState.GENERATION_TO_COMPLETE

    def _update(self, state: SampleState) -> None:
        """The sampler's `update_requests`: tokens reach the host."""
        for request in state.batch.context_requests:
            if request.state != LlmRequestState.GENERATION_COMPLETE and request.context_remaining_length == 0:
                self._append(request, state.tokens[request.py_request_id])
        for request in state.batch.generation_requests:
            if request.state != LlmRequestState.GENERATION_COMPLETE:
                gained = state.tokens[request.py_request_id]
                request.py_num_accepted_draft_tokens = len(gained) - 1
                request.py_rewind_len = state.drafted[request.py_request_id] - (len(gained) - 1)
                self._append(request, gained)

    def _append(self, request: LlmRequest, tokens: Sequence[int]) -> None:
        request.py_decoding_iter += 1
        for token in tokens:
            request.add_new_token(token, 0)
            reason = None
            if token == request.end_id:
                reason = "stop"
            elif request.get_num_tokens(0) >= request.orig_prompt_len + request.py_max_new_tokens:
                reason = "length"
            if reason is not None:
                request.state = LlmRequestState.GENERATION_COMPLETE
                self.finished[request.py_client_id] = reason
                return

    def _handle_cancelled(self) -> None:
        self._drop_cancelled_waiting()
        for request in self.active_requests:
            if request.py_client_id in self._cancelled and request.state != LlmRequestState.GENERATION_COMPLETE:
                request.state = LlmRequestState.GENERATION_COMPLETE
                self.finished[request.py_client_id] = "cancelled"
        self._cancelled -= {request.py_client_id for request in self.active_requests}

    def _drop_cancelled_waiting(self) -> None:
        for request in [r for r in self._waiting if r.py_client_id in self._cancelled]:
            self._waiting.remove(request)
            self._cancelled.discard(request.py_client_id)
            self.finished[request.py_client_id] = "cancelled"
            self.on_tokens(request.py_client_id, [], "cancelled")

    def _handle_responses(self) -> None:
        going, ended = [], []
        for request in self.active_requests:
            (ended if request.state == LlmRequestState.GENERATION_COMPLETE else going).append(request)
            new = request.get_tokens(0)[request.orig_prompt_len + len(self.outputs[request.py_client_id]) :]
            self.outputs[request.py_client_id] += new
            reason = self.finished[request.py_client_id] if request in ended else None
            if new or reason:
                self.on_tokens(request.py_client_id, new, reason)
        self.active_requests.clear()
        self.active_requests.extend(going)
        for request in ended:
            self._terminate(request)

    def _update_resources(self, batch: ScheduledRequests) -> None:
        for request in batch.generation_requests:
            if request.py_rewind_len and self.kv_cache_manager.holds(request.py_request_id):
                self.kv_cache_manager.rewind(request.py_request_id, request.py_rewind_len)
                request.py_rewind_len = 0
        for request in batch.context_requests:
            if request.state == LlmRequestState.GENERATION_IN_PROGRESS:
                self.kv_cache_manager.store_context(request)


@dataclass(frozen=True)
class Api:
    """The names that the adapter takes from TensorRT-LLM."""

    RequestScheduler: type = RequestScheduler
    SchedulerOutput: Any = SchedulerOutput
    LlmRequestState: Any = LlmRequestState
    LlmRequest: type = LlmRequest
    PyExecutor: type = Executor
    version: str = "1.1.0"
    extra: dict[str, Any] = field(default_factory=dict)


def api(release: Release) -> Api:
    """The names as this release has them."""
    scheduler = LaterRequestScheduler if release.can_schedule else RequestScheduler
    output = NewerSchedulerOutput if release.retires else SchedulerOutput
    return Api(RequestScheduler=scheduler, SchedulerOutput=output, version=f"{release.name}.0")
