"""One step's batch: from deadlines to a period, from the period to tokens for each request.

    decodes of promised requests     every one, every step (they are only skipped when an urgent short
                                     prompt would miss beside them and all of them can wait)
    prefill of admitted requests     earliest deadline first, up to the period
    best effort                      what is left; the longest-unserved one first of all when its patience
                                     is over, so that nobody starves

The period is the shortest that meets the admitted deadlines with a reserve (just in time), never longer
than the first due token allows. Best-effort KV is dropped last-in-first-out whenever a promise needs it.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from .admission import admit, batch_seconds, finish_after, shortest_period, tokens_within
from .jit import compiled
from .perf import BatchShape as BatchShape
from .table import (
    ACCEPT,
    ARRIVED,
    BEST_EFFORT,
    COMPUTED,
    DUE,
    EMITTED,
    HELD,
    KIND,
    KNOWN,
    LEFT,
    LENGTH,
    PROMISED,
    PROVISIONAL,
    SERVED,
    TPOT,
    VERDICT,
)

# Layout of `limits` (float64).
FREE_BLOCKS: Final = 0
NUM_BLOCKS: Final = 1
BLOCK_TOKENS: Final = 2
MAX_TOKENS: Final = 3
MAX_ROWS: Final = 4
MULTIPLE: Final = 5
MAX_DRAFT: Final = 6
MID_PREFILL: Final = 7  # 1 when a started prompt may be dropped
CAP: Final = 8  # longest planned iteration, seconds
FLOOR: Final = 9  # shortest planned iteration, in decode-only iterations
RESERVE: Final = 10  # how much faster than needed prefill is planned
OVERCOMMIT: Final = 11  # predicted KV peaks may sum to this many times the memory
PATIENCE: Final = 12  # seconds without progress after which best effort is served first
SHARE: Final = 13  # of a batch's tokens, for the one whose patience is over
IDLE_CAP: Final = 14  # longest iteration of best-effort work beside promised decodes, in decode-only iterations
SHARED: Final = 15  # blocks counted more than once because requests share them
LIMITS: Final = 16

# Columns of the batch that `compose` fills.
SLOT: Final = 0
START: Final = 1
LENGTH_: Final = 2
DRAFT: Final = 3

# What `compose` returns beside the batch.
ROWS: Final = 0
EVICTED: Final = 1
STEPS: Final = 2


@compiled
def blocks_for(tokens: float, block_tokens: float) -> int:
    return int(np.ceil(tokens / block_tokens))


@compiled
def youngest_holder(whole: Any, order: Any, above: int, in_batch: Any, mid_prefill: bool) -> int:
    """The last of `order` (after index `above`) that holds blocks and is not in the batch; -1 if none."""
    for i in range(order.size - 1, above, -1):
        slot = order[i]
        if whole[HELD, slot] > 0 and not in_batch[slot]:
            started = 0 < whole[COMPUTED, slot] < whole[KNOWN, slot] - 1
            if mid_prefill or not started:
                return int(slot)
    return -1


@compiled
def drop(whole: Any, slot: int, limits: Any, evicted: Any, counts: Any) -> float:
    """Take a request's KV away; returns the blocks surely gained. Its tokens are kept.

    Any of its blocks may be one that others share, so as many as are shared count as not gained.
    """
    held = float(whole[HELD, slot])
    kept = min(limits[SHARED], held)
    limits[SHARED] -= kept
    whole[HELD, slot] = 0
    whole[COMPUTED, slot] = 0
    evicted[counts[EVICTED]] = slot
    counts[EVICTED] += 1
    return held - kept


@compiled
def draft_steps(real: Any, whole: Any, decodes: Any, perf: Any, limit: int, longest: float) -> int:
    """Guesses per decode that give most tokens per second within `longest` seconds; 0 when none pays.

    With acceptance a, n guesses yield (1 - a^(n+1)) / (1 - a) tokens (Leviathan et al., 2023). The cost
    is the model's: n + 1 verified tokens each and n draft steps.
    """
    best = 0
    context = 0.0
    for i in range(decodes.size):
        context += whole[COMPUTED, decodes[i]]
    base = decodes.size / batch_seconds(perf, decodes.size, context, 0.0, 0.0)
    best_rate = base * 1.05
    for steps in range(1, limit + 1):
        gain = 0.0
        for i in range(decodes.size):
            accept = min(real[ACCEPT, decodes[i]], 0.999)
            own = min(steps, int(whole[LEFT, decodes[i]]) - 1)
            gain += (1.0 - accept ** (own + 1)) / (1.0 - accept)
        seconds = batch_seconds(perf, decodes.size * (steps + 1.0), context, 0.0, steps)
        if seconds > longest:
            break
        if gain / seconds > best_rate:
            best, best_rate = steps, gain / seconds
    return best


@compiled
def compose(
    real: Any,
    whole: Any,
    active: Any,
    now: float,
    perf: Any,
    limits: Any,
    batch: Any,
    evicted: Any,
    counts: Any,
) -> float:
    """Fill `batch` (rows of slot, start, length, draft) and `evicted`; returns the predicted seconds.

    `active` lists the live slots in order of arrival; `counts` receives rows, evictions, draft steps.
    Marks verdicts in `whole`. Blocks of evicted requests are counted free; `limits[FREE_BLOCKS]` is
    left at what remains after the batch.
    """
    counts[:] = 0
    margin = 1.0 + perf[5]
    block_tokens = limits[BLOCK_TOKENS]
    free = limits[FREE_BLOCKS]
    mid_prefill = limits[MID_PREFILL] > 0.5
    in_batch = np.zeros(whole.shape[1], np.bool_)

    # 1. Who is who.
    n = active.size
    promised = np.empty(n, np.int64)
    waiting = np.empty(n, np.int64)
    num_promised = 0
    num_waiting = 0
    context = 0.0
    peak = 0.0
    tightest = np.inf
    first_due = np.inf
    floor_seconds = batch_seconds(perf, 1.0, 0.0, 0.0, 0.0)
    for i in range(n):
        slot = active[i]
        kind = whole[KIND, slot]
        if kind == PROVISIONAL and real[DUE, slot] < now:
            whole[KIND, slot] = BEST_EFFORT
            whole[VERDICT, slot] = 6
        elif kind == PROVISIONAL:
            waiting[num_waiting] = slot
            num_waiting += 1
        elif kind == PROMISED:
            promised[num_promised] = slot
            num_promised += 1
            context += whole[COMPUTED, slot]
            peak += np.ceil(max(real[LENGTH, slot], float(whole[KNOWN, slot])) / block_tokens)
            tightest = min(tightest, real[TPOT, slot])
            if real[DUE, slot] >= now + floor_seconds:
                first_due = min(first_due, real[DUE, slot])
    decodes = promised[:num_promised]

    # 2. Who is admitted.
    order = waiting[:num_waiting][np.argsort(real[DUE][waiting[:num_waiting]], kind="mergesort")]
    accepted = np.empty(num_waiting + 1, np.int64)
    verdict = np.zeros(num_waiting, np.int64)
    room = limits[NUM_BLOCKS] * limits[OVERCOMMIT] - peak
    num_accepted = admit(
        real, whole, order, accepted, verdict, perf, now, limits[CAP], float(num_promised), context,
        tightest, first_due - now, room, int(block_tokens),
    )  # fmt: skip
    admitted = np.zeros(whole.shape[1], np.bool_)
    for i in range(num_waiting):
        whole[VERDICT, order[i]] = verdict[i]
    for i in range(num_accepted):
        admitted[accepted[i]] = True

    # 3. Best effort in order of service: the oldest first; also the victims, youngest first.
    spare = np.empty(n, np.int64)
    num_spare = 0
    for i in range(n):
        slot = active[i]
        if whole[KIND, slot] == BEST_EFFORT or (whole[KIND, slot] == PROVISIONAL and not admitted[slot]):
            spare[num_spare] = slot
            num_spare += 1
    spare_order = spare[:num_spare]

    # 4. The period.
    alone = batch_seconds(perf, float(num_promised), context, 0.0, 0.0) * margin
    cap = limits[CAP]
    if num_promised > 0:
        cap = min(cap, max(first_due - now, alone))
    cap = max(cap, alone)
    period = cap
    if num_promised > 0:
        floor = min(max(alone * limits[FLOOR], alone), cap)
        period = shortest_period(
            real, whole, accepted, num_accepted, perf, now, floor, cap, float(num_promised), context, limits[RESERVE]
        )
    without_decodes = False
    if num_accepted > 0:
        head = accepted[0]
        left = float(whole[KNOWN, head] - whole[COMPUTED, head])
        own = left * (whole[COMPUTED, head] + 0.5 * left)
        wait = real[DUE, head] - now
        mixed = batch_seconds(perf, left + num_promised, context, own, 0.0) * margin
        pure = batch_seconds(perf, left, 0.0, own, 0.0) * margin
        if mixed <= wait:
            period = min(period, max(wait, mixed))
        elif pure <= wait and num_promised > 0 and pure + alone <= first_due - now:
            without_decodes = True
            period = min(wait, first_due - now - alone)
    budget = period / margin

    # 5. Decodes of promised requests; memory for them comes from best effort, then from the largest.
    rows = 0
    tokens = area = batch_context = 0.0
    chosen = np.empty(n, np.int64)
    num_chosen = 0
    if not without_decodes:
        short = 0.0
        for i in range(num_promised):
            if whole[COMPUTED, decodes[i]] >= whole[HELD, decodes[i]] * block_tokens:
                short += 1.0
        while free < short:
            victim = youngest_holder(whole, spare_order, -1, in_batch, mid_prefill)
            if victim < 0:
                for i in range(num_accepted - 1, -1, -1):
                    if whole[HELD, accepted[i]] > 0 and mid_prefill:
                        victim = accepted[i]
                        break
            if victim < 0:
                held = 0
                for i in range(num_promised):
                    slot = decodes[i]
                    if whole[KIND, slot] == PROMISED and whole[HELD, slot] >= held:
                        victim, held = slot, whole[HELD, slot]
                if victim < 0:
                    break
                if whole[COMPUTED, victim] >= whole[HELD, victim] * block_tokens:
                    short -= 1.0
                whole[KIND, victim] = BEST_EFFORT
                whole[VERDICT, victim] = 7
            free += drop(whole, victim, limits, evicted, counts)
        for i in range(num_promised):
            slot = decodes[i]
            if whole[KIND, slot] != PROMISED or rows >= limits[MAX_ROWS] or tokens >= limits[MAX_TOKENS]:
                continue
            chosen[num_chosen] = slot
            num_chosen += 1
            rows += 1
            tokens += 1.0
            batch_context += whole[COMPUTED, slot]
            in_batch[slot] = True
            if whole[COMPUTED, slot] >= whole[HELD, slot] * block_tokens:
                whole[HELD, slot] += 1
                free -= 1.0

    # 6. Prefill: one starving best-effort request's share, then the admitted by deadline, then the rest.
    line = np.empty(num_accepted + num_spare + 1, np.int64)
    size = 0
    starving = -1
    for i in range(num_spare):
        slot = spare_order[i]
        if now - real[SERVED, slot] > limits[PATIENCE] and (
            starving < 0 or real[SERVED, slot] < real[SERVED, starving]
        ):
            starving = slot
    if starving >= 0:
        line[size] = starving
        size += 1
    for i in range(num_accepted):
        line[size] = accepted[i]
        size += 1
    for i in range(num_spare):
        if spare_order[i] != starving:
            line[size] = spare_order[i]
            size += 1
    pending = False  # admitted prefill is left over: the time is spoken for
    blocked = False  # an admitted prompt waits for memory: nobody else may start
    filled = 0
    # Where a started prompt cannot be dropped, its remaining blocks are spoken for: two half-done
    # prompts that wait for each other's memory would never end.
    owed = 0.0
    if not mid_prefill:
        for i in range(n):
            slot = active[i]
            if 0 < whole[COMPUTED, slot] < whole[KNOWN, slot] - 1 or (
                whole[COMPUTED, slot] > 0 and whole[EMITTED, slot] == 0
            ):
                owed += blocks_for(float(whole[KNOWN, slot]), block_tokens) - whole[HELD, slot]
    for i in range(size):
        slot = line[i]
        if rows >= limits[MAX_ROWS] or tokens >= limits[MAX_TOKENS]:
            break
        is_spare = not admitted[slot]
        limit = budget
        if is_spare and slot != starving:
            if pending:
                break
            if blocked and whole[HELD, slot] == 0:
                continue
            if num_promised > 0:
                limit = max(min(alone * limits[IDLE_CAP], cap), period) / margin
            else:
                limit = cap / margin
        past = float(whole[COMPUTED, slot])
        left = float(whole[KNOWN, slot]) - past
        # A decode reads its context; a prompt chunk attends to what is before it.
        reads = past if left == 1.0 and whole[EMITTED, slot] > 0 else 0.0
        most = tokens_within(perf, limit, batch_context + reads, area, 0.0) - tokens
        if perf[2] > 0.0 and left > 1.0 and most > 0.0:
            for _ in range(2):
                chunk = min(left, most)
                most = tokens_within(perf, limit, batch_context, area + chunk * (past + 0.5 * chunk), 0.0) - tokens
        if slot == starving:
            most = max(most * limits[SHARE], 1.0)
        elif rows == 0 and most < 1.0:
            most = max(limits[MULTIPLE], 1.0)
        chunk = np.floor(min(left, most, limits[MAX_TOKENS] - tokens))
        if chunk < left:
            ends = np.floor((past + chunk) / limits[MULTIPLE]) * limits[MULTIPLE]
            chunk = ends - past
        if chunk < 1.0:
            if not is_spare:
                pending = True
            continue
        need = blocks_for(past + chunk, block_tokens) - whole[HELD, slot]
        if not mid_prefill and past == 0.0:
            rest = blocks_for(float(whole[KNOWN, slot]), block_tokens) - whole[HELD, slot]
            while free < owed + rest:
                victim = youngest_holder(whole, spare_order, -1, in_batch, mid_prefill)
                if victim < 0 or victim == slot:
                    break
                free += drop(whole, victim, limits, evicted, counts)
            if free < owed + rest:
                blocked = blocked or not is_spare
                continue
            owed += rest
        while free < need:
            above = -1
            if is_spare and slot != starving:
                for j in range(num_spare):
                    if spare_order[j] == slot:
                        above = j
            victim = youngest_holder(whole, spare_order, above, in_batch, mid_prefill)
            if victim == slot:
                victim = -1
            if victim < 0 and rows == 0 and not is_spare and mid_prefill:
                for j in range(num_accepted - 1, -1, -1):
                    if accepted[j] != slot and whole[HELD, accepted[j]] > 0:
                        victim = accepted[j]
                        break
            if victim < 0:
                break
            free += drop(whole, victim, limits, evicted, counts)
        if free < need:
            fits = (whole[HELD, slot] + free) * block_tokens - past
            chunk = min(chunk, fits)
            if chunk < left:
                ends = np.floor((past + chunk) / limits[MULTIPLE]) * limits[MULTIPLE]
                chunk = ends - past
            if chunk < 1.0:
                blocked = blocked or not is_spare
                continue
            need = blocks_for(past + chunk, block_tokens) - whole[HELD, slot]
        if not is_spare and chunk < left:
            pending = True
        if not mid_prefill and (left > 1.0 or whole[EMITTED, slot] == 0):
            owed -= need
        free -= need
        whole[HELD, slot] += need
        in_batch[slot] = True
        if left == 1.0 and whole[EMITTED, slot] > 0:
            chosen[num_chosen] = slot
            num_chosen += 1
            batch_context += past
        else:
            batch[filled, SLOT] = slot
            batch[filled, START] = past
            batch[filled, LENGTH_] = chunk
            batch[filled, DRAFT] = 0
            filled += 1
            area += chunk * (past + 0.5 * chunk)
        rows += 1
        tokens += chunk

    # 7. Guesses for the decodes, when nothing waits for the time they would take.
    steps = 0
    if limits[MAX_DRAFT] > 0 and num_chosen > 0 and filled == 0 and not pending and not blocked:
        longest = cap / margin
        steps = draft_steps(real, whole, chosen[:num_chosen], perf, int(limits[MAX_DRAFT]), longest)
    for i in range(num_chosen):
        slot = chosen[i]
        guesses = min(steps, int(whole[LEFT, slot]) - 1, int(limits[MAX_TOKENS] - tokens))
        guesses = max(guesses, 0)
        need = blocks_for(float(whole[COMPUTED, slot]) + 1.0 + guesses, block_tokens) - whole[HELD, slot]
        if need > free:
            guesses = 0
            need = blocks_for(float(whole[COMPUTED, slot]) + 1.0, block_tokens) - whole[HELD, slot]
        free -= need
        whole[HELD, slot] += need
        tokens += guesses
        batch[filled, SLOT] = slot
        batch[filled, START] = whole[COMPUTED, slot]
        batch[filled, LENGTH_] = 1 + guesses
        batch[filled, DRAFT] = guesses
        filled += 1
    counts[ROWS] = filled
    counts[STEPS] = steps
    limits[FREE_BLOCKS] = free
    if filled == 0:
        return 0.0
    return float(batch_seconds(perf, tokens, batch_context, area, float(steps)))


_ = (ARRIVED, finish_after)
