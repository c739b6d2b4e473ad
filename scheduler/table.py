"""The live requests as columns: one slot per request, one row per fact.

Plans are made tens of times a second over hundreds of requests, so the facts lie in arrays that compiled
loops can walk (`real`: float64, `whole`: int64; both [columns, slots]). Names and whatever else a request
is stay in Python. Slots are reused; the arrays double when they are full.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .core import Request, RequestId

# Columns of `real`.
DUE: Final = 0  # when the next output token is due; infinite without a promise
TPOT: Final = 1  # seconds per token of the current stage; infinite without a promise
WEIGHT: Final = 2
LENGTH: Final = 3  # expected tokens at the end, prompt included
SERVED: Final = 4  # when it last made progress (its arrival before that)
ACCEPT: Final = 5  # share of its guesses that are accepted
ASKED: Final = 6  # the caller's estimate of its output tokens; NaN without one
TRIED: Final = 7  # its own guesses that were verified
RIGHT: Final = 8  # of them, accepted
BLOCK_AT: Final = 9  # when its current block of gaps began (`attainment.block_attained`)
REALS: Final = 10

# Columns of `whole`.
KNOWN: Final = 0  # tokens whose ids are known: prompt and output
COMPUTED: Final = 1  # tokens with KV
EMITTED: Final = 2  # output tokens
HELD: Final = 3  # KV blocks
KIND: Final = 4
VERDICT: Final = 5  # why it is (not) admitted, a code of `Verdict`
TOLD: Final = 6  # the verdict that the last plan told
LEFT: Final = 7  # output tokens it may still produce
STAGE_LEFT: Final = 8  # output tokens left in the current stage
STAGE: Final = 9  # index of the current stage
STAGES: Final = 10  # number of stages
CLASS: Final = 11  # index of its class
BLOCK_GAPS: Final = 12  # gaps of its current block that are over
WHOLES: Final = 13

# Values of KIND.
BEST_EFFORT: Final = 0  # promised nothing
PROVISIONAL: Final = 1  # has an SLO and no first token: planned for anew at every step
PROMISED: Final = 2  # the first token is out: its SLO is kept to the end

_CAPACITY: Final = 64
_MAX_STAGES: Final = 4


class Table:
    """Slots for live requests. `active` lists the used slots in order of arrival.

    `stage_tokens` and `stage_tpot` have shape [stages, slots]: the limit and the pace of each stage.
    """

    def __init__(self) -> None:
        self.real: NDArray[np.float64] = np.zeros((REALS, _CAPACITY))
        self.whole: NDArray[np.int64] = np.zeros((WHOLES, _CAPACITY), dtype=np.int64)
        self.stage_tokens: NDArray[np.int64] = np.zeros((_MAX_STAGES, _CAPACITY), dtype=np.int64)
        self.stage_tpot: NDArray[np.float64] = np.full((_MAX_STAGES, _CAPACITY), np.inf)
        self.ids: list[RequestId] = [""] * _CAPACITY
        self.slot_of: dict[RequestId, int] = {}
        self._free = list(range(_CAPACITY - 1, -1, -1))
        self._active: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.slot_of)

    @property
    def active(self) -> NDArray[np.int64]:
        """Used slots in order of arrival, shape [n]."""
        if self._active is None:
            self._active = np.fromiter(self.slot_of.values(), dtype=np.int64, count=len(self.slot_of))
        return self._active

    def insert(self, request: Request) -> int:
        """Take a slot for a request, its stages filled in. Raises ValueError when its id is in use."""
        if request.id in self.slot_of:
            raise ValueError(f"request id {request.id!r} is already in flight")
        if not self._free:
            self._grow()
        slot = self._free.pop()
        self.ids[slot] = request.id
        self.slot_of[request.id] = slot
        self._active = None
        self.real[:, slot] = 0.0
        self.whole[:, slot] = 0
        stages = request.stages
        if len(stages) > self.stage_tokens.shape[0]:
            self._deepen(len(stages))
        for index, stage in enumerate(stages):
            self.stage_tokens[index, slot] = stage.max_new_tokens
            self.stage_tpot[index, slot] = stage.slo.tpot if stage.slo else np.inf
        self.whole[STAGES, slot] = len(stages)
        return slot

    def remove(self, request_id: RequestId) -> None:
        """Give a request's slot back. Raises KeyError when it is not here."""
        self._free.append(self.slot_of.pop(request_id))
        self._active = None

    def _grow(self) -> None:
        old = self.real.shape[1]
        self.real = _doubled(self.real)
        self.whole = _doubled(self.whole)
        self.stage_tokens = _doubled(self.stage_tokens)
        self.stage_tpot = _doubled(self.stage_tpot)
        self.ids += [""] * old
        self._free = list(range(2 * old - 1, old - 1, -1))

    def _deepen(self, stages: int) -> None:
        more = ((0, stages - self.stage_tokens.shape[0]), (0, 0))
        self.stage_tokens = np.pad(self.stage_tokens, more)
        self.stage_tpot = np.pad(self.stage_tpot, more, constant_values=np.inf)


def _doubled(array: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate([array, np.zeros_like(array)], axis=1)
