"""The vocabulary every driver shares: what is asked, what to run now, what happened.

Counts and seconds only. Token ids, tensors, block tables and text belong to the engine; the two sides
meet in `Plan` (scheduler to engine) and `StepReport` (engine to scheduler) and nowhere else.

There are no phases. A request knows some tokens (its prompt and what it has generated) and has computed
some of them; a `Chunk` computes more. A prompt chunk has `length` > 1, a decode has `length` 1, a
speculative step has `length` 1 + `draft`, a prefix hit is a larger `start`, and a preempted request is
one that has computed nothing again. A chunk that reaches the last known token yields new tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

RequestId: TypeAlias = str
Ints: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Slo:
    """A promise about one stage: `ttft` seconds to its first token, `tpot` seconds for each one after.

    Token k (from 1) is due at `start + ttft + (k - 1) * tpot`: an early first token earns slack.
    """

    ttft: float
    tpot: float

    def __post_init__(self) -> None:
        for name, value in (("ttft", self.ttft), ("tpot", self.tpot)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"slo {name} must be a positive number of seconds, got {value!r}")


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of a request with its own pace: at most `max_new_tokens` tokens under `slo`.

    The first stage computes the prompt, so all of its SLO counts. A later stage (the answer after the
    thinking) continues the same sequence: its first token is due one `tpot` after the last thinking
    token was due, and its `ttft` is not used. `slo` None is best effort.
    """

    max_new_tokens: int
    slo: Slo | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One generation: a prompt of `prompt_tokens` tokens, then the tokens of `stages` in order.

    A session's tool rounds are requests of their own that share `session`; each arrives when its tool
    has answered. `cached_tokens` of the prompt have their KV already (a prefix hit the engine has pinned
    and counts as this request's blocks). `weight` is the value of keeping the promise, less where its session
    was late before (see `sessions`).
    `expected_new_tokens` is the caller's estimate of the output length, if it has one.
    """

    id: RequestId
    arrived_at: float
    prompt_tokens: int
    stages: tuple[Stage, ...]
    slo_class: str = "default"
    weight: float = 1.0
    session: str | None = None
    cached_tokens: int = 0
    expected_new_tokens: float | None = None

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1:
            raise ValueError(f"request {self.id}: prompt_tokens must be at least 1, got {self.prompt_tokens}")
        if not self.stages or any(stage.max_new_tokens < 1 for stage in self.stages):
            raise ValueError(f"request {self.id}: every stage needs max_new_tokens of at least 1, got {self.stages}")
        if not 0 <= self.cached_tokens < self.prompt_tokens:
            raise ValueError(
                f"request {self.id}: cached_tokens must be in [0, {self.prompt_tokens}), got {self.cached_tokens}"
            )

    @property
    def max_new_tokens(self) -> int:
        return sum(stage.max_new_tokens for stage in self.stages)

    @property
    def is_best_effort(self) -> bool:
        return self.stages[0].slo is None


@dataclass(frozen=True, slots=True)
class Chunk:
    """Run `length` tokens of a request from position `start`; the last `draft` of them are guesses."""

    request_id: RequestId
    start: int
    length: int
    draft: int = 0


class Rows(Sequence[Any]):
    """A sequence of small records kept as columns: `ids[i]` and `numbers[i]` make record i.

    Reading it is like reading a tuple of records; code that handles many at once takes the columns.
    `numbers` has shape [n, fields of the record after its id].
    """

    __slots__ = ("ids", "numbers")
    record: type[Any]

    def __init__(self, ids: tuple[RequestId, ...], numbers: Ints) -> None:
        self.ids = ids
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return type(self)(self.ids[index], self.numbers[index])
        return self.record(self.ids[index], *self.numbers[index].tolist())

    def __iter__(self) -> Iterator[Any]:
        return (self.record(name, *row) for name, row in zip(self.ids, self.numbers.tolist(), strict=True))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}{tuple(self)!r}"


class Chunks(Rows):
    """Many `Chunk`s: `numbers` holds start, length and draft."""

    __slots__ = ()
    record = Chunk


@dataclass(frozen=True, slots=True)
class Decision:
    """The promise to one request changed: `admitted` now keeps its SLO, otherwise it is best effort."""

    request_id: RequestId
    admitted: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do now.

    Drop the KV of `evicted` first (their tokens are kept; they will be computed again), then run
    `chunks` as one batch, expected to take `predicted` seconds. An empty `chunks` means that nothing
    can run: plan again at `wake_at` (absolute seconds) or when a request arrives or ends.
    """

    chunks: Sequence[Chunk] = ()
    evicted: tuple[RequestId, ...] = ()
    decisions: tuple[Decision, ...] = ()
    predicted: float = 0.0
    wake_at: float = math.inf


@dataclass(frozen=True, slots=True)
class Advance:
    """What one chunk achieved.

    `computed` tokens of the request now have KV; `new_tokens` were gained by sampling (0 for a chunk
    that ended inside the prompt), `accepted` of them from drafts. `stage_ended`: the last of them ended
    the current stage (thinking is over). `done`: no more tokens will come (stop, length, cancel); the
    engine has released the request's KV.
    """

    request_id: RequestId
    computed: int
    new_tokens: int = 0
    accepted: int = 0
    stage_ended: bool = False
    done: bool = False


class Advances(Rows):
    """Many `Advance`s: `numbers` holds computed, new_tokens, accepted, stage_ended and done."""

    __slots__ = ()
    record = Advance


@dataclass(frozen=True, slots=True)
class StepReport:
    """What happened in one step. Times are absolute seconds on the clock that `plan` is given.

    `free_blocks` is the engine's own count after the step and `shared_blocks` the sum over its blocks
    of (holders - 1): with them the scheduler's count must agree exactly.
    None of both: the engine does not count (a simulator without prefix sharing).
    """

    started_at: float
    finished_at: float
    advances: Sequence[Advance]
    free_blocks: int | None = None
    shared_blocks: int = 0


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine can do; the planner stays inside.

    `num_blocks` KV blocks of `block_tokens` tokens each; a batch holds at most `max_batch_tokens` tokens
    of at most `max_batch_requests` requests; a chunk that does not finish its prompt ends at a multiple
    of `chunk_multiple`; at most `max_draft` guesses per request and step (0: no speculation), the same
    number for the whole batch unless `per_request_draft`.
    """

    num_blocks: int
    block_tokens: int
    max_batch_tokens: int
    max_batch_requests: int
    max_context: int
    chunk_multiple: int = 1
    max_draft: int = 0
    per_request_draft: bool = True
    can_preempt_mid_prefill: bool = True


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The scheduler's state in numbers, for metrics and routing."""

    waiting: int
    prefilling: int
    decoding: int
    best_effort: int
    free_blocks: int
    num_blocks: int
    waiting_tokens: int
    admitted_total: int
    declined_total: int
    preempted_total: int
