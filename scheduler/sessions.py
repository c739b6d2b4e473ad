"""A session's tool rounds are one piece of work: its promise is kept as a whole or not at all.

Where one round was late, the others are worth little beside work whose promise can still be kept. A session that
nobody heard of for `REST` seconds starts anew, and beyond `MOST` of them the oldest is forgotten.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

REST: Final = 10.0  # seconds after which the next request of a session is no round of the same piece of work
MOST: Final = 10_000  # late sessions remembered
WORTH: Final = 0.01  # of a round whose session was late


class LateSessions:
    """Whose promise is broken already. Times are absolute seconds that never go back."""

    def __init__(self) -> None:
        self._ended_at: OrderedDict[str, float] = OrderedDict()

    def worth(self, session: str, now: float) -> float:
        """Of the session's next round, as a factor of what it would be alone."""
        return WORTH if now - self._ended_at.get(session, -REST) < REST else 1.0

    def ended(self, session: str, kept: bool, now: float) -> None:
        """A round is over; `kept` says whether its own promise was."""
        if kept and self.worth(session, now) == 1.0:
            self._ended_at.pop(session, None)
            return
        self._ended_at[session] = now
        self._ended_at.move_to_end(session)
        if len(self._ended_at) > MOST:
            self._ended_at.popitem(last=False)
