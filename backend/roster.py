"""Who is in flight: bounds what one replica takes on and keeps request ids unique.

Only tokens that surely have to be computed count: the prompts whose first token is not out. What a
request may generate at most does not, so a huge `max_tokens` reserves nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from .refusal import Refusal, overloaded

_LEAST_RETRY_SECONDS: Final = 0.05


class Roster:
    """The requests in flight. Triton's thread enters them, the engine thread lets them go."""

    def __init__(self, max_requests: int, max_queued_tokens: int, seconds: Callable[[int], float]) -> None:
        """`seconds` is the time that a prefill of so many tokens takes."""
        self._max_requests = max_requests
        self._max_queued_tokens = max_queued_tokens
        self._seconds = seconds
        self._queued: dict[str, int] = {}
        self._queued_tokens = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._queued)

    def enter(self, request_id: str, prompt_tokens: int) -> None:
        """Take a request on, or raise Refusal: ALREADY_EXISTS or OVERLOADED."""
        with self._lock:
            if request_id in self._queued:
                raise Refusal("ALREADY_EXISTS", f"id: request {request_id!r} is in flight")
            if len(self._queued) >= self._max_requests:
                raise self._overloaded(f"requests in flight: at most {self._max_requests}, got one more")
            queued = self._queued_tokens + prompt_tokens
            if self._queued_tokens and queued > self._max_queued_tokens:
                raise self._overloaded(f"waiting prompt tokens: at most {self._max_queued_tokens}, got {queued}")
            self._queued[request_id] = prompt_tokens
            self._queued_tokens = queued

    def prefilled(self, request_id: str) -> None:
        """Its first token is out: its prompt no longer waits."""
        with self._lock:
            self._queued_tokens -= self._queued[request_id]
            self._queued[request_id] = 0

    def leave(self, request_id: str) -> None:
        """It ended; its id may be used again."""
        with self._lock:
            self._queued_tokens -= self._queued.pop(request_id)

    def _overloaded(self, message: str) -> Refusal:
        return overloaded(max(self._seconds(self._queued_tokens), _LEAST_RETRY_SECONDS), message)
