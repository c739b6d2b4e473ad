"""Keeps one tritonserver answering: looks at it, decides whether it is well, ends and restarts it when not.

This Triton's health endpoints stay green when a stub or its engine thread is dead, so the supervisor asks each of
our models for one token and watches the stub processes. A busy server answers late but goes on computing: it is
alive while its iteration counter advances. Never imports torch or Triton, and never touches a request.
"""

from __future__ import annotations

import http.client
import json
import logging
import math
import os
import queue
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import IO, Any, Final, Literal

from .processes import Launch, ServerProcess

_LOG = logging.getLogger("slos_serve.supervisor")
_TICK: Final = 0.25
_KILL_SECONDS: Final = 2.0
BACKEND: Final = "slos_serve"
ITERATIONS: Final = "slos_serve_iterations_total"

_REFUSAL: Final = b"INVALID_ARGUMENT"  # the text, as the HTTP status of a dead stub is 400 too

Answer = Literal["answered", "refused", "failed"]


@dataclass(frozen=True, slots=True)
class Limits:
    """When to worry and when to give up. Times in seconds."""

    probe_interval: float = 5.0  # longer: fewer one-token requests, later discovery of a hung engine
    probe_timeout: float = 20.0  # longer: more patience with an engine that answers nobody
    failed_probes: int = 2  # in a row and without an iteration between them
    start_timeout: float = 900.0  # how long a model may take to load
    max_restarts: int = 5  # within the window; one more failure ends the launcher
    restart_window: float = 600.0
    first_delay: float = 1.0  # before the first restart; doubles with each further one in the window
    longest_delay: float = 30.0

    def __post_init__(self) -> None:
        for name in ("probe_interval", "probe_timeout", "start_timeout", "restart_window"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: expected seconds above 0, got {value}")
        if self.max_restarts < 0:
            raise ValueError(f"max_restarts: expected 0 or more, got {self.max_restarts}")


@dataclass(frozen=True, slots=True)
class Probe:
    """What one look at the models brought.

    `failed` when any model gave no token; `refused` when one was asked and said that the request was bad, which
    tells nothing about its engine; `before` and `after` the look are the engines' iteration counter, None where it
    could not be read.
    """

    answer: Answer
    detail: str
    before: float | None
    after: float | None


@dataclass(slots=True)
class Judge:
    """Tells a dead engine from a busy one. Sees probes in order, holds no clock."""

    failed_probes: int
    _failures: int = 0
    _iterations: float | None = None

    def cause(self, probe: Probe) -> str | None:
        """Why the server must be restarted, or None while there is no reason to."""
        before = (
            probe.before if self._iterations is None else self._iterations
        )  # a quick refusal leaves no time between
        advanced = None not in (before, probe.after) and probe.after != before
        self._iterations = self._iterations if probe.after is None else probe.after
        if probe.answer == "failed" and not advanced:
            self._failures += 1
        else:
            self._failures = 0
        if self._failures < self.failed_probes:
            return None
        return f"no token in {self._failures} probes and no iteration meanwhile: {probe.detail}"


@dataclass(slots=True)
class Restarts:
    """How many restarts are left, and how long to wait before the next."""

    limits: Limits
    _times: deque[float] = field(default_factory=deque)

    def delay(self, now: float) -> float | None:
        """Seconds to wait before restarting after a failure at `now`; None when it failed too often of late."""
        while self._times and now - self._times[0] >= self.limits.restart_window:
            self._times.popleft()
        if len(self._times) >= self.limits.max_restarts:
            return None
        delay: float = self.limits.first_delay * 2.0 ** len(self._times)
        self._times.append(now)
        return min(delay, self.limits.longest_delay)


def ask(address: str, method: str, path: str, body: object = None, *, timeout: float) -> tuple[int, bytes]:
    """One HTTP exchange, past any proxy setting. Raises OSError, which includes a time-out, or HTTPException."""
    connection = http.client.HTTPConnection(address, timeout=timeout)
    try:
        data = None if body is None else json.dumps(body).encode()
        connection.request(method, path, data, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def is_ready(address: str, models: tuple[str, ...] = (), *, timeout: float = 5.0) -> bool:
    """Whether the server, and each of these models, says that it is ready; not whether a model answers."""
    paths = ["/v2/health/ready", *(f"/v2/models/{model}/ready" for model in models)]
    try:
        return all(ask(address, "GET", path, timeout=timeout)[0] == 200 for path in paths)
    except (OSError, http.client.HTTPException):
        return False


def served_models(address: str, *, timeout: float) -> list[str]:
    """The names of the ready models that our backend serves, and of our routers."""
    _, body = ask(address, "POST", "/v2/repository/index", {"ready": True}, timeout=timeout)
    names = sorted({str(entry["name"]) for entry in json.loads(body)})
    configs = {name: json.loads(ask(address, "GET", f"/v2/models/{name}/config", timeout=timeout)[1]) for name in names}
    return [name for name, config in configs.items() if _is_ours(config)]


def _is_ours(config: dict[str, Any]) -> bool:
    """A router is an ordinary Python model that says so."""
    return config.get("backend") == BACKEND or BACKEND in config.get("parameters", {})


def probe_model(address: str, model: str, *, timeout: float) -> tuple[Answer, str]:
    """Asks one model for one token."""
    body = {
        "text_input": "x",
        "max_tokens": 1,
        "slo_class": "best_effort",
        "id": f"probe-{os.getpid()}-{time.monotonic_ns()}",
    }
    status, answer = ask(address, "POST", f"/v2/models/{model}/generate", body, timeout=timeout)
    text = f"{model} answered {status}: {answer[:300].decode('utf-8', 'replace')}"
    if status == 200 and b'"error"' not in answer:
        return "answered", text
    return ("refused" if _REFUSAL in answer else "failed"), text


def probe_all(address: str, *, timeout: float) -> tuple[Answer, str]:
    """The first failure among our models, else a refusal, else that all answered."""
    found: tuple[Answer, str] = ("answered", "")
    try:
        for model in served_models(address, timeout=timeout):
            answer = probe_model(address, model, timeout=timeout)
            if answer[0] == "failed":
                return answer
            found = answer if answer[0] == "refused" else found
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        return "failed", f"HTTP {address}: {type(error).__name__}: {error}"
    return found


def read_iterations(address: str, *, timeout: float = 5.0) -> float | None:
    """The sum of the engines' iteration counters on /metrics; None where there is none to read."""
    if not address:
        return None
    try:
        _, body = ask(address, "GET", "/metrics", timeout=timeout)
    except (OSError, http.client.HTTPException):
        return None
    lines = [line for line in body.decode("utf-8", "replace").splitlines() if line.startswith(ITERATIONS)]
    return math.fsum(float(line.rpartition(" ")[2]) for line in lines) if lines else None


def probe_server(http_address: str, metrics_address: str, *, timeout: float) -> Probe:
    """One look at the models of a server; without a metrics address a busy engine looks like a dead one."""
    before = read_iterations(metrics_address)
    answer, detail = probe_all(http_address, timeout=timeout)
    return Probe(answer, detail, before, read_iterations(metrics_address))


class Supervisor:
    """Runs a server until it is asked to stop, it ends by itself, or it failed too often.

    Without limits it only runs the server. `run` belongs to one thread; `stop` may come from any, or from a signal
    handler: it sets a flag and takes no lock.
    """

    def __init__(self, launch: Launch, limits: Limits | None, output: IO[Any] | None = None) -> None:
        self._launch = launch
        self._limits = limits
        self._output = output
        self._restarts = Restarts(limits or Limits())
        self._process: ServerProcess | None = None
        self._stopping = False
        self._killing = False
        self.was_ready = False
        self.num_starts = 0

    @property
    def pid(self) -> int | None:
        """The process id of the present server; None before the first start."""
        return self._process.pid if self._process else None

    def stop(self, *, at_once: bool = False) -> None:
        """Asks `run` to let requests in flight finish and return; `at_once` does not wait for them."""
        self._killing |= at_once
        self._stopping = True

    def run(self) -> int:
        """Starts the server and returns its last exit code; 1 when it failed too often."""
        while True:
            self._process = ServerProcess(self._launch, self._output)
            self.num_starts += 1
            cause = self._watch(self._process)
            if cause is None:
                return self._finish(self._process)
            _LOG.error("server %d is not well: %s", self._process.pid, cause)
            self._process.ask_to_exit()
            code = self._process.end(_KILL_SECONDS)
            delay = self._restarts.delay(time.monotonic()) if self.was_ready else None
            if delay is None:
                _LOG.error("giving up: %s", "it never became ready" if not self.was_ready else "it failed too often")
                return code if code > 0 else 1
            _LOG.warning("restart in %.0f s", delay)
            if not self._sleep(delay):
                return code

    def _finish(self, process: ServerProcess) -> int:
        """Lets the server end, for as long as its requests may take; every trace of it is removed."""
        process.ask_to_exit()
        until = time.monotonic() + self._launch.exit_seconds + 5.0
        while process.exit_code() is None and time.monotonic() < until and not self._killing:
            time.sleep(_TICK / 5)
        return process.end()

    def _sleep(self, seconds: float) -> bool:
        """Whether nobody asked to stop meanwhile."""
        until = time.monotonic() + seconds
        while not self._stopping and time.monotonic() < until:
            time.sleep(min(_TICK, max(0.0, until - time.monotonic())))
        return not self._stopping

    def _watch(self, process: ServerProcess) -> str | None:
        """Returns why this server must be ended, or None when it was asked to stop or ended in order."""
        rounds = _Rounds(self._launch, self._limits, process) if self._limits else None
        while not self._stopping:
            code = process.exit_code()
            if code is not None:
                return None if code == 0 or not rounds else f"it exited with {code}"
            if rounds:
                cause = rounds.look(time.monotonic())
                if cause:
                    return cause
                if rounds.is_ready and not self.was_ready:
                    self.was_ready = True
            time.sleep(_TICK)
        return None


class _Rounds:
    """The looks at one server, in order: ready at last, then stubs at every look and a probe at every interval."""

    def __init__(self, launch: Launch, limits: Limits, process: ServerProcess) -> None:
        self._launch = launch
        self._limits = limits
        self._process = process
        self._judge = Judge(limits.failed_probes)
        self._probes: queue.SimpleQueue[Probe] = queue.SimpleQueue()
        self._probing = False
        self._next_probe = 0.0
        self._give_up_at = time.monotonic() + limits.start_timeout
        self._lost: int | None = None
        self._refusal = ""
        self.is_ready = False

    def look(self, now: float) -> str | None:
        """Why the server is not well, or None."""
        if not self.is_ready:
            return self._await_ready(now)
        lost, self._lost = self._lost, self._process.lost_stub()
        if lost is not None and lost == self._lost:  # twice: one that is just being reaped is not lost
            return f"stub process {lost} died"
        if self._probing:
            return self._collect(now)
        if self._launch.http and now >= self._next_probe:
            self._process.find_stubs()
            self._probing = True
            threading.Thread(target=self._probe, name="probe", daemon=True).start()
        return None

    def _await_ready(self, now: float) -> str | None:
        if now > self._give_up_at:
            return f"not ready after {self._limits.start_timeout:.0f} s"
        if not self._launch.http or is_ready(self._launch.http):
            self.is_ready = True
            stubs = self._process.find_stubs()
            launch = self._launch
            _LOG.info("serving http=%s grpc=%s metrics=%s", launch.http, launch.grpc, launch.metrics)
            _LOG.info("server process %d, %d model processes", self._process.pid, len(stubs))
        return None

    def _collect(self, now: float) -> str | None:
        try:
            probe = self._probes.get_nowait()
        except queue.Empty:
            return None
        self._probing = False
        self._next_probe = now + self._limits.probe_interval
        if probe.answer == "refused" and probe.detail != self._refusal:
            self._refusal = probe.detail
            _LOG.warning("probe refused, so it says nothing about the engine: %s", probe.detail)
        if probe.answer == "failed":
            _LOG.warning("probe failed: %s", probe.detail)
        return self._judge.cause(probe)

    def _probe(self) -> None:
        """On a thread of its own: a hung engine must not keep us from seeing a dead stub."""
        self._probes.put(probe_server(self._launch.http, self._launch.metrics, timeout=self._limits.probe_timeout))
