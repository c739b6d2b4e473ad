"""Requests that were offered to this instance and run before anybody reads their answer.

A router offers a request; where it is accepted it starts at once and the router gets a ticket for the client,
who claims the stream with it.
"""

from __future__ import annotations

import re
import secrets
import threading
import time
from typing import Final

from .refusal import Refusal, invalid
from .responder import Reply

_FORM: Final = re.compile(r"[0-9a-f]{24}")


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
