"""A request answered with an error instead of tokens: a machine-readable code, then what to change.

    INVALID_ARGUMENT   the caller has to change the request; the text names the field and what was got
    ALREADY_EXISTS     the request id is in use by a request in flight
    OVERLOADED         try again in `retry_after_ms`
    UNAVAILABLE        the model is stopping or its engine failed: try another replica
    CANCELLED          the caller is gone
    INTERNAL           a defect of ours; the cause is in the log

A promise that cannot be kept is not an error: that request is served best effort and its receipt says so.
"""

from __future__ import annotations

import re
from typing import Final

CODES: Final = ("INVALID_ARGUMENT", "ALREADY_EXISTS", "OVERLOADED", "UNAVAILABLE", "CANCELLED", "INTERNAL")


class Refusal(Exception):
    """`code` is one of `CODES`; the text is `CODE[ details]: message`."""

    def __init__(self, code: str, message: str, details: str = "") -> None:
        assert code in CODES, code
        super().__init__(f"{code}{details and ' ' + details}: {message}")
        self.code = code


def invalid(field: str, wanted: str, got: object) -> Refusal:
    """The field `field` must be `wanted`, but `got` came; long values are shortened."""
    shown = repr(got)
    return Refusal("INVALID_ARGUMENT", f"{field}: {wanted}, got {shown if len(shown) <= 120 else shown[:117] + '...'}")


def overloaded(retry_after: float, message: str) -> Refusal:
    """Too much at once; `retry_after` seconds is when asking again makes sense."""
    return Refusal("OVERLOADED", message, f"retry_after_ms={max(1, round(retry_after * 1000))}")


_TEXT: Final = re.compile(r"\b([A-Z]+(?:_[A-Z]+)*)((?: [a-z_]+=\d+)*): (.*)", re.DOTALL)


def parse_refusal(text: str) -> Refusal | None:
    """The refusal that an instance wrote as `text`; None for an error that is not one of ours."""
    found = _TEXT.search(text)
    if found is None or found[1] not in CODES:
        return None
    return Refusal(found[1], found[3], found[2].strip())
