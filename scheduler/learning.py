"""What a step's report changes in the columns of `table`: progress, first tokens, paces, ends; compiled."""

from __future__ import annotations

from typing import Any, Final

from .admission import Verdict
from .attainment import BLOCK_TOKENS
from .jit import compiled
from .lengths import ACCEPTANCE, expected_length, observe_length
from .table import (
    ACCEPT,
    ASKED,
    BEST_EFFORT,
    BLOCK_AT,
    BLOCK_GAPS,
    CLASS,
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
    RIGHT,
    SERVED,
    STAGE,
    STAGE_LEFT,
    STAGES,
    TPOT,
    TRIED,
    VERDICT,
)
from .timemodel import invert, observe

_ADMITTED: Final = int(Verdict.ADMITTED)
_MISSED: Final = int(Verdict.MISSED)

# Columns of `advances`.
DONE_COMPUTED: Final = 0
NEW: Final = 1
ACCEPTED: Final = 2
STAGE_ENDED: Final = 3
DONE: Final = 4

# `books`: the scheduler's running counts (int64).
HELD_BLOCKS: Final = 0  # summed over the live requests
SHARED_BLOCKS: Final = 1  # of them, counted more than once
ADMITTED_TOTAL: Final = 2
DECLINED_TOTAL: Final = 3
PREEMPTED_TOTAL: Final = 4
BOOKS: Final = 5

DRAFT_PRIOR: Final = 0.6  # acceptance assumed before any guess was verified
DRAFT_MEMORY: Final = 200.0  # guesses over which a class forgets
CLASS_WEIGHT: Final = 16.0  # guesses of its own that tell as much about a request as its class does


@compiled
def learn(
    real: Any,
    whole: Any,
    stage_tokens: Any,
    stage_tpot: Any,
    classes: Any,
    mode: int,
    perf: Any,
    books: Any,
    slots: Any,
    drafts: Any,
    advances: Any,
    predicted: float,
    started_at: float,
    finished_at: float,
    block_tokens: int,
    done: Any,
) -> int:
    """Apply each advance and correct the time model; returns how many ended, their slots in `done`.

    `slots[i]` is -1 where the request was cancelled while it ran; `predicted` are the seconds planned.
    """
    if slots.size > 0:
        observe(perf, invert(perf, predicted), finished_at - started_at)
    ended = 0
    for i in range(slots.size):
        slot = slots[i]
        if slot < 0:
            continue
        computed, new = advances[i, DONE_COMPUTED], advances[i, NEW]
        blocks = (computed + block_tokens - 1) // block_tokens
        books[HELD_BLOCKS] += blocks - whole[HELD, slot]
        whole[HELD, slot] = blocks
        whole[COMPUTED, slot] = computed
        real[SERVED, slot] = finished_at
        row = classes[whole[CLASS, slot]]
        if drafts[i] > 0:
            tried = learn_acceptance(row, drafts[i], advances[i, ACCEPTED])
            real[TRIED, slot] += tried
            real[RIGHT, slot] += advances[i, ACCEPTED]
            # some texts are easier to guess than others of their class: its own, with the class as its beginning
            own = real[RIGHT, slot] + CLASS_WEIGHT * row[ACCEPTANCE]
            real[ACCEPT, slot] = own / (real[TRIED, slot] + CLASS_WEIGHT)
        if new > 0:
            if whole[EMITTED, slot] == 0:
                first_token(real, whole, slot, finished_at, books)
            whole[KNOWN, slot] += new
            whole[EMITTED, slot] += new
            whole[LEFT, slot] -= new
            stage_ended = advances[i, STAGE_ENDED] != 0
            end_gaps(real, whole, slot, new, finished_at)
            if stage_ended or whole[STAGE_LEFT, slot] <= new:
                for token in range(new):
                    pace(real, whole, stage_tokens, stage_tpot, slot, stage_ended and token == new - 1)
            else:
                whole[STAGE_LEFT, slot] -= new
                real[DUE, slot] += new * real[TPOT, slot]
            if whole[KNOWN, slot] >= real[LENGTH, slot]:
                expect(real, whole, row, mode, slot)
        if advances[i, DONE] != 0:
            observe_length(row, float(whole[EMITTED, slot]))
            # drifts back, so that a class whose guesses failed for a while is tried again
            row[ACCEPTANCE] += (DRAFT_PRIOR - row[ACCEPTANCE]) / DRAFT_MEMORY
            books[HELD_BLOCKS] -= whole[HELD, slot]
            whole[HELD, slot] = 0
            done[ended] = slot
            ended += 1
    return ended


@compiled
def expect(real: Any, whole: Any, row: Any, mode: int, slot: int) -> None:
    """Predict the request's length anew; `row` holds its class's statistics."""
    emitted = float(whole[EMITTED, slot])
    output = expected_length(row, mode, emitted, emitted + whole[LEFT, slot], real[ASKED, slot])
    real[LENGTH, slot] = whole[KNOWN, slot] - emitted + output


@compiled
def first_token(real: Any, whole: Any, slot: int, finished_at: float, books: Any) -> None:
    """The first token settles what was provisional."""
    if whole[KIND, slot] != PROVISIONAL:
        books[DECLINED_TOTAL] += 1
    elif finished_at > real[DUE, slot]:
        whole[KIND, slot] = BEST_EFFORT
        whole[VERDICT, slot] = _MISSED
        books[DECLINED_TOTAL] += 1
    else:
        whole[KIND, slot] = PROMISED
        whole[VERDICT, slot] = _ADMITTED
        books[ADMITTED_TOTAL] += 1


@compiled
def end_gaps(real: Any, whole: Any, slot: int, new: int, finished_at: float) -> None:
    """`new` tokens end as many gaps, except that none ends with a request's first token; ten are a block."""
    gaps = whole[BLOCK_GAPS, slot] + new - (whole[EMITTED, slot] == new)
    if whole[EMITTED, slot] == new or gaps >= BLOCK_TOKENS:
        real[BLOCK_AT, slot] = finished_at
    whole[BLOCK_GAPS, slot] = gaps % BLOCK_TOKENS


@compiled
def pace(real: Any, whole: Any, stage_tokens: Any, stage_tpot: Any, slot: int, stage_ended: bool) -> None:
    """One token is out: the next is due one TPOT later, at the pace of the stage it belongs to."""
    whole[STAGE_LEFT, slot] -= 1
    following = whole[STAGE, slot] + 1
    if (stage_ended or whole[STAGE_LEFT, slot] <= 0) and following < whole[STAGES, slot]:
        real[BLOCK_AT, slot] = real[SERVED, slot]
        whole[BLOCK_GAPS, slot] = 0
        whole[STAGE, slot] = following
        whole[STAGE_LEFT, slot] = stage_tokens[following, slot]
        real[TPOT, slot] = stage_tpot[following, slot]
    real[DUE, slot] += real[TPOT, slot]


@compiled
def learn_acceptance(row: Any, drafted: int, accepted: int) -> int:
    """P(one guess is accepted), from runs that stop at the first refusal: accepted / (accepted + refused).

    Returns how many guesses of this run were verified.
    """
    tried = accepted + (1 if accepted < drafted else 0)
    keep = (1.0 - 1.0 / DRAFT_MEMORY) ** tried
    row[ACCEPTANCE] = keep * row[ACCEPTANCE] + (1.0 - keep) * (accepted / tried)
    return int(tried)
