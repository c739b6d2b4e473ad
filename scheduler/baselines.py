"""What others do, behind the same interface: the policies we are compared with.

    PrefillFirst   vLLM before v1 (Kwon et al., SOSP 2023): whole prompts first come first served, else decodes
    DecodeFirst    Sarathi-Serve (Agrawal et al., OSDI 2024), and vLLM v1: decodes, then chunks up to a budget
    EarliestDue    QoServe / Niyama (ASPLOS 2026): earliest deadline plus remaining work, the chunk from the
                   decodes' slack, hopeless requests relegated

None promises anything. All of them preempt the latest arrival when memory runs out and recompute it. Each
has a dataclass of its parameters, which are swept, never guessed; `policies` knows which loop is whose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from .batching import (
    BLOCK_TOKENS,
    CONTEXT,
    DECODES,
    FREE_BLOCKS,
    LOADS,
    MAX_ROWS,
    MAX_TOKENS,
    MEMBERS,
    MULTIPLE,
    NUM_BLOCKS,
    PREFILL_AREA,
    ROWS,
    TOKENS,
    blocks_for,
    drop,
    is_decode,
    last_holder,
    needs_block,
    place_decode,
    prompt_tokens_within,
    whole_chunk,
    write_decodes,
    write_row,
)
from .jit import compiled
from .table import COMPUTED, DUE, EMITTED, HELD, KNOWN
from .timemodel import batch_seconds

WATERMARK: Final = 0.01  # share of the blocks kept free when a prompt starts


@compiled
def keep_decodes(
    whole: Any, order: Any, chosen: Any, in_batch: Any, limits: Any, load: Any, evicted: Any, counts: Any
) -> None:
    """Every decode in the order given; where blocks run out the last of the order loses its memory."""
    for slot in order:
        if not is_decode(whole, slot) or load[MEMBERS] >= limits[MAX_ROWS] or load[TOKENS] >= limits[MAX_TOKENS]:
            continue
        if needs_block(whole, slot, limits):
            while limits[FREE_BLOCKS] < 1.0:
                victim = last_holder(whole, order, 0, in_batch, limits)
                if victim < 0:
                    break
                drop(whole, victim, limits, evicted, counts)
                if victim == slot:
                    break
            if not is_decode(whole, slot) or limits[FREE_BLOCKS] < 1.0:
                continue
            whole[HELD, slot] += 1
            limits[FREE_BLOCKS] -= 1.0
        place_decode(whole, slot, chosen, in_batch, load)


@compiled
def fill_prompts(
    whole: Any,
    order: Any,
    budget: float,
    in_batch: Any,
    whole_prompts: bool,
    limits: Any,
    load: Any,
    batch: Any,
    evicted: Any,
    counts: Any,
) -> None:
    """Prompts in the order given until `budget` tokens; a new one starts above the watermark only.

    Stops at the first that does not fit. When nothing else runs, the first may take the memory of those
    after it, never of those before: two prompts would take it from each other for ever.
    """
    reserve = np.floor(limits[NUM_BLOCKS] * WATERMARK)
    for i in range(order.size):
        slot = order[i]
        if is_decode(whole, slot) or in_batch[slot]:
            continue
        past = float(whole[COMPUTED, slot])
        left = float(whole[KNOWN, slot]) - past
        room = min(budget, limits[MAX_TOKENS]) - load[TOKENS]
        if whole_prompts and (load[MEMBERS] == 0 or left <= room):
            room = min(left, limits[MAX_TOKENS] - load[TOKENS])  # the engine's own limit still cuts
        elif whole_prompts:
            return
        chunk = whole_chunk(past, left, room, limits[MULTIPLE])
        if chunk < 1.0 or load[MEMBERS] >= limits[MAX_ROWS]:
            return
        target = float(whole[KNOWN, slot]) if past == 0.0 else past + chunk
        need = blocks_for(target, limits[BLOCK_TOKENS]) - whole[HELD, slot]
        spare = reserve if past == 0.0 and load[MEMBERS] > 0 else 0.0
        while limits[FREE_BLOCKS] - spare < need and load[MEMBERS] == 0:
            victim = last_holder(whole, order, i + 1, in_batch, limits)
            if victim < 0:
                break
            drop(whole, victim, limits, evicted, counts)
        if limits[FREE_BLOCKS] - spare < need:
            return
        need = blocks_for(past + chunk, limits[BLOCK_TOKENS]) - whole[HELD, slot]
        limits[FREE_BLOCKS] -= need
        whole[HELD, slot] += need
        in_batch[slot] = True
        write_row(batch, counts, slot, past, chunk, 0)
        load[PREFILL_AREA] += chunk * (past + 0.5 * chunk)
        load[TOKENS] += chunk
        load[MEMBERS] += 1


@compiled
def finish(whole: Any, chosen: Any, perf: Any, limits: Any, load: Any, batch: Any, counts: Any) -> float:
    write_decodes(whole, chosen[: int(load[DECODES])], np.zeros(whole.shape[1], np.int64), limits, load, batch, counts)
    if counts[ROWS] == 0:
        return 0.0
    return float(batch_seconds(perf, load[TOKENS], load[CONTEXT], load[PREFILL_AREA], 0.0))


@compiled
def prefill_first(
    whole: Any, active: Any, perf: Any, limits: Any, batch: Any, evicted: Any, counts: Any, budget: float
) -> float:
    counts[:] = 0
    load = np.zeros(LOADS)
    in_batch = np.zeros(whole.shape[1], np.bool_)
    chosen = np.empty(active.size, np.int64)
    running = 0
    for slot in active:
        running += is_decode(whole, slot)
    if running < limits[MAX_ROWS]:
        fill_prompts(whole, active, budget, in_batch, True, limits, load, batch, evicted, counts)
    if counts[ROWS] == 0:
        keep_decodes(whole, active, chosen, in_batch, limits, load, evicted, counts)
    return finish(whole, chosen, perf, limits, load, batch, counts)


@compiled
def decode_first(
    whole: Any, active: Any, perf: Any, limits: Any, batch: Any, evicted: Any, counts: Any, budget: float
) -> float:
    counts[:] = 0
    load = np.zeros(LOADS)
    in_batch = np.zeros(whole.shape[1], np.bool_)
    chosen = np.empty(active.size, np.int64)
    keep_decodes(whole, active, chosen, in_batch, limits, load, evicted, counts)
    # Started prompts before new ones, both first come first served.
    started, fresh = np.empty(active.size, np.int64), np.empty(active.size, np.int64)
    a = b = 0
    for slot in active:
        if whole[HELD, slot] > 0:
            started[a] = slot
            a += 1
        else:
            fresh[b] = slot
            b += 1
    order = np.concatenate((started[:a], fresh[:b]))
    fill_prompts(whole, order, budget, in_batch, False, limits, load, batch, evicted, counts)
    return finish(whole, chosen, perf, limits, load, batch, counts)


@compiled
def earliest_due(
    real: Any,
    whole: Any,
    active: Any,
    now: float,
    perf: Any,
    limits: Any,
    batch: Any,
    evicted: Any,
    counts: Any,
    alpha: float,
    cap: float,
) -> float:
    counts[:] = 0
    load = np.zeros(LOADS)
    in_batch = np.zeros(whole.shape[1], np.bool_)
    chosen = np.empty(active.size, np.int64)
    keep_decodes(whole, active, chosen, in_batch, limits, load, evicted, counts)
    seconds = cap
    for i in range(int(load[DECODES])):
        wait = real[DUE, chosen[i]] - now
        if wait > 0.0:
            seconds = min(seconds, wait)
    seconds = max(seconds, batch_seconds(perf, load[TOKENS], load[CONTEXT], 0.0, 0.0))
    # Earliest deadline, work counted in; those that cannot be in time any more come last.
    rank = np.empty(active.size)
    for i in range(active.size):
        slot = active[i]
        left = float(whole[KNOWN, slot] - whole[COMPUTED, slot])
        work = batch_seconds(perf, left, 0.0, left * (whole[COMPUTED, slot] + 0.5 * left), 0.0)
        due = real[DUE, slot]
        hopeless = whole[EMITTED, slot] > 0 or now + work > due
        rank[i] = (1e9 if hopeless else due) + alpha * work
    order = active[np.argsort(rank, kind="mergesort")]
    for slot in order:
        if is_decode(whole, slot) or in_batch[slot]:
            continue
        past = float(whole[COMPUTED, slot])
        left = float(whole[KNOWN, slot]) - past
        room = prompt_tokens_within(perf, seconds, load, past, left)
        if load[MEMBERS] == 0:
            room = max(room, limits[MULTIPLE])
        if room < 1.0:
            break
        before = load[MEMBERS]
        one = np.empty(1, np.int64)
        one[0] = slot
        fill_prompts(whole, one, load[TOKENS] + room, in_batch, False, limits, load, batch, evicted, counts)
        if load[MEMBERS] == before and before == 0:
            fill_prompts(whole, order, load[TOKENS] + room, in_batch, False, limits, load, batch, evicted, counts)
        if load[MEMBERS] == before:
            break
    return finish(whole, chosen, perf, limits, load, batch, counts)


@dataclass(frozen=True, slots=True)
class PrefillFirst:
    """vLLM's first scheduler: at most `budget` prompt tokens in a batch of whole prompts, else all decodes."""

    budget: int = 8192


@dataclass(frozen=True, slots=True)
class DecodeFirst:
    """Sarathi-Serve and vLLM v1: `budget` tokens a batch, decodes first."""

    budget: int = 512


@dataclass(frozen=True, slots=True)
class EarliestDue:
    """QoServe: rank by deadline + `alpha` * remaining work, iterations up to the decodes' slack or `cap` seconds."""

    alpha: float = 1.0
    cap: float = 0.2
