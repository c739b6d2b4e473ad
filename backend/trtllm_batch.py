"""The rules that a batch for TensorRT-LLM must obey, in one place: what is asked for goes in, what is legal comes out.

    L1  only active, runnable requests, each once, none in flight elsewhere
    L2  chunks + (1 + drafts) of decodes <= max_num_tokens; a prefix hit is never counted on (it shifts the
        window of a chunk, it does not shorten it)                      assertion in model_engine.py otherwise
    L3  requests <= max_batch_size; started + newly started <= slots    seq_slot_manager.py raises otherwise
    L4  a chunk that leaves some prompt ends at a multiple of the unit; without chunking prompts go whole
    L6  prompts that go on before prompts that end
    L7  one draft length for all decodes: the engine set it, it is counted as it is
    L8  blocks for the whole prompt of a new request and for every decode that crosses a block's edge
    L9  only started requests are paused, with nothing in flight; in mid-prompt only where that is safe

A request that breaks a rule is left out, with the rule's name; it runs in a later iteration. Pure arithmetic.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from .trtllm_view import Phase, Seen


@dataclass(frozen=True, slots=True)
class Limits:
    """What the engine takes. `chunk_unit` None: no chunked prefill. `reserve` blocks stay free: for the padding
    of CUDA graphs, and so that one decode can always go on. `extra_tokens` are kept per sequence by some drafters."""

    max_tokens: int
    max_requests: int
    max_slots: int
    block_tokens: int
    chunk_unit: int | None
    reserve: int = 2
    extra_tokens: int = 0
    pauses: bool = True
    pauses_mid_prefill: bool = True

    def blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)


@dataclass(slots=True)
class Wish:
    """A batch as somebody wants it: prompt tokens per context, decodes, whom to pause."""

    contexts: list[tuple[Seen, int]] = field(default_factory=list)
    decodes: list[Seen] = field(default_factory=list)
    paused: list[Seen] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        return not self.contexts and not self.decodes

    def ids(self) -> set[int]:
        """The engine's ids of those that run."""
        return {seen.number for seen, _ in self.contexts} | {seen.number for seen in self.decodes}


@dataclass(slots=True)
class Legal(Wish):
    """A batch that obeys all rules, and who was left out by which rule."""

    dropped: list[tuple[str, str]] = field(default_factory=list)


@dataclass(slots=True)
class _Room:
    """What is left while a batch is filled."""

    tokens: int
    requests: int
    slots: int
    blocks: int


def legal(wish: Wish, view: Iterable[Seen], limits: Limits, free_blocks: int, elsewhere: Collection[int] = ()) -> Legal:
    """The largest part of `wish` that may run, decodes first, each kind in the order given.

    `elsewhere` are the engine's ids that another micro batch runs. When nothing could run for want of blocks,
    the reserve is opened for one decode, or one request is paused: the engine never waits for itself.
    """
    view = list(view)
    here = {id(seen.request) for seen in view}
    started = sum(seen.is_started for seen in view)
    room = _Room(limits.max_tokens, limits.max_requests, limits.max_slots - started, free_blocks - limits.reserve)
    batch = Legal()
    taken: set[int] = set()
    for seen in wish.paused:
        _take_pause(batch, seen, limits, here, taken)
    for seen in wish.decodes:
        _take_decode(batch, seen, limits, room, here, taken, elsewhere)
    for seen, size in wish.contexts:
        _take_context(batch, seen, size, limits, room, here, taken, elsewhere)
    if batch.is_empty:
        _relieve(batch, wish, view, limits, free_blocks)
    batch.contexts.sort(key=lambda item: item[1] == item[0].left)
    return batch


def _take_pause(batch: Legal, seen: Seen, limits: Limits, here: Collection[int], taken: set[int]) -> None:
    if id(seen.request) not in here or id(seen.request) in taken:
        batch.dropped.append((seen.name, "L1"))
    elif not may_pause(seen, limits):
        batch.dropped.append((seen.name, "L9"))
    else:
        taken.add(id(seen.request))
        batch.paused.append(seen)


def may_pause(seen: Seen, limits: Limits) -> bool:
    """L9. A token that is still on the device would be lost or counted twice, so it must have arrived."""
    if not limits.pauses or seen.is_running:
        return False
    return seen.phase is Phase.DECODE or (seen.phase is Phase.PREFILL and limits.pauses_mid_prefill)


def growth(seen: Seen, limits: Limits) -> int:
    """Blocks that a decode's next step needs."""
    return limits.blocks(seen.believed + seen.draft + limits.extra_tokens) - limits.blocks(
        seen.believed - 1 + limits.extra_tokens
    )


def _take_decode(
    batch: Legal,
    seen: Seen,
    limits: Limits,
    room: _Room,
    here: Collection[int],
    taken: set[int],
    elsewhere: Collection[int],
) -> None:
    cost, need = 1 + seen.draft, growth(seen, limits)
    rule = ""
    is_kind = seen.phase is Phase.DECODE
    if not is_kind or id(seen.request) not in here or id(seen.request) in taken or seen.number in elsewhere:
        rule = "L1"
    elif cost > room.tokens:
        rule = "L2"
    elif room.requests < 1:
        rule = "L3"
    elif need > max(room.blocks, 0):
        rule = "L8"
    if rule:
        batch.dropped.append((seen.name, rule))
        return
    taken.add(id(seen.request))
    batch.decodes.append(seen)
    room.tokens -= cost
    room.requests -= 1
    room.blocks -= need


def _take_context(
    batch: Legal,
    seen: Seen,
    size: int,
    limits: Limits,
    room: _Room,
    here: Collection[int],
    taken: set[int],
    elsewhere: Collection[int],
) -> None:
    is_new = seen.phase is Phase.NEW
    need = limits.blocks(seen.prompt + seen.draft + limits.extra_tokens) if is_new else 0
    chunk = chunk_of(seen, min(size, room.tokens - seen.draft), limits.chunk_unit)
    rule = ""
    is_kind = seen.phase in (Phase.NEW, Phase.PREFILL)
    if not is_kind or id(seen.request) not in here or id(seen.request) in taken or seen.number in elsewhere:
        rule = "L1"
    elif room.requests < 1 or (is_new and room.slots < 1):
        rule = "L3"
    elif need > max(room.blocks, 0):
        rule = "L8"
    elif chunk < 1:
        rule = "L2" if size > 0 and chunk_of(seen, size, limits.chunk_unit) > 0 else "L4"
    if rule:
        batch.dropped.append((seen.name, rule))
        return
    taken.add(id(seen.request))
    batch.contexts.append((seen, chunk))
    room.tokens -= chunk + (seen.draft if chunk == seen.left else 0)
    room.requests -= 1
    room.slots -= is_new
    room.blocks -= need


def chunk_of(seen: Seen, size: int, unit: int | None) -> int:
    """At most `size` tokens of the prompt's rest that may be one chunk (L4); 0 where none may."""
    if size >= seen.left:
        return seen.left
    if unit is None or size < 1:
        return 0
    return max((seen.position + size) // unit * unit - seen.position, 0)


def _relieve(batch: Legal, wish: Wish, view: list[Seen], limits: Limits, free_blocks: int) -> None:
    """Nothing may run. Where it is for want of blocks: one started request goes on, if need be with the reserve,
    else the youngest gives way."""
    if not any(rule == "L8" for _, rule in batch.dropped):
        return
    room = _Room(limits.max_tokens, limits.max_requests, 0, free_blocks)
    here = {id(seen.request) for seen in view}
    taken = {id(seen.request) for seen in batch.paused}
    for seen in [*wish.decodes, *view]:
        if seen.phase is Phase.DECODE:
            _take_decode(batch, seen, limits, room, here, taken, ())
        elif seen.phase is Phase.PREFILL:
            _take_context(batch, seen, limits.max_tokens, limits, room, here, taken, ())
        if not batch.is_empty:
            return
    if not batch.paused:
        batch.paused.extend([seen for seen in reversed(view) if may_pause(seen, limits)][:1])


def output(legal_batch: Wish, fields: Iterable[str], make: Any) -> Any:
    """The engine's SchedulerOutput, with empty lists for the fields of other kinds of serving."""
    values: dict[str, Any] = {name: [] for name in fields}
    values |= {
        "context_requests": [seen.request for seen, _ in legal_batch.contexts],
        "generation_requests": [seen.request for seen in legal_batch.decodes],
        "paused_requests": [seen.request for seen in legal_batch.paused],
        "num_fitting_requests": len(legal_batch.contexts) + len(legal_batch.decodes),
    }
    if "scheduled_mm_encoder_items" in values:
        values["scheduled_mm_encoder_items"] = None
    return make(**values)
