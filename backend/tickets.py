"""Requests that were offered to this instance and run before anybody reads their answer.

A router offers a request; where it is accepted it starts at once and the router gets a ticket for the client,
who claims the stream with it. An answer that nobody claims within `seconds` is dropped and its request cancelled.
"""

from __future__ import annotations

import re
import secrets
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from slos_serve.client.wire import Array

from .refusal import Refusal, invalid

if TYPE_CHECKING:
    from .responder import Reply


_FORM: Final = re.compile(r"[0-9a-f]{24}")


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


class Tickets:
    """Which reply each ticket stands for. The engine thread issues them, Triton's takes them back."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._replies: dict[str, tuple[float, Reply]] = {}
        self._lock = threading.Lock()

    def issue(self, reply: Reply) -> str:
        """A ticket that cannot be guessed; those that expired are forgotten."""
        now, ticket = time.monotonic(), secrets.token_hex(12)
        with self._lock:
            for old in [key for key, (until, _) in self._replies.items() if until < now]:
                del self._replies[old]
            self._replies[ticket] = (now + self.seconds, reply)
        return ticket

    def take(self, ticket: str) -> Reply:
        """Raises Refusal where there is none such: it expired, was used, or was issued by another instance."""
        if _FORM.fullmatch(ticket) is None:
            raise invalid("ticket", "must be one that an instance issued", ticket)
        with self._lock:
            found = self._replies.pop(ticket, None)
        if found is None:
            raise Refusal("UNAVAILABLE", f"ticket: unknown or expired, got {ticket!r}")
        return found[1]
