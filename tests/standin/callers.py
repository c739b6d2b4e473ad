"""The other end of a response sender, for tests of whatever answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any

from slos_serve.backend.refusal import Refusal
from slos_serve.client import wire

PATIENCE = 30.0


class Caller:
    """One caller's end: collects responses, may hang up, and refuses to be touched after the last one."""

    def __init__(self) -> None:
        self.responses: list[dict[str, Any]] = []
        self.refusal: Refusal | None = None
        self.has_hung_up = False
        self.breaks = False
        self.ended = threading.Event()

    @property
    def is_closed(self) -> bool:
        return self.ended.is_set()

    def send(self, tensors: Mapping[str, wire.Array], *, final: bool) -> None:
        assert not self.is_closed
        if self.breaks:
            raise MemoryError("no shared memory left")
        self.responses.append({name: array.tolist() for name, array in tensors.items()})
        if final:
            self.ended.set()

    def fail(self, refusal: Refusal) -> None:
        assert not self.is_closed
        self.refusal = refusal
        self.ended.set()

    def is_cancelled(self) -> bool:
        assert not self.is_closed
        return self.has_hung_up

    def wait(self) -> Caller:
        assert self.ended.wait(PATIENCE), "no answer"
        return self

    @property
    def text(self) -> str:
        return b"".join(response["text_output"][0] for response in self.responses).decode()

    @property
    def receipt(self) -> dict[str, Any]:
        receipt: dict[str, Any] = json.loads(self.responses[-1]["receipt"][0])
        return receipt

    @property
    def finish_reason(self) -> str:
        reason: bytes = self.responses[-1]["finish_reason"][0]
        return reason.decode()
