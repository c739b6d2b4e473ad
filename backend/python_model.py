"""What Triton calls: translate each request, hand it to the engine thread, return at once.

One instance is one engine with its scheduler. The threads are Triton's (`execute`), the engine's (`worker`),
the senders' (`responder`), the metrics', and one that looks for calls into Triton that hang (`stuck`).
This module and `metrics` alone see Triton's Python interface.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import os
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import triton_python_backend_utils as pb_utils

from slos_serve.client.wire import INPUTS, OUTPUTS, Array, text

from .config import EngineConfig, SloClass, read_config
from .herald import Herald
from .metrics import Metrics, TritonExporter
from .refusal import Refusal, invalid
from .responder import Reply, Responder
from .roster import Roster
from .sessions import Sessions
from .stuck import EXIT_FAILED, Crossings

log = logging.getLogger(__name__)

SWITCH_SECONDS: Final = 0.0002
FLUSH_SECONDS: Final = 10.0
# Names of `pb_utils.TritonError`: its values are not there yet when a configuration is completed.
STATUS: Final[Mapping[str, str]] = {
    "INVALID_ARGUMENT": "INVALID_ARG",
    "ALREADY_EXISTS": "ALREADY_EXISTS",
    "OVERLOADED": "UNAVAILABLE",
    "UNAVAILABLE": "UNAVAILABLE",
    "CANCELLED": "CANCELLED",
    "INTERNAL": "INTERNAL",
}
DATA_TYPE: Final = {"BYTES": "TYPE_STRING"}


class TritonOutlet:
    """Owns one request's response sender and sends the final flag exactly once.

    Used by one thread at a time. After the final flag the sender is not touched: asking it whether the
    request is cancelled would crash the server.
    """

    def __init__(self, sender: Any, crossings: Crossings) -> None:
        self._sender = sender
        self._crossings = crossings
        self._is_closed = False

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def send(self, tensors: Mapping[str, Array], *, final: bool) -> None:
        """Raises what Triton raises; the request is then still open unless this was final."""
        self._send(pb_utils.InferenceResponse([pb_utils.Tensor(*item) for item in tensors.items()]), final)

    def fail(self, refusal: Refusal) -> None:
        error = pb_utils.TritonError(str(refusal), getattr(pb_utils.TritonError, STATUS[refusal.code]))
        self._send(pb_utils.InferenceResponse(error=error), final=True)

    def is_cancelled(self) -> bool:
        if self._is_closed:
            return False
        with self._crossings:
            return bool(self._sender.is_cancelled())

    def _send(self, response: Any, final: bool) -> None:
        assert not self._is_closed, "a response after the final one"
        with self._crossings:
            if not final:
                self._sender.send(response)
                return
            self._is_closed = True
            sender, self._sender = self._sender, None  # Triton unloads no model while any sender is referred to
            try:
                sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            except Exception:
                with contextlib.suppress(Exception):  # without any final flag the caller would wait for ever
                    sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
                raise


class TritonPythonModel:
    """One instance of a model whose `backend` is slos_serve."""

    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        """The tensors of `client.wire`, all inputs optional; no batch dimension; responses as they come."""
        config.set_max_batch_size(0)
        config.set_model_transaction_policy({"decoupled": True})
        for field in INPUTS:
            config.add_input({**_tensor(field.name, field.dtype, field.dims), "optional": True})
        for field in OUTPUTS:
            config.add_output(_tensor(field.name, field.dtype, field.dims))
        return config

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load, measure and start everything. Raises what is wrong with the settings or the model."""
        from .build import build_engine  # these import torch: `auto_complete_config` runs in a process of its own
        from .translate import Limits, Translator

        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        sys.setswitchinterval(SWITCH_SECONDS)
        version_dir = Path(args["model_repository"]) / args["model_version"]
        config = read_config(version_dir)
        built = build_engine(config, version_dir)
        labels = {"model": args["model_name"], "version": args["model_version"]}
        self._drain = config.shutdown_drain_s
        self._turn = itertools.count(1)
        self._crossings = Crossings()
        self._metrics = Metrics(TritonExporter(labels))
        self._responder = Responder(config.sender_threads)
        sessions = Sessions(built.codec, config.session_tokens)
        self._translator = Translator(
            codec=built.codec,
            limits=Limits(built.max_context, built.vocab_size, config.default_max_tokens, built.think_end_id),
            classes=config.classes,
            default_class=config.default_class,
            prefill_seconds=built.prefill_seconds,
            sessions=sessions,
        )
        self._roster = Roster(config.max_requests, config.max_queued_tokens, built.prefill_seconds)
        meter = built.meter()
        self._herald = Herald(meter, _facts(config, labels, built.fingerprint, built.max_context))
        self._worker = built.worker(
            voice=self._responder,
            observer=self._metrics,
            roster=self._roster,
            sessions=sessions,
            failed=self._exit,
            meter=meter,
        )
        self._crossings.start()
        self._metrics.start()
        self._herald.start()
        self._responder.start(gone=self._worker.cancel)
        self._worker.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Take each request on, or answer what is wrong with it."""
        arrived_at = time.monotonic()
        for request in requests:
            outlet = TritonOutlet(request.get_response_sender(), self._crossings)
            try:
                self._take(request, outlet, arrived_at)
            except Refusal as refusal:
                self._refuse(outlet, refusal)
            except Exception as error:
                log.exception("request %r could not be read", request.request_id())
                self._refuse(outlet, Refusal("INTERNAL", f"the request could not be read: {error}"))

    def finalize(self) -> None:
        """Let what is in flight end for a while, answer the rest, and end all threads."""
        log.info("unloading: up to %.0f s for %d requests in flight", self._drain, len(self._roster))
        self._herald.close()
        self._worker.close(self._drain)
        self._responder.close(FLUSH_SECONDS)
        self._metrics.close()
        self._crossings.close()
        log.info("unloaded")

    def _take(self, request: Any, outlet: TritonOutlet, arrived_at: float) -> None:
        """A control request is answered here, all others go to the engine thread. Raises Refusal."""
        parameters = json.loads(request.parameters() or "{}")
        tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        control = control_of(tensors, parameters)
        if control == "watch":
            self._herald.watch(outlet)
        elif control == "stop":
            self._worker.cancel_id(request.request_id())
            outlet.send(stopped(), final=True)
        elif "ticket" in tensors:
            self._responder.claim(self._worker.tickets.take(text(tensors["ticket"])), outlet)
        elif control in ("", "offer"):
            request_id = request.request_id() or f"slos-{next(self._turn)}"
            submission = self._translator.submission(request_id, tensors, parameters, arrived_at)
            deadline = arrived_at + timeout_of(request, parameters)
            self._worker.submit(Reply(submission, outlet, deadline, is_offer=control == "offer"))
        else:
            raise invalid("control", "must be watch, stop or offer here", control)

    def _refuse(self, outlet: TritonOutlet, refusal: Refusal) -> None:
        self._metrics.refused(refusal.code)
        outlet.fail(refusal)

    def _exit(self, cause: BaseException) -> None:
        """The engine failed and everything is answered: get the answers out, then end this process.

        A supervisor sees the dead process and restarts the server; nothing in here could be trusted.
        """
        self._responder.close(FLUSH_SECONDS)
        log.critical("leaving, because the engine failed: %s", cause)
        os._exit(EXIT_FAILED)


def control_of(tensors: Mapping[str, Array], parameters: Mapping[str, Any]) -> str:
    """What a request asks for besides tokens; "" for an ordinary one. The parameter `stop: true` is a stop, too."""
    if parameters.get("stop") is True:
        return "stop"
    return text(tensors.get("control")) or str(parameters.get("control", ""))


def stopped() -> dict[str, Array]:
    """The answer to a stop request: it was heard, whether or not there was anything to stop."""
    return {"control_output": np.array([b'{"stopped": true}'], dtype=np.object_)}


def _facts(config: EngineConfig, labels: Mapping[str, str], fingerprint: str, max_context: int) -> dict[str, Any]:
    """What a router must know of this instance besides its load. `instance` is another one after a restart."""
    classes = {name: _class_facts(slo) for name, slo in config.classes.items()}
    return {
        **labels,
        "instance": secrets.token_hex(6),
        "fingerprint": fingerprint,
        "max_context": max_context,
        "classes": classes,
        "default_class": config.default_class,
    }


def _class_facts(slo: SloClass) -> dict[str, float | None]:
    names = ("ttft_ms", "ttft_slowdown", "ttft_floor_ms", "tpot_ms", "thinking_tpot_ms")
    return {name: None if slo.best_effort else getattr(slo, name) for name in names}


def timeout_of(request: Any, parameters: Mapping[str, Any]) -> float:
    """How long the caller wants to wait, in seconds: KServe's timeout in microseconds, also as a parameter."""
    given = request.timeout() or parameters.get("timeout", 0)
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 <= given < math.inf:
        raise Refusal("INVALID_ARGUMENT", f"timeout: must be a number of microseconds >= 0, got {given!r}")
    return given / 1e6 if given else math.inf


def _tensor(name: str, dtype: str, dims: Sequence[int]) -> dict[str, Any]:
    return {"name": name, "data_type": DATA_TYPE.get(dtype, f"TYPE_{dtype}"), "dims": list(dims)}
