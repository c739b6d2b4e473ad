"""What a request gives back: deltas while it runs, one result or one error at its end.

Both transports put their responses through `Assembly`, which refuses a stream with a hole in it, one
without an end and one with two.

    StreamError
    ├── Refused      the server answered with an error; `code` says which
    ├── Lost         the stream broke, had a gap in its token count or ended without a finish reason
    └── Duplicated   something was answered after the last response
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final


class StreamError(Exception):
    """A request that did not end with a result."""


class Refused(StreamError):
    """The server answered with an error: `code`, such as INVALID_ARGUMENT or OVERLOADED, and a message.

    `code` is UNKNOWN for an error that Triton itself wrote. `retry_after_ms` says when asking again makes
    sense, where the server knows.
    """

    def __init__(self, code: str, message: str, retry_after_ms: int | None = None) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.retry_after_ms = retry_after_ms


class Lost(StreamError):
    """Part of the answer never came."""


class Duplicated(StreamError):
    """More came after the answer was complete."""


_REFUSAL: Final = re.compile(r"\b([A-Z]+(?:_[A-Z]+)*)((?: [a-z_]+=\d+)*): (.*)", re.DOTALL)
_RETRY: Final = re.compile(r"retry_after_ms=(\d+)")


def refused(text: str) -> Refused:
    """The typed error of a server's error text, `CODE[ retry_after_ms=N]: message`."""
    found = _REFUSAL.search(text)  # an ensemble puts its name before it
    if found is None:
        return Refused("UNKNOWN", text)
    code, details, message = found.groups()
    retry = _RETRY.search(details)
    return Refused(code, message, int(retry[1]) if retry else None)


@dataclass(frozen=True, slots=True)
class Delta:
    """One response: new text, its token ids, tokens so far with these, and when it came (monotonic seconds)."""

    text: str
    token_ids: tuple[int, ...]
    token_index: int
    at: float


@dataclass(frozen=True, slots=True)
class Result:
    """A whole answer. `token_times` has one monotonic time per token: tokens of one response share theirs.

    `finish_reason` is stop, length or cancelled; `receipt` says what was promised and what was kept.
    """

    text: str
    token_ids: tuple[int, ...]
    token_times: tuple[float, ...]
    finish_reason: str
    receipt: dict[str, Any]


@dataclass(slots=True)
class Assembly:
    """Puts the responses of one request together, in order."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)
    finish_reason: str = ""
    receipt: str = ""

    def add(
        self, text: str, token_ids: Sequence[int], token_index: int, finish_reason: str, receipt: str, at: float
    ) -> Delta:
        """Take one response. Raises Lost when `token_index` does not follow, Duplicated after the end."""
        if self.finish_reason:
            raise Duplicated(f"a response after the one with finish_reason {self.finish_reason!r}")
        if token_index != len(self.token_ids) + len(token_ids):
            raise Lost(
                f"token_index: expected {len(self.token_ids) + len(token_ids)} "
                f"({len(self.token_ids)} before, {len(token_ids)} now), got {token_index}"
            )
        self.text.append(text)
        self.token_ids.extend(token_ids)
        self.token_times.extend([at] * len(token_ids))
        self.finish_reason, self.receipt = finish_reason, receipt
        return Delta(text, tuple(token_ids), token_index, at)

    def result(self) -> Result:
        """The whole answer. Raises Lost when the stream ended before its last response."""
        if not self.finish_reason:
            raise Lost(f"the stream ended after {len(self.token_ids)} tokens without a finish_reason")
        return Result(
            "".join(self.text),
            tuple(self.token_ids),
            tuple(self.token_times),
            self.finish_reason,
            json.loads(self.receipt) if self.receipt else {},
        )
