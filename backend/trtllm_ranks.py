"""The planner for an engine of several GPUs, whose ranks run in processes of their own.

    front process                                rank 0                         other ranks
    Ranks listens, TLLM_SLOS_SERVE_LINK=...  ->  bootstrap() wraps create_py_executor in every rank
    tickets, "fly" ------------------------->    Pilot decides, then            Pilot does as it is told:
    decisions, counts  <---------------------    broadcasts ids and sizes  ->   one collective per iteration

`bootstrap` is called where `docker/Dockerfile` has put one line into a `.pth` file; the variable's name begins with
TLLM because TensorRT-LLM hands only such variables on to its ranks. The other way in, Ray with
`ray_worker_extension_cls`, needs no such line, but Ray; it is not built here. Ranks start as governor, and stay it
until the front says "fly"; when the link breaks they go back to it. Draft lengths are left to the engine.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import json
import logging
import os
import shutil
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from slos_serve.scheduler import POLICIES, BatchShape, Capabilities, PerfModel
from slos_serve.scheduler.core import Plan, RequestId, Snapshot, StepReport

from .trtllm_pilot import SAMPLES, Cockpit, Mode, Pilot, Ticket
from .trtllm_probe import Check, Findings, capabilities_of, limits_of, prepare, probe, scheduler_class
from .trtllm_worker import Tickets

log = logging.getLogger(__name__)

VARIABLE: Final = "TLLM_SLOS_SERVE_LINK"
CREATOR: Final = "tensorrt_llm._torch.pyexecutor.py_executor_creator"
HELLO_SECONDS: Final = 30.0
TICKET_SECONDS: Final = 0.02
MISSED: Final = 512  # requests without a ticket that are remembered, so that nobody waits for it again


# In the front's process


class RemotePilot:
    """What the front knows of the pilot in rank 0: its mode, and the batches that it saw with their seconds."""

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self.samples: deque[tuple[BatchShape, float]] = deque(maxlen=SAMPLES)


class RemoteTickets(Tickets):
    """Tickets that are also sent to rank 0."""

    def __init__(self, send: Callable[[Any], None]) -> None:
        super().__init__()
        self._send = send

    def __setitem__(self, client_id: int, ticket: Ticket) -> None:
        super().__setitem__(client_id, ticket)
        self._send(("ticket", client_id, ticket))

    def pop(self, client_id: int, default: Any = None) -> Any:
        self._send(("drop", client_id))
        return super().pop(client_id, default)


class Ranks:
    """The front's end of the link. Made before the engine is, so that its ranks find it."""

    def __init__(self) -> None:
        self._folder = folder = tempfile.mkdtemp(prefix="slos-serve-ranks-")
        key = os.urandom(16)
        self._listener = Listener(str(Path(folder) / "link"), "AF_UNIX", authkey=key)
        os.environ[VARIABLE] = json.dumps({"address": self._listener.address, "key": key.hex()})
        self._connection: Connection | None = None
        self._sending = threading.Lock()
        self._hello = threading.Event()
        self._watcher: Any = None
        self._pilot: RemotePilot | None = None
        self.hello: dict[str, Any] = {}
        threading.Thread(target=self._listen, name="ranks", daemon=True).start()

    def findings(self) -> Findings:
        """What rank 0 found; that it did not call is a finding too."""
        if not self._hello.wait(HELLO_SECONDS):
            remedy = "install the .pth line of docker/Dockerfile, or set tensor_parallel to 1"
            return Findings((Check("ranks", Mode.GOVERNOR, "no rank called the planner", remedy),))
        return Findings(tuple(Check(c["name"], Mode(c["mode"]), c["found"], c["remedy"]) for c in self.hello["checks"]))

    def tickets(self) -> RemoteTickets:
        return RemoteTickets(self._send)

    def fly(self, mode: Mode, policy: str, perf: PerfModel, capabilities: Capabilities, watcher: Any) -> RemotePilot:
        """Let the planner decide in this mode from the next iteration on."""
        self._watcher, self._pilot = watcher, RemotePilot(mode)
        self._send(("fly", mode.value, policy, perf.to_json(), asdict(capabilities)))
        return self._pilot

    def close(self) -> None:
        os.environ.pop(VARIABLE, None)
        self._listener.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _send(self, message: Any) -> None:
        connection = self._connection
        if connection is not None:
            try:
                with self._sending:
                    connection.send(message)
            except OSError:
                log.warning("rank 0 is gone")

    def _listen(self) -> None:
        try:
            self._connection = self._listener.accept()
            self.hello = self._connection.recv()
            self._hello.set()
            while True:
                kind, *values = self._connection.recv()
                if kind == "mode" and self._pilot is not None:
                    self._pilot.mode = Mode(values[0])
                elif kind == "sample" and self._pilot is not None:
                    self._pilot.samples.append((values[0], values[1]))
                elif self._watcher is not None:
                    getattr(self._watcher, kind)(*values)
        except (OSError, EOFError):
            return


# In the ranks' processes


class Link:
    """Rank 0's end: orders come in, and it is the pilot's watcher."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self.orders: list[tuple[Any, ...]] = []
        self.tickets = WaitingTickets()
        self.is_open = True

    def start(self, hello: Mapping[str, Any]) -> None:
        self._connection.send(dict(hello))
        threading.Thread(target=self._read, name="slos-serve-link", daemon=True).start()

    def _read(self) -> None:
        try:
            while True:
                kind, *values = self._connection.recv()
                if kind == "ticket":
                    self.tickets.put(*values)
                elif kind == "drop":
                    self.tickets.pop(values[0], None)
                else:
                    self.orders.append((kind, *values))
        except (OSError, EOFError):
            self.is_open = False

    def send(self, *message: Any) -> None:
        if self.is_open:
            try:
                with self._sending:
                    self._connection.send(message)
            except OSError:
                self.is_open = False

    def stepped(self, plan: Plan, report: StepReport, planning: float) -> None:
        self.send("stepped", plan, report, planning)

    def event(self, kind: str, detail: str) -> None:
        self.send("event", kind, detail)

    def planned(self, plan: Plan, clients: Mapping[RequestId, int]) -> None:
        if plan.decisions or plan.evicted:
            concerned = {each.request_id for each in plan.decisions} | set(plan.evicted)
            slim = Plan((), plan.evicted, plan.decisions, plan.predicted)
            self.send("planned", slim, {name: clients[name] for name in concerned if name in clients})

    def measured(self, snapshot: Snapshot) -> None:
        self.send("measured", snapshot)


class WaitingTickets(dict[int, Ticket]):
    """The first lookup waits a little: the ticket of a request travels beside it, and may come later."""

    def __init__(self) -> None:
        super().__init__()
        self._news = threading.Condition()
        self._missed: deque[int] = deque(maxlen=MISSED)

    def put(self, client_id: int, ticket: Ticket) -> None:
        with self._news:
            self[client_id] = ticket
            self._news.notify_all()

    def get(self, client_id: int, default: Any = None) -> Any:
        found = super().get(client_id)
        if found is None and client_id not in self._missed:
            with self._news:
                if not self._news.wait_for(lambda: client_id in self, TICKET_SECONDS):
                    self._missed.append(client_id)
        return super().get(client_id, default) if found is None else found


class _Silent:
    """The watcher of a rank that only does as it is told."""

    def stepped(self, plan: Plan, report: StepReport, planning: float) -> None: ...
    def event(self, kind: str, detail: str) -> None: ...
    def planned(self, plan: Plan, clients: Mapping[RequestId, int]) -> None: ...
    def measured(self, snapshot: Snapshot) -> None: ...


class RankPilot:
    """The pilot of one rank, which takes the front's orders between two iterations."""

    def __init__(self, pilot: Pilot, link: Link | None) -> None:
        self.pilot = pilot
        self._link = link
        self._mode = pilot.mode

    @property
    def stock(self) -> Any:
        return self.pilot.stock

    def schedule(self, active: Sequence[Any], inflight: Any) -> Any:
        if self._link is None:
            return self.pilot.schedule(active, inflight)
        self._obey(self._link)
        batch = self.pilot.schedule(active, inflight)
        while self.pilot.samples:
            self._link.send("sample", *self.pilot.samples.popleft())
        return batch

    def can_schedule(self, requests: Sequence[Any]) -> bool:
        return self.pilot.can_schedule(requests)

    def _obey(self, link: Link) -> None:
        while link.orders:
            _, mode, policy, perf, capabilities = link.orders.pop(0)
            make = partial(POLICIES[policy], Capabilities(**capabilities), PerfModel.from_json(perf))
            self.pilot.fly(Mode(mode), make)
            self._mode = self.pilot.mode
        for _ in Mode:
            if not link.is_open:
                self.pilot.step_down("the front is gone")
        if self.pilot.mode is not self._mode:
            self._mode = self.pilot.mode
            link.send("mode", self._mode.value)


def bootstrap() -> None:
    """In a rank's process: see to it that its executor gets a pilot. Does nothing where nobody listens."""
    if VARIABLE not in os.environ:
        return
    if CREATOR in sys.modules:
        _wrap(sys.modules[CREATOR])
    else:
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Waits for the module that creates executors; TensorRT-LLM must not be imported earlier than it wants to be."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != CREATOR:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def executed(module: ModuleType) -> None:
                execute(module)
                _wrap(module)

            spec.loader.exec_module = executed  # type: ignore[method-assign]
        return spec


def _wrap(module: ModuleType) -> None:
    create = module.create_py_executor
    if getattr(create, "is_slos_serve", False):
        return

    def create_py_executor(*args: Any, **kwargs: Any) -> Any:
        engine = create(*args, **kwargs)
        try:
            take_over(engine)
        except Exception:  # without a planner the engine still serves
            log.exception("the planner could not take this rank over")
        return engine

    create_py_executor.is_slos_serve = True  # type: ignore[attr-defined]
    module.create_py_executor = create_py_executor  # type: ignore[attr-defined]


def take_over(engine: Any) -> None:
    """Put a pilot in the place of a rank's scheduler, as governor. Every rank finds the same and does the same."""
    from . import trtllm_api

    api = trtllm_api.load()
    prepare(engine)
    findings = probe(api, engine)
    is_leader = int(engine.dist.rank) == 0
    link = _connect() if is_leader else None
    if findings.mode is not Mode.GOVERNOR:
        limits = limits_of(engine, chunked=True)
        cache = engine.kv_cache_manager
        cockpit = Cockpit(
            stock=engine.scheduler,
            states=api.LlmRequestState,
            make_output=api.SchedulerOutput,
            limits=limits,
            free_blocks=cache.get_num_free_blocks,
            is_unread=lambda: engine.previous_batch is not None and not engine.disable_overlap_scheduler,
            is_leader=is_leader,
            collective=lambda value: engine.dist.broadcast(value, root=0),
        )
        tickets: Mapping[int, Ticket] = link.tickets if link is not None else {}
        idle = Capabilities(1, limits.block_tokens, 1, 1, 2)
        pilot = Pilot(
            cockpit, lambda: POLICIES["slos_serve"](idle, PerfModel.from_json({"pieces": [[1e-5, 0.0, 0.01]]})),
            Mode.GOVERNOR, link or _Silent(), tickets,
        )  # fmt: skip
        engine.scheduler = scheduler_class(api)(RankPilot(pilot, link))
    if link is not None:
        link.start(_hello(engine, findings))


def _hello(engine: Any, findings: Findings) -> dict[str, Any]:
    checks = [
        {"name": c.name, "mode": c.needed_for.value, "found": c.found, "remedy": c.remedy} for c in findings.checks
    ]
    blocks = int(engine.kv_cache_manager.get_max_resource_count())
    capabilities = capabilities_of(limits_of(engine, chunked=True), blocks, UNKNOWN_CONTEXT)
    return {
        "checks": checks,
        "capabilities": asdict(capabilities),
        "most_active": int(engine.max_num_active_requests),
    }


UNKNOWN_CONTEXT: Final = 1 << 30  # the front knows it


def _connect() -> Link:
    found = json.loads(os.environ[VARIABLE])
    return Link(Client(found["address"], "AF_UNIX", authkey=bytes.fromhex(found["key"])))
