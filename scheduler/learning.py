"""What a step's report changes in the columns of `table`; the common case of a decode, compiled."""

from __future__ import annotations

from typing import Any, Final

from .jit import compiled
from .table import COMPUTED, DUE, EMITTED, HELD, KNOWN, LEFT, LENGTH, SERVED, STAGE_LEFT, TPOT

# Columns of `advances`.
DONE_COMPUTED: Final = 0
NEW: Final = 1
ACCEPTED: Final = 2
STAGE_ENDED: Final = 3
DONE: Final = 4


@compiled
def advance_all(
    real: Any, whole: Any, slots: Any, advances: Any, finished_at: float, block_tokens: int, special: Any
) -> int:
    """Apply each advance; returns the change in held blocks.

    `special[i]` is set where the caller has more to do: a first token, an ended stage, an outgrown length
    estimate, or the end. Due times are moved here by the pace of the current stage.
    """
    change = 0
    for i in range(slots.size):
        slot = slots[i]
        special[i] = False
        if slot < 0:  # cancelled while it ran
            continue
        computed, new = advances[i, DONE_COMPUTED], advances[i, NEW]
        blocks = (computed + block_tokens - 1) // block_tokens
        change += blocks - whole[HELD, slot]
        whole[HELD, slot] = blocks
        whole[COMPUTED, slot] = computed
        real[SERVED, slot] = finished_at
        if new == 0:
            special[i] = advances[i, DONE] != 0
            continue
        special[i] = (
            advances[i, DONE] != 0
            or advances[i, STAGE_ENDED] != 0
            or whole[EMITTED, slot] == 0
            or whole[STAGE_LEFT, slot] <= new
            or whole[KNOWN, slot] + new >= real[LENGTH, slot]
        )
        whole[KNOWN, slot] += new
        whole[EMITTED, slot] += new
        whole[LEFT, slot] -= new
        if not special[i]:
            whole[STAGE_LEFT, slot] -= new
            real[DUE, slot] += new * real[TPOT, slot]
    return change
