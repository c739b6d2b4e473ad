"""`slos-serve serve --instances N --router`: several instances and a router on one machine, each supervised.

Each is a tritonserver of its own with its own ports: the router at those that were asked for, instance k at
10 * k above. One that dies is restarted without touching the others. Real clusters run the same models with one
server per container; this is the same on one machine.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from .processes import Launch
from .supervisor import Limits, Supervisor

log = logging.getLogger("slos_serve.launcher")

PORT_STEP: Final = 10

ROUTER_CONFIG: Final = """\
# A router in front of several instances. Tensors and streaming are filled in; settings are in 1/router.json.
backend: "python"
instance_group [{ kind: KIND_CPU count: 1 }]
parameters { key: "slos_serve" value: { string_value: "router" } }
"""
ROUTER_MODEL: Final = '''"""The entry point that Triton loads for a router."""

from slos_serve.backend.router_model import TritonPythonModel  # noqa: F401
'''


def write_router_repository(folder: Path, settings: Mapping[str, Any]) -> Path:
    """A model repository in `folder` with a router of these settings and the ensemble in front of it."""
    from .ensemble import STEP, ensemble_config  # loads numpy, which the supervisor does without

    router, ensemble = folder / STEP, folder / "slos_ensemble"
    (router / "1").mkdir(parents=True)
    (ensemble / "1").mkdir(parents=True)
    (router / "config.pbtxt").write_text(ROUTER_CONFIG, encoding="utf-8")
    (router / "1" / "model.py").write_text(ROUTER_MODEL, encoding="utf-8")
    (router / "1" / "router.json").write_text(json.dumps(dict(settings), indent=1) + "\n", encoding="utf-8")
    (ensemble / "config.pbtxt").write_text(ensemble_config(), encoding="utf-8")
    return folder


class Replicas:
    """Supervised servers on threads of their own: `run` returns when all have ended."""

    def __init__(self, launches: Sequence[Launch], limits: Limits | None) -> None:
        self._supervisors = [Supervisor(launch, limits) for launch in launches]
        self._codes: list[int] = [0] * len(launches)

    def stop(self, *, at_once: bool = False) -> None:
        """Ask all to end; from a signal handler, too."""
        for supervisor in self._supervisors:
            supervisor.stop(at_once=at_once)

    def run(self) -> int:
        """The highest exit code of all. When one gives up, the others go on."""
        threads = [
            threading.Thread(target=self._run, args=(index, supervisor.run), name=f"server-{index}")
            for index, supervisor in enumerate(self._supervisors)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():  # a plain join would keep signals waiting
                thread.join(0.2)
        return max(self._codes)

    def _run(self, index: int, run: Callable[[], int]) -> None:
        self._codes[index] = run()
        log.info("server %d of %d ended with %d", index + 1, len(self._codes), self._codes[index])
