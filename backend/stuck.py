"""Notices a call into Triton that does not come back, so that its process can leave and be restarted.

tritonserver 2.51 can lock up its gRPC streams when a cancellation meets a response: whoever sends on one of them then
waits for ever, while HTTP, and with it every health check, goes on answering. A dead model process is seen by all.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import Final

log = logging.getLogger(__name__)

EXIT_FAILED: Final = 70
LOOK_SECONDS: Final = 1.0
PATIENCE: Final = 10  # looks; a call takes some tenths of a millisecond


def leave() -> None:
    """End this process: no lock of it can be trusted."""
    log.critical("leaving, because the server has not taken a response for %.0f s", PATIENCE * LOOK_SECONDS)
    os._exit(EXIT_FAILED)


class Crossings:
    """The calls into Triton that are under way: `with crossings: ...` around each, one at a time per thread.

    Waiting is counted in looks and not by a clock: a process that was frozen for a minute has waited one look.
    """

    def __init__(self, stuck: Callable[[], None] = leave) -> None:
        """`stuck` is called on the looking thread when a call was under way in `PATIENCE` looks in a row."""
        self._stuck = stuck
        self._under_way: dict[int, object] = {}  # by thread
        self._looks: dict[object, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stuck", daemon=True)

    def __enter__(self) -> None:
        self._under_way[threading.get_ident()] = object()

    def __exit__(self, *_: object) -> None:
        del self._under_way[threading.get_ident()]

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def look(self) -> None:
        """One look at what is under way."""
        self._looks = {call: self._looks.get(call, 0) + 1 for call in self._under_way.copy().values()}
        if max(self._looks.values(), default=0) >= PATIENCE:
            self._stuck()

    def _run(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            self.look()
