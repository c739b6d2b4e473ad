"""The other end of a response sender, and a backend around a worker, for tests of whatever answers."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from typing import Any

from slos_serve.backend.metrics import Metrics, Numbers
from slos_serve.backend.refusal import Refusal
from slos_serve.backend.responder import Reply, Responder
from slos_serve.backend.translate import Submission, Translator
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


class Backend:
    """A worker with everything around it but Triton. Who makes one sets `translator` and `worker`."""

    translator: Translator
    worker: Any

    def __init__(self) -> None:
        self.failure: BaseException | None = None
        self.numbers: list[Numbers] = []
        self.metrics = Metrics(self.numbers.append)
        self.responder = Responder(2)

    def failed(self, error: BaseException) -> None:
        self.failure = error

    def start(self) -> None:
        self.metrics.start()
        self.responder.start(gone=self.worker.cancel)
        self.worker.start()

    def submission(self, request_id: str = "r", **fields: Any) -> Submission:
        return self.translator.submission(request_id, wire.encode(fields), {}, time.monotonic())

    def send(self, request_id: str = "r", *, is_offer: bool = False, **fields: Any) -> Caller:
        caller = Caller()
        self.worker.submit(Reply(self.submission(request_id, **fields), caller, is_offer=is_offer))
        return caller

    def close(self, drain: float = 0.0) -> None:
        self.worker.close(drain)
        self.responder.close(PATIENCE)
        self.metrics.close()

    def counted(self, name: str) -> dict[tuple[tuple[str, str], ...], float]:
        """The sums of a counter by label, after `close`."""
        sums: dict[tuple[tuple[str, str], ...], float] = {}
        for numbers in self.numbers:
            for (family, labels), value in numbers.counters.items():
                if family == name:
                    sums[labels] = sums.get(labels, 0.0) + value
        return sums
