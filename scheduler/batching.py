"""One step's batch: from deadlines to a period, from the period to tokens for each request.

    decodes of promised requests     every one, every step (they are only skipped when an urgent short
                                     prompt would miss beside them and all of them can wait)
    prefill of admitted requests     earliest deadline first, up to the period
    best effort                      what is left; the longest-unserved one first of all when its patience
                                     is over, so that nobody starves

The period is the shortest that meets the admitted deadlines with a reserve (just in time), never longer
than the first due token allows. Best-effort KV is dropped last-in-first-out whenever a promise needs it.

`compose` is the whole of it: six steps over the columns of `table`, each a compiled function below it.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from .admission import Verdict, admit, shortest_period
from .drafting import draft_steps, own_steps, tier_steps
from .jit import compiled
from .lead import IN_BLOCKS, UNSPENT, WHOLE, in_need, load_until
from .selection import refine
from .table import (
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
from .timemodel import AREA as AREA_TERM
from .timemodel import MARGIN, batch_seconds, tokens_within

_ADMITTED: Final = int(Verdict.ADMITTED)
_MISSED: Final = int(Verdict.MISSED)
_RELEGATED: Final = int(Verdict.RELEGATED)
_MEMORY: Final = int(Verdict.MEMORY)
_CAPACITY: Final = int(Verdict.CAPACITY)
ROOMY: Final = 0.6  # share of the blocks that the promised leave where decodes may wait
SCARCE: Final = 0.02  # share of the blocks below which memory is what everybody waits for

# `limits`: what the engine and the configuration allow (float64), and the memory there is.
FREE_BLOCKS: Final = 0
NUM_BLOCKS: Final = 1
BLOCK_TOKENS: Final = 2
MAX_TOKENS: Final = 3
MAX_ROWS: Final = 4
MULTIPLE: Final = 5
MAX_DRAFT: Final = 6
MID_PREFILL: Final = 7  # 1 when a started prompt may be dropped
CAP: Final = 8  # longest planned iteration, seconds
FLOOR: Final = 9  # shortest planned iteration, in decode-only iterations, where `WAIT` of `SHORT_TTFT` is less
RESERVE: Final = 10  # how much faster than needed prefill is planned
OVERCOMMIT: Final = 11  # predicted KV peaks may sum to this many times the memory
PATIENCE: Final = 12  # seconds without progress after which best effort is served first
SHARE: Final = 13  # of a batch's tokens, for the one whose patience is over
IDLE_CAP: Final = 14  # longest iteration of best-effort work beside promised decodes, in decode-only iterations
SHARED: Final = 15  # blocks counted more than once because requests share them
PACE: Final = 16  # longest iteration beside promised decodes, in their tightest TPOT
SETTLE: Final = 17  # 1 when a request is promised or declined for good at once
PURE: Final = 18  # 1 when decodes may wait for an urgent prompt
OWN_DRAFT: Final = 19  # 1 when each decode may have its own number of guesses
BY_TIER: Final = 20  # 1 when the published rule per tier chooses the guesses
SHORT_TTFT: Final = 21  # what nearly all TTFTs asked for lately exceed, seconds
WAIT: Final = 22  # how much of it an iteration may take that is planned
LEAD: Final = 23  # how far decodes that are ahead wait for prompts in need: a value of `lead`
LIMITS: Final = 24

# `batch`: one row for each chunk.
SLOT: Final = 0
START: Final = 1
SIZE: Final = 2
DRAFT: Final = 3

# `counts`: what was composed.
ROWS: Final = 0
EVICTED: Final = 1
STEPS: Final = 2
CHANGED: Final = 3  # verdicts nobody was told of
COUNTS: Final = 4

# `load`: the batch as it grows (float64).
TOKENS: Final = 0
CONTEXT: Final = 1
PREFILL_AREA: Final = 2
MEMBERS: Final = 3  # requests in the batch
DECODES: Final = 4  # of them, decodes
OWED: Final = 5  # blocks spoken for by started prompts that cannot be dropped
LOADS: Final = 6


@compiled
def blocks_for(tokens: float, block_tokens: float) -> float:
    return float(np.ceil(tokens / block_tokens))


@compiled
def is_decode(whole: Any, slot: int) -> bool:
    """Only its last token is not computed, and that token is output."""
    return bool(whole[EMITTED, slot] > 0 and whole[KNOWN, slot] - whole[COMPUTED, slot] == 1)


@compiled
def is_started(whole: Any, slot: int) -> bool:
    """Somewhere inside its prompt (or what stands for it after a preemption)."""
    return bool(whole[COMPUTED, slot] > 0 and not is_decode(whole, slot))


@compiled
def whole_chunk(past: float, left: float, most: float, multiple: float) -> float:
    """At most `most` of `left` tokens from `past`; a chunk that leaves some ends at a multiple."""
    chunk = np.floor(min(left, most))
    if chunk < left:
        chunk = np.floor((past + chunk) / multiple) * multiple - past
    return float(chunk)


# Memory


@compiled
def drop(whole: Any, slot: int, limits: Any, evicted: Any, counts: Any) -> None:
    """Take a request's KV away; its tokens are kept.

    Any of its blocks may be one that others share, so as many as are shared count as not gained.
    """
    held = float(whole[HELD, slot])
    kept = min(limits[SHARED], held)
    limits[SHARED] -= kept
    limits[FREE_BLOCKS] += held - kept
    whole[HELD, slot] = 0
    whole[COMPUTED, slot] = 0
    evicted[counts[EVICTED]] = slot
    counts[EVICTED] += 1


@compiled
def last_holder(whole: Any, order: Any, first: int, in_batch: Any, limits: Any) -> int:
    """The last of `order[first:]` that holds blocks, is not in the batch and may be dropped; -1 if none."""
    for i in range(order.size - 1, first - 1, -1):
        slot = order[i]
        if whole[HELD, slot] > 0 and not in_batch[slot] and (limits[MID_PREFILL] > 0.5 or not is_started(whole, slot)):
            return int(slot)
    return -1


@compiled
def largest_promised(whole: Any, decodes: Any) -> int:
    victim = -1
    for slot in decodes:
        if whole[KIND, slot] == PROMISED and (victim < 0 or whole[HELD, slot] >= whole[HELD, victim]):
            victim = slot
    return victim


@compiled
def needs_block(whole: Any, slot: int, limits: Any) -> bool:
    return bool(whole[COMPUTED, slot] >= whole[HELD, slot] * limits[BLOCK_TOKENS])


@compiled
def make_room_for_decodes(
    whole: Any, decodes: Any, accepted: Any, spare: Any, in_batch: Any, limits: Any, evicted: Any, counts: Any
) -> None:
    """Blocks for every promised decode: from best effort, then from unfinished prompts, then the largest promise."""
    short = 0.0
    for slot in decodes:
        if needs_block(whole, slot, limits):
            short += 1.0
    while limits[FREE_BLOCKS] < short:
        victim = last_holder(whole, spare, 0, in_batch, limits)
        if victim < 0:
            victim = last_holder(whole, accepted, 0, in_batch, limits)
        if victim < 0:
            victim = largest_promised(whole, decodes)
            if victim < 0:
                return
            if needs_block(whole, victim, limits):
                short -= 1.0
            whole[KIND, victim] = BEST_EFFORT
            whole[VERDICT, victim] = _RELEGATED
        drop(whole, victim, limits, evicted, counts)


@compiled
def may_start(
    whole: Any, slot: int, spare: Any, in_batch: Any, limits: Any, load: Any, evicted: Any, counts: Any
) -> bool:
    """Where a started prompt cannot be dropped, it must find its whole memory before it starts.

    Two half-done prompts that wait for each other's blocks would never end.
    """
    if limits[MID_PREFILL] > 0.5 or whole[COMPUTED, slot] > 0:
        return True
    rest = blocks_for(float(whole[KNOWN, slot]), limits[BLOCK_TOKENS]) - whole[HELD, slot]
    while limits[FREE_BLOCKS] < load[OWED] + rest:
        victim = last_holder(whole, spare, 0, in_batch, limits)
        if victim < 0 or victim == slot:
            return False
        drop(whole, victim, limits, evicted, counts)
    load[OWED] += rest
    return True


@compiled
def make_room(
    whole: Any,
    slot: int,
    need: float,
    position: int,
    accepted: Any,
    spare: Any,
    in_batch: Any,
    limits: Any,
    load: Any,
    evicted: Any,
    counts: Any,
) -> None:
    """Free up to `need` blocks for `slot`, which stands at `position` of `spare` (-1: it may take from all)."""
    while limits[FREE_BLOCKS] < need:
        victim = last_holder(whole, spare, position + 1, in_batch, limits)
        if victim < 0 and position < 0 and load[MEMBERS] == 0:
            # Nothing runs at all: admitted prompts wait for each other, so the last of them gives way.
            victim = last_holder(whole, accepted, 0, in_batch, limits)
        if victim < 0 or victim == slot:
            return
        drop(whole, victim, limits, evicted, counts)


# Time


@compiled
def period_of(
    real: Any,
    whole: Any,
    accepted: Any,
    now: float,
    first_due: float,
    tightest: float,
    load: Any,
    perf: Any,
    limits: Any,
) -> tuple[float, float, bool]:
    """How long this iteration may be with promises only, and with best effort; and whether decodes wait.

    `load` holds the promised decodes. Seconds, planning margin included.
    """
    margin = 1.0 + perf[MARGIN]
    alone = batch_seconds(perf, load[DECODES], load[CONTEXT], 0.0, 0.0) * margin
    cap = limits[CAP]
    if load[DECODES] > 0:
        cap = min(cap, first_due - now)
        cap = min(cap, limits[PACE] * tightest)
    cap = max(cap, alone)
    period = cap
    if load[DECODES] > 0:
        # A prompt that comes now waits for the end of this iteration: short only where TTFTs are.
        floor = min(max(alone * limits[FLOOR], limits[WAIT] * limits[SHORT_TTFT]), cap)
        period = shortest_period(
            real, whole, accepted, accepted.size, perf, now, floor, cap, load[DECODES], load[CONTEXT], limits[RESERVE]
        )
    idle = max(min(alone * limits[IDLE_CAP], cap), period) if load[DECODES] > 0 else cap
    if accepted.size > 0:
        head = accepted[0]
        left = float(whole[KNOWN, head] - whole[COMPUTED, head])
        area = left * (whole[COMPUTED, head] + 0.5 * left)
        wait = real[DUE, head] - now
        mixed = batch_seconds(perf, left + load[DECODES], load[CONTEXT], area, 0.0) * margin
        pure = batch_seconds(perf, left, 0.0, area, 0.0) * margin
        if mixed <= wait:
            period = min(period, max(wait, mixed))
        elif limits[PURE] > 0.5 and pure <= wait and load[DECODES] > 0 and pure + alone <= first_due - now:
            # The prompt would miss beside the decodes, and all of them can wait for it.
            wait = min(wait, first_due - now - alone)
            return wait / margin, wait / margin, True
    return period / margin, idle / margin, False


@compiled
def prompt_tokens_within(perf: Any, seconds: float, load: Any, past: float, left: float) -> float:
    """Prompt tokens that still fit into an iteration of `seconds`, their attention included."""
    most = tokens_within(perf, seconds, load[CONTEXT], load[PREFILL_AREA], 0.0) - load[TOKENS]
    if perf[AREA_TERM] > 0.0:
        for _ in range(2):
            chunk = max(min(left, most), 0.0)
            area = load[PREFILL_AREA] + chunk * (past + 0.5 * chunk)
            most = tokens_within(perf, seconds, load[CONTEXT], area, 0.0) - load[TOKENS]
    return float(most)


# The steps of compose


@compiled
def beside_prompts(
    real: Any, whole: Any, decodes: Any, waiting: Any, now: float, spend: float, load: Any, limits: Any
) -> tuple[float, float]:
    """How many decodes the mean iteration carries until those that wait are due, and the sum of their contexts."""
    if spend == UNSPENT or waiting.size == 0:
        return load[DECODES], load[CONTEXT]
    seconds = float(real[DUE][waiting].mean()) - now
    return load_until(real, whole, decodes, now, seconds, limits[PACE], spend == IN_BLOCKS)


@compiled
def accept(
    real: Any, whole: Any, order: Any, accepted: Any, verdict: Any, decodes: Any, perf: Any, now: float,
    tightest: float, first_due: float, room: float, load: Any, limits: Any,
) -> tuple[int, float]:  # fmt: skip
    """Decide on all of `order`; returns how many are promised, in `accepted`, and how far leads are spent for them.

    A decode that waits holds its memory longer: only where the promised leave most of it are leads spent.
    """
    spend = IN_BLOCKS if limits[LEAD] > UNSPENT and room >= ROOMY * limits[NUM_BLOCKS] else UNSPENT
    slack, block_tokens, settle = first_due - now, int(limits[BLOCK_TOKENS]), limits[SETTLE] > 0.5
    while True:
        beside, beside_context = beside_prompts(real, whole, decodes, order, now, spend, load, limits)
        count = admit(
            real, whole, order, accepted, verdict, perf, now, limits[CAP], load[DECODES], load[CONTEXT],
            beside, beside_context, tightest, slack, room, block_tokens, settle,
        )  # fmt: skip
        if spend != IN_BLOCKS or limits[LEAD] != WHOLE or not (verdict == _CAPACITY).any():
            break
        spend = WHOLE
    if not settle:
        count = refine(
            real, whole, order, accepted, count, verdict, decodes, perf, now, limits[CAP], load[CONTEXT],
            beside, beside_context, tightest, slack, room, block_tokens,
        )  # fmt: skip
    for i in range(order.size):
        whole[VERDICT, order[i]] = verdict[i]
        if settle and verdict[i] != _ADMITTED:
            whole[KIND, order[i]] = BEST_EFFORT
    return count, spend


@compiled
def decodes_to_run(
    real: Any, whole: Any, decodes: Any, accepted: Any, now: float, period: float, spend: float, perf: Any, load: Any,
    limits: Any,
) -> Any:  # fmt: skip
    """All of them; without those that can wait where the accepted prompts do not fit beside all."""
    left = 0.0
    for slot in accepted:
        left += whole[KNOWN, slot] - whole[COMPUTED, slot]
    fits = left <= tokens_within(perf, period, load[CONTEXT], 0.0, 0.0) - load[DECODES]
    if fits or spend == UNSPENT:
        return decodes
    return in_need(real, whole, decodes, now, limits[PACE], spend == IN_BLOCKS)


@compiled
def classify(
    real: Any, whole: Any, active: Any, now: float, perf: Any, limits: Any, promised: Any, waiting: Any, load: Any
) -> tuple[int, int, float, float, float]:
    """Sort the live requests into promised and provisional; a passed deadline ends a provisional one.

    Returns how many of each, the tightest TPOT and the earliest reachable due time of the promised
    (seconds), and the blocks their predicted peaks leave.
    """
    num_promised = num_waiting = 0
    tightest = first_due = np.inf
    peak = 0.0
    soonest = now + batch_seconds(perf, 1.0, 0.0, 0.0, 0.0)
    for slot in active:
        kind = whole[KIND, slot]
        if kind == PROVISIONAL:
            if real[DUE, slot] < now:
                whole[KIND, slot] = BEST_EFFORT
                whole[VERDICT, slot] = _MISSED
            else:
                waiting[num_waiting] = slot
                num_waiting += 1
        elif kind == PROMISED:
            promised[num_promised] = slot
            num_promised += 1
            load[CONTEXT] += whole[COMPUTED, slot]
            peak += blocks_for(max(real[LENGTH, slot], float(whole[KNOWN, slot])), limits[BLOCK_TOKENS])
            tightest = min(tightest, real[TPOT, slot])
            # A token that is late whatever runs now must not shorten every iteration for the others.
            if real[DUE, slot] >= soonest:
                first_due = min(first_due, real[DUE, slot])
        if limits[MID_PREFILL] < 0.5 and is_started(whole, slot):
            load[OWED] += blocks_for(float(whole[KNOWN, slot]), limits[BLOCK_TOKENS]) - whole[HELD, slot]
    load[DECODES] = num_promised
    return num_promised, num_waiting, tightest, first_due, limits[NUM_BLOCKS] * limits[OVERCOMMIT] - peak


@compiled
def serving_order(
    real: Any, whole: Any, active: Any, now: float, accepted: Any, admitted: Any, limits: Any, line: Any, spare: Any
) -> tuple[int, int, int]:
    """Who is served after the decodes, in order, and best effort by age; returns their numbers and the starving one.

    Requests that asked for an SLO and were declined come before those that asked for none.
    """
    num_spare = 0
    starving = -1
    for asked_for_one in (True, False):
        for slot in active:
            if whole[KIND, slot] != PROMISED and not admitted[slot] and (real[TPOT, slot] < np.inf) == asked_for_one:
                spare[num_spare] = slot
                num_spare += 1
                if now - real[SERVED, slot] > limits[PATIENCE] and (
                    starving < 0 or real[SERVED, slot] < real[SERVED, starving]
                ):
                    starving = slot
    size = 0
    if starving >= 0:
        line[size] = starving
        size += 1
    for slot in accepted:
        line[size] = slot
        size += 1
    for i in range(num_spare):
        if spare[i] != starving:
            line[size] = spare[i]
            size += 1
    return size, num_spare, starving


@compiled
def place_decode(whole: Any, slot: int, chosen: Any, in_batch: Any, load: Any) -> None:
    """A decode joins the batch; its row is written when the guesses are known."""
    chosen[int(load[DECODES])] = slot
    load[DECODES] += 1
    load[MEMBERS] += 1
    load[TOKENS] += 1.0
    load[CONTEXT] += whole[COMPUTED, slot]
    in_batch[slot] = True


@compiled
def place_promised(whole: Any, decodes: Any, chosen: Any, in_batch: Any, limits: Any, load: Any) -> None:
    """Every promised decode that is still promised after room was made for them."""
    for slot in decodes:
        if whole[KIND, slot] != PROMISED or load[MEMBERS] >= limits[MAX_ROWS] or load[TOKENS] >= limits[MAX_TOKENS]:
            continue
        if needs_block(whole, slot, limits):
            whole[HELD, slot] += 1
            limits[FREE_BLOCKS] -= 1.0
        place_decode(whole, slot, chosen, in_batch, load)


@compiled
def place_line(
    whole: Any,
    line: Any,
    accepted: Any,
    spare: Any,
    admitted: Any,
    starving: int,
    period: float,
    idle: float,
    chosen: Any,
    in_batch: Any,
    perf: Any,
    limits: Any,
    load: Any,
    batch: Any,
    evicted: Any,
    counts: Any,
) -> bool:
    """Fill the iteration in the order of `line`; returns whether admitted prefill had to be left over.

    `period` seconds for the starving and the admitted, `idle` seconds for best effort.
    """
    pending = False  # admitted prefill is left over: the time is spoken for
    blocked = False  # an admitted prompt waits for memory: nobody else may start
    for slot in line:
        if load[MEMBERS] >= limits[MAX_ROWS] or load[TOKENS] >= limits[MAX_TOKENS]:
            return True
        is_spare = not admitted[slot] and slot != starving
        if is_spare and pending:
            break
        if is_spare and blocked and whole[HELD, slot] == 0:
            continue
        position = -1
        if is_spare:
            position = 0
            while spare[position] != slot:
                position += 1
        past = float(whole[COMPUTED, slot])
        left = float(whole[KNOWN, slot]) - past
        seconds = idle if is_spare else period
        if is_decode(whole, slot):
            most = tokens_within(perf, seconds, load[CONTEXT] + past, load[PREFILL_AREA], 0.0) - load[TOKENS]
        else:
            most = prompt_tokens_within(perf, seconds, load, past, left)
        if slot == starving:
            most = max(most * limits[SHARE], limits[MULTIPLE])
        elif load[MEMBERS] == 0:
            most = max(most, limits[MULTIPLE])
        chunk = whole_chunk(past, left, min(most, limits[MAX_TOKENS] - load[TOKENS]), limits[MULTIPLE])
        if chunk < 1.0:
            pending = pending or not is_spare
            continue
        if not may_start(whole, slot, spare, in_batch, limits, load, evicted, counts):
            blocked = blocked or not is_spare
            continue
        need = blocks_for(past + chunk, limits[BLOCK_TOKENS]) - whole[HELD, slot]
        make_room(whole, slot, need, position, accepted, spare, in_batch, limits, load, evicted, counts)
        if limits[FREE_BLOCKS] < need:
            fits = (whole[HELD, slot] + limits[FREE_BLOCKS]) * limits[BLOCK_TOKENS] - past
            chunk = whole_chunk(past, left, min(chunk, fits), limits[MULTIPLE])
            if chunk < 1.0:
                blocked = blocked or not is_spare
                continue
            need = blocks_for(past + chunk, limits[BLOCK_TOKENS]) - whole[HELD, slot]
        pending = pending or (not is_spare and chunk < left)
        if limits[MID_PREFILL] < 0.5 and not is_decode(whole, slot):
            load[OWED] -= need
        limits[FREE_BLOCKS] -= need
        whole[HELD, slot] += need
        if is_decode(whole, slot):
            place_decode(whole, slot, chosen, in_batch, load)
        else:
            write_row(batch, counts, slot, past, chunk, 0)
            load[PREFILL_AREA] += chunk * (past + 0.5 * chunk)
            load[TOKENS] += chunk
            load[MEMBERS] += 1
            in_batch[slot] = True
    return pending


@compiled
def memory_binds(verdict: Any, limits: Any) -> bool:
    """Whether somebody was declined for want of memory, or hardly any is left."""
    short = limits[FREE_BLOCKS] < SCARCE * limits[NUM_BLOCKS]
    for each in verdict:
        short = short or each == _MEMORY
    return bool(short)


@compiled
def choose_guesses(
    real: Any, whole: Any, members: Any, perf: Any, limits: Any, context: float, longest: float, steps: Any
) -> int:
    """`steps[slot]` guesses for each decode of an iteration of at most `longest` seconds; returns the most."""
    most = int(limits[MAX_DRAFT])
    if members.size == 0:
        return 0
    if limits[BY_TIER] > 0.5:
        tier_steps(real, members, context, perf, most, longest, limits[OWN_DRAFT] > 0.5, steps)
    else:
        most = draft_steps(real, whole, members, context, perf, most, longest)
        steps[members] = most
        if most > 0 and limits[OWN_DRAFT] > 0.5:
            own_steps(real, members, context, perf, most, steps)
    return int(steps[members].max())


@compiled
def write_row(batch: Any, counts: Any, slot: int, start: float, size: float, draft: int) -> None:
    row = counts[ROWS]
    batch[row, SLOT] = slot
    batch[row, START] = start
    batch[row, SIZE] = size
    batch[row, DRAFT] = draft
    counts[ROWS] += 1


@compiled
def write_decodes(whole: Any, chosen: Any, steps: Any, limits: Any, load: Any, batch: Any, counts: Any) -> int:
    """Rows for the decodes with up to `steps[slot]` guesses, as far as tokens and free blocks go; returns the most."""
    longest = 0
    for slot in chosen:
        past = float(whole[COMPUTED, slot])
        guesses = max(min(steps[slot], int(whole[LEFT, slot]) - 1, int(limits[MAX_TOKENS] - load[TOKENS])), 0)
        need = blocks_for(past + 1.0 + guesses, limits[BLOCK_TOKENS]) - whole[HELD, slot]
        if need > limits[FREE_BLOCKS] - load[OWED]:
            guesses = 0
            need = blocks_for(past + 1.0, limits[BLOCK_TOKENS]) - whole[HELD, slot]
        limits[FREE_BLOCKS] -= need
        whole[HELD, slot] += need
        load[TOKENS] += guesses
        longest = max(longest, guesses)
        write_row(batch, counts, slot, past, 1.0 + guesses, guesses)
    return longest


@compiled
def compose(
    real: Any, whole: Any, active: Any, now: float, perf: Any, limits: Any, batch: Any, evicted: Any, counts: Any
) -> float:
    """Fill `batch` and `evicted`; returns the predicted seconds.

    `active` lists the live slots in order of arrival. Verdicts and held blocks are updated in `whole`,
    `limits[FREE_BLOCKS]` is left at what remains. O(n log n) and at most two passes of admission.
    """
    counts[:] = 0
    n, slots = active.size, whole.shape[1]
    load = np.zeros(LOADS)
    promised, waiting = np.empty(n, np.int64), np.empty(n, np.int64)
    num_promised, num_waiting, tightest, first_due, room = classify(
        real, whole, active, now, perf, limits, promised, waiting, load
    )
    decodes = promised[:num_promised]

    order = waiting[:num_waiting][np.argsort(real[DUE][waiting[:num_waiting]], kind="mergesort")]
    slots_accepted = np.empty(num_waiting + 1, np.int64)
    verdict = np.zeros(num_waiting, np.int64)
    num_accepted, spend = accept(
        real, whole, order, slots_accepted, verdict, decodes, perf, now, tightest, first_due, room, load, limits
    )
    accepted = slots_accepted[:num_accepted]
    admitted = np.zeros(slots, np.bool_)
    admitted[accepted] = True

    period, idle, decodes_wait = period_of(real, whole, accepted, now, first_due, tightest, load, perf, limits)
    running = decodes_to_run(real, whole, decodes, accepted, now, period, spend, perf, load, limits)

    load[:OWED] = 0.0
    in_batch = np.zeros(slots, np.bool_)
    chosen = np.empty(n, np.int64)
    line, spare = np.empty(n + 1, np.int64), np.empty(n, np.int64)
    size, num_spare, starving = serving_order(real, whole, active, now, accepted, admitted, limits, line, spare)
    steps = np.zeros(slots, np.int64)
    guessed = 0.0
    if not decodes_wait:
        make_room_for_decodes(whole, running, accepted, spare[:num_spare], in_batch, limits, evicted, counts)
        place_promised(whole, running, chosen, in_batch, limits, load)
        if limits[MAX_DRAFT] > 0 and memory_binds(verdict, limits):
            # Memory is what everybody waits for: decodes that end sooner are worth more than prefill, but for
            # what admitted prompts need; the reserve is what they do not.
            members = chosen[: int(load[DECODES])]
            alone = batch_seconds(perf, load[TOKENS], load[CONTEXT], 0.0, 0.0)
            share = 1.0 - 1.0 / limits[RESERVE] if accepted.size > 0 else 1.0
            most = alone + share * max(period - alone, 0.0)
            longest = choose_guesses(real, whole, members, perf, limits, load[CONTEXT], most, steps)
            guessed = float(steps.sum())
            drafting = batch_seconds(perf, load[TOKENS] + guessed, load[CONTEXT], 0.0, longest)
            drafting -= batch_seconds(perf, load[TOKENS] + guessed, load[CONTEXT], 0.0, 0.0)
            period, idle = period - drafting, idle - drafting
    load[TOKENS] += guessed
    left_over = place_line(
        whole, line[:size], accepted, spare[:num_spare], admitted, starving, period, idle, chosen, in_batch,
        perf, limits, load, batch, evicted, counts,
    )  # fmt: skip
    load[TOKENS] -= guessed

    if load[MEMBERS] == 0:
        # The prompts found no memory after all: the decodes they would have displaced run.
        make_room_for_decodes(whole, decodes, accepted, spare[:num_spare], in_batch, limits, evicted, counts)
        place_promised(whole, decodes, chosen, in_batch, limits, load)

    members = chosen[: int(load[DECODES])]
    if limits[MAX_DRAFT] > 0 and guessed == 0.0 and members.size > 0 and counts[ROWS] == 0 and not left_over:
        # Nothing waits for the time that guesses take.
        choose_guesses(real, whole, members, perf, limits, load[CONTEXT], idle, steps)
    counts[STEPS] = write_decodes(whole, members, steps, limits, load, batch, counts)
    if counts[ROWS] == 0:
        return 0.0
    return float(batch_seconds(perf, load[TOKENS], load[CONTEXT], load[PREFILL_AREA], float(counts[STEPS])))
