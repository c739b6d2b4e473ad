"""What Triton calls in a router: read each request, hand it to the event loop, return at once.

The threads are Triton's (`execute`) and the loop's, which does everything else: it watches the instances,
chooses, forwards, sends, and asks now and then whether a caller has gone. A request whose id starts with
`probe-` is answered here, so a supervisor sees whether this router lives, whatever its instances do.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import sys
import threading
import time
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from slos_serve.client.wire import text

from .python_model import SWITCH_SECONDS, TritonOutlet, control_of, stopped, timeout_of
from .python_model import TritonPythonModel as Instance
from .refusal import Refusal, invalid
from .router_call import Call, control_output, read_call
from .router_config import read_router_config
from .router_dispatch import Dispatcher, too_many
from .router_fleet import Instances
from .router_members import Members
from .stuck import Crossings

log = logging.getLogger(__name__)

POLL_SECONDS: Final = 0.1
CLOSE_SECONDS: Final = 10.0
STOP_SECONDS: Final = 1.0
# An output that is never sent. Triton lists all outputs for a caller who names none, but an ensemble only those that
# it maps: a request without this one may come from an ensemble, which would not tell that its caller has gone.
SEEN: Final = "seen_output"


class TritonPythonModel:
    """A router in front of several instances, with the tensors of one of them."""

    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        """The tensors of an instance, and one that tells ensembles from other callers."""
        config = Instance.auto_complete_config(config)
        config.add_output({"name": SEEN, "data_type": "TYPE_BOOL", "dims": [1]})
        return config

    def initialize(self, args: Mapping[str, str]) -> None:
        """Start the loop and look for instances. Raises what is wrong with the settings."""
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        sys.setswitchinterval(SWITCH_SECONDS)
        version_dir = Path(args["model_repository"]) / args["model_version"]
        self._config = read_router_config(version_dir)
        self._loop = asyncio.new_event_loop()
        self._crossings = Crossings()
        self._calls: dict[str, Call] = {}
        self._tasks: dict[Call, asyncio.Task[None]] = {}
        self._instances = Instances(self._config)
        self._dispatcher = Dispatcher(self._config, self._instances)
        self._members = Members(self._config, version_dir, self._instances.change)
        self._thread = threading.Thread(target=self._loop.run_forever, name="router", daemon=True)
        self._thread.start()
        self._crossings.start()
        self._run(self._members.look()).result(CLOSE_SECONDS)
        self._background = [self._run(each) for each in (self._members.run(), self._instances.attend(), self._poll())]

    def execute(self, requests: Sequence[Any]) -> None:
        """Take each request on, or answer what is wrong with it."""
        now = time.monotonic()
        for request in requests:
            outlet = TritonOutlet(request.get_response_sender(), self._crossings)
            try:
                self._take(request, outlet, now)
            except Refusal as refusal:
                outlet.fail(refusal)
            except Exception as error:
                log.exception("request %r could not be read", request.request_id())
                outlet.fail(Refusal("INTERNAL", f"the request could not be read: {error}"))

    def finalize(self) -> None:
        """Triton has waited for what was in flight: hang up and end the loop."""
        for each in self._background:
            each.cancel()
        self._run(self._close()).result(CLOSE_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_SECONDS)
        self._crossings.close()

    def _run(self, work: Coroutine[Any, Any, None]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _take(self, request: Any, outlet: TritonOutlet, now: float) -> None:
        parameters = json.loads(request.parameters() or "{}")
        tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        request_id = request.request_id()
        control = control_of(tensors, parameters)
        if request_id.startswith("probe-"):
            self._loop.call_soon_threadsafe(_answer_probe, outlet)
        elif control == "stop":
            self._loop.call_soon_threadsafe(self._stop, request_id, outlet)
        elif control == "watch":
            outlet.send(
                control_output({"router": True, "usable": [m.address for m in self._instances.usable]}), final=True
            )
        elif "ticket" in tensors:
            raise invalid("ticket", "must be given to the instance that issued it", text(tensors["ticket"]))
        elif control in ("", "place", "suggest"):
            timeout = timeout_of(request, parameters)
            named = request_id or f"slos-{secrets.token_hex(8)}"
            unseen = None
            if not control and SEEN not in request.requested_output_names():
                unseen = self._config.unseen_tokens, self._config.unseen_s
            call = read_call(named, tensors, parameters, outlet, now, timeout, bool(control), unseen)
            self._loop.call_soon_threadsafe(self._dispatcher.suggest if control == "suggest" else self._begin, call)
        else:
            raise invalid("control", "must be stop, watch, place or suggest at a router", control)

    def _begin(self, call: Call) -> None:
        if call.id in self._calls:
            call.fail(Refusal("ALREADY_EXISTS", f"id: request {call.id!r} is in flight"))
        elif len(self._calls) >= self._config.max_requests:
            call.fail(too_many(self._config.max_requests))
        else:
            self._calls[call.id] = call
            task = self._tasks[call] = self._loop.create_task(self._dispatcher.serve(call))
            task.add_done_callback(lambda _: self._end(call))

    def _end(self, call: Call) -> None:
        del self._calls[call.id], self._tasks[call]
        call.abandon("cancelled before anything was done", time.monotonic())  # nothing where it was answered

    def _stop(self, request_id: str, outlet: TritonOutlet) -> None:
        """The instance that has it writes the last response; if none does within a second, we do."""
        call = self._calls.get(request_id)
        if call is not None:
            call.deadline = min(call.deadline, time.monotonic() + STOP_SECONDS)
        self._stopping = self._loop.create_task(self._dispatcher.stop(request_id))
        outlet.send(stopped(), final=True)

    def _cancel(self, call: Call) -> None:
        call.is_cancelled = True
        self._tasks[call].cancel()

    async def _poll(self) -> None:
        """Notice callers that are gone, and those whose time is over."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            for call in list(self._tasks):
                if call.is_cancelled or call.outlet.is_closed:
                    continue
                if time.monotonic() >= call.deadline + POLL_SECONDS or call.outlet.is_cancelled():
                    self._cancel(call)
                await asyncio.sleep(0)

    async def _close(self) -> None:
        for call in list(self._tasks):
            self._cancel(call)
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        await self._instances.close()


def _answer_probe(outlet: TritonOutlet) -> None:
    outlet.send(
        {
            "text_output": np.array([b""], dtype=np.object_),
            "token_index": np.array([0], dtype=np.int32),
            "finish_reason": np.array([b"length"], dtype=np.object_),
            "receipt": np.array([b"{}"], dtype=np.object_),
        },
        final=True,
    )
