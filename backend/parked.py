"""The answer to an offered request, which nobody has claimed yet.

One that nobody claims within `seconds` is dropped and its request cancelled.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from slos_serve.client.wire import Array

from .refusal import Refusal


class Parked:
    """The outlet of an answer that nobody has claimed yet: it remembers what was said.

    Belongs to one sender lane. To that lane it looks like a caller who hangs up when the time is over.
    """

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds
        self.said: list[tuple[Mapping[str, Array], bool]] = []
        self.refusal: Refusal | None = None
        self.is_closed = False

    @property
    def has_ended(self) -> bool:
        """Whether the last word was said."""
        return self.refusal is not None or bool(self.said and self.said[-1][1])

    def send(self, tensors: Mapping[str, Array], *, final: bool) -> None:
        self.said.append((tensors, final))
        self._expire()

    def fail(self, refusal: Refusal) -> None:
        self.refusal = refusal
        self._expire()

    def is_cancelled(self) -> bool:
        return time.monotonic() >= self._until

    def close(self) -> None:
        """Nobody will claim it any more."""
        self.is_closed = True
        self.said.clear()

    def _expire(self) -> None:
        if self.has_ended and self.is_cancelled():
            self.close()
