"""The live requests as columns: one slot per request, one row per fact.

Plans are made tens of times a second over hundreds of requests, so the facts lie in two arrays that
compiled loops can walk (`real`: float64, `whole`: int64; both [columns, slots]). Everything else about a
request stays in Python. Slots are reused; the arrays double when they are full.
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
REALS: Final = 6

# Columns of `whole`.
KNOWN: Final = 0  # tokens whose ids are known: prompt and output
COMPUTED: Final = 1  # tokens with KV
EMITTED: Final = 2  # output tokens
HELD: Final = 3  # KV blocks
KIND: Final = 4
SEQUENCE: Final = 5  # order of arrival
VERDICT: Final = 6  # why it is (not) admitted, a code of `Verdict`
TOLD: Final = 7  # the verdict that the last plan told
LEFT: Final = 8  # output tokens it may still produce
STAGE_LEFT: Final = 9  # of them, in the current stage
STAGE: Final = 10  # index of the current stage
WHOLES: Final = 11

# Values of KIND.
BEST_EFFORT: Final = 0  # promised nothing
PROVISIONAL: Final = 1  # has an SLO and no first token: planned for anew at every step
PROMISED: Final = 2  # the first token is out: its SLO is kept to the end


class Table:
    """Slots for live requests. `active` lists the used slots in order of arrival."""

    def __init__(self, capacity: int = 64) -> None:
        self.real: NDArray[np.float64] = np.zeros((REALS, capacity))
        self.whole: NDArray[np.int64] = np.zeros((WHOLES, capacity), dtype=np.int64)
        self.requests: list[Request | None] = [None] * capacity
        self.ids: list[RequestId] = [""] * capacity
        self.slot_of: dict[RequestId, int] = {}
        self._free = list(range(capacity - 1, -1, -1))
        self._sequence = 0

    def __len__(self) -> int:
        return len(self.slot_of)

    @property
    def active(self) -> NDArray[np.int64]:
        """Used slots in order of arrival, shape [n]."""
        return np.fromiter(self.slot_of.values(), dtype=np.int64, count=len(self.slot_of))

    def insert(self, request: Request) -> int:
        """Take a slot for a request. Raises ValueError when its id is in use."""
        if request.id in self.slot_of:
            raise ValueError(f"request id {request.id!r} is already in flight")
        if not self._free:
            self._grow()
        slot = self._free.pop()
        self.requests[slot] = request
        self.ids[slot] = request.id
        self.slot_of[request.id] = slot
        self.real[:, slot] = 0.0
        self.whole[:, slot] = 0
        self.whole[SEQUENCE, slot] = self._sequence
        self._sequence += 1
        return slot

    def remove(self, request_id: RequestId) -> Request | None:
        """Give a request's slot back; None when it is not here."""
        slot = self.slot_of.pop(request_id, None)
        if slot is None:
            return None
        request, self.requests[slot] = self.requests[slot], None
        self._free.append(slot)
        return request

    def request(self, slot: int) -> Request:
        request = self.requests[slot]
        if request is None:
            raise LookupError(f"slot {slot} is empty")
        return request

    def _grow(self) -> None:
        old = self.real.shape[1]
        self.real = _wider(self.real)
        self.whole = _wider(self.whole)
        self.requests += [None] * old
        self.ids += [""] * old
        self._free = list(range(2 * old - 1, old - 1, -1))


def _wider(array: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate([array, np.zeros_like(array)], axis=1)
