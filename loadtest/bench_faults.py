"""`slos-serve bench-faults`: the longest gap that callers see when a server, or the way to it, fails under them.

Two instances behind two routers, each supervised; what goes to an instance passes a `Cable` that can be cut. For each
way to fail streams run in closed loops, half of them placed and half forwarded, until in the middle of them one
instance, one router or one cable goes. Counted are the streams that were running then: how long the longest pause
between two tokens was, beyond the pace they were promised. Exits with 1 when one was lost.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from slos_serve.client.routed import RoutedClient
from slos_serve.client.stream import Result, StreamError

from .demo import ServerFailed, concluded, server
from .demo_router import server_of, usable

ENGINE_PROCESS: Final = "triton_python_b"  # as the kernel names Triton's Python stub
PATIENCE_SECONDS: Final = 120.0
SUPERVISED: Final = ("--probe-interval=1", "--max-restarts=1000")  # nobody gives up
BEFORE_SECONDS: Final = 2.0  # that streams run before the fault
TPOT_SECONDS: Final = 0.1
PROMPTS: Final = tuple(f"def f{number}(values, limit):" for number in range(32))
PROMISE: Final[Mapping[str, Any]] = {"ignore_eos": True, "slo_ttft_ms": 2e3, "slo_tpot_ms": 1000 * TPOT_SECONDS}


class Cable:
    """Carries bytes between a port of its own and `target`, until it is cut; it can be mended."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._port = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._port.getsockname()[1]}"
        self._ends: list[socket.socket] = []
        self._carries = threading.Event()
        self._carries.set()
        threading.Thread(target=self._accept, args=(self._port,), daemon=True).start()

    def refuse(self) -> None:
        """Every connection breaks, and there are no new ones."""
        self._port.shutdown(socket.SHUT_RDWR)
        self._port.close()
        for end in self._ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def silence(self) -> None:
        """Every connection stays, and nothing passes."""
        self._carries.clear()

    def mend(self) -> None:
        """As before; what was held back passes now."""
        self._carries.set()
        if self._port.fileno() < 0:
            self._port = socket.create_server(("127.0.0.1", int(self.address.rpartition(":")[2])))
            threading.Thread(target=self._accept, args=(self._port,), daemon=True).start()

    def _accept(self, port: socket.socket) -> None:
        with suppress(OSError):
            while True:
                near = port.accept()[0]
                try:
                    far = socket.create_connection(self._target)
                except OSError:  # nobody is there now
                    near.close()
                    continue
                self._ends += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=pair, daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                self._carries.wait()
                sink.sendall(data)
        for end in (source, sink):  # also where one side broke: the other must hear of it
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@dataclass(frozen=True, slots=True)
class Service:
    """HOST:PORT of each server; routers and callers reach instance i through cable i."""

    instances: Sequence[str]
    routers: Sequence[str]
    cables: Sequence[Cable]

    async def whole(self) -> None:
        """Returns once every router uses every instance. Raises ServerFailed when that does not come."""
        wanted = {cable.address for cable in self.cables}
        until = time.monotonic() + PATIENCE_SECONDS
        while True:
            with suppress(StreamError):
                if [await usable(router) for router in self.routers] == [wanted] * len(self.routers):
                    return
            if time.monotonic() > until:
                raise ServerFailed(f"not all of {', '.join(wanted)} are used by the routers")
            await asyncio.sleep(0.1)


@asynccontextmanager
async def service(repository: Path, router_repository: Path, folder: Path, servers: int = 2) -> AsyncIterator[Service]:
    """So many instances of a model repository and so many routers, from their start to their end."""
    async with AsyncExitStack() as stack:

        async def started(path: Path) -> str:
            return (await stack.enter_async_context(server(path, *SUPERVISED))).grpc

        instances = [await started(repository) for _ in range(servers)]
        cables = [Cable(instance) for instance in instances]
        shutil.copytree(router_repository, folder / "router")
        settings = {"instances": [cable.address for cable in cables]}
        (folder / "router" / "slos_router" / "1" / "router.json").write_text(json.dumps(settings), encoding="utf-8")
        routers = [await started(folder / "router") for _ in range(servers)]
        yield Service(instances, routers, cables)


def send_signal(address: str, number: signal.Signals, name: str = "") -> None:
    """To every process of the server at this address, or to those of one name."""
    group = server_of(address)
    for entry in Path("/proc").iterdir():
        with suppress(OSError):  # it has ended meanwhile
            if entry.name.isdigit() and os.getpgid(int(entry.name)) == group and name in (entry / "comm").read_text():
                os.kill(int(entry.name), number)


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong, and what puts it right where nobody else does."""

    strike: Callable[[Service], None]
    mend: Callable[[Service], None] = lambda _: None


FAULTS: Final[Mapping[str, Fault]] = {
    "instance killed": Fault(lambda s: send_signal(s.instances[0], signal.SIGKILL)),
    "engine process killed": Fault(lambda s: send_signal(s.instances[0], signal.SIGKILL, ENGINE_PROCESS)),
    "instance frozen": Fault(
        lambda s: send_signal(s.instances[0], signal.SIGSTOP), lambda s: send_signal(s.instances[0], signal.SIGCONT)
    ),
    "connections refused": Fault(lambda s: s.cables[0].refuse(), lambda s: s.cables[0].mend()),
    "connections silent": Fault(lambda s: s.cables[0].silence(), lambda s: s.cables[0].mend()),
    "router killed": Fault(lambda s: send_signal(s.routers[0], signal.SIGKILL)),
}


@dataclass(frozen=True, slots=True)
class Met:
    """A stream that was running when the fault came. `gap`: seconds of its longest pause, less its TPOT."""

    is_placed: bool
    gap: float = 0.0
    is_moved: bool = False
    error: str = ""


async def struck(served: Service, fault: Fault, streams: int, length: int) -> list[Met]:
    """Every stream that runs when the fault comes, once it has ended."""
    await served.whole()
    async with _callers(served) as callers:
        loops = _Loops(callers, length)
        tasks = [asyncio.create_task(loops.run(number)) for number in range(streams)]
        await asyncio.sleep(BEFORE_SECONDS)
        loops.struck_at = time.monotonic()
        await asyncio.to_thread(fault.strike, served)
        try:
            ended, hanging = await asyncio.wait(tasks, timeout=PATIENCE_SECONDS)
            for task in hanging:
                task.cancel()
            for task in ended:
                task.result()
        finally:
            with suppress(ServerFailed):  # its supervisor has given it up
                fault.mend(served)
    return loops.met + [Met(False, error=f"no end within {PATIENCE_SECONDS:.0f} s") for _ in hanging]


@asynccontextmanager
async def _callers(served: Service) -> AsyncIterator[Sequence[RoutedClient]]:
    async with (
        RoutedClient(served.routers) as placed,
        RoutedClient(served.routers, placement=False) as forwarded,
    ):
        yield placed, forwarded


class _Loops:
    """Streams one after the other, until one has met the fault."""

    def __init__(self, callers: Sequence[RoutedClient], length: int) -> None:
        self._callers = callers
        self._length = length
        self.struck_at = float("inf")
        self.met: list[Met] = []

    async def run(self, number: int) -> None:
        placed = number % 2 == 0
        caller = self._callers[number % 2]
        turn = number
        while True:
            began = time.monotonic()
            stream = caller.generate(PROMPTS[turn % len(PROMPTS)], max_tokens=self._length, **PROMISE)
            turn += 1
            try:
                found = await stream.drain()
                met = self._met(found, placed)
            except StreamError as error:
                met = Met(placed, error=f"{type(error).__name__}: {error}")
            now = time.monotonic()
            if met.error or began < self.struck_at < now:
                self.met.append(met)
            if now > self.struck_at:
                return

    def _met(self, found: Result, placed: bool) -> Met:
        if len(found.token_ids) != self._length:
            return Met(placed, error=f"{len(found.token_ids)} tokens of {self._length}")
        longest = float(np.max(np.diff(found.token_times), initial=0.0))
        return Met(placed, longest - TPOT_SECONDS, bool(found.receipt.get("losses")))


def table(found: Mapping[str, Sequence[Met]]) -> str:
    """A row for each fault."""
    lines = [f"{'fault':<24}{'streams':>9}{'lost':>6}{'moved':>7}{'gap p50':>10}{'p99':>8}{'longest':>9}"]
    for name, streams in found.items():
        gaps = [each.gap for each in streams if not each.error] or [float("nan")]
        lines.append(
            f"{name:<24}{len(streams):>9}{sum(1 for each in streams if each.error):>6}"
            f"{sum(each.is_moved for each in streams):>7}{np.percentile(gaps, 50):>10.2f}"
            f"{np.percentile(gaps, 99):>8.2f}{max(gaps):>9.2f}"
        )
    return "\n".join([*lines, "gap: seconds of a stream's longest pause beyond its TPOT; moved: to another server"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`slos-serve bench-faults`."""
    parser.add_argument("--streams", type=int, default=12, help="at a time (default: %(default)s)")
    parser.add_argument("--length", type=int, default=300, help="tokens of each (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=4, help="of each fault (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="TEXT", help="faults with this in their name")
    parser.add_argument("--json", type=Path, metavar="FILE")
    for name in ("model", "router"):
        parser.add_argument(f"--{name}-repository", type=Path, default=Path(f"{name}_repository"), metavar="DIR")


def run(args: argparse.Namespace) -> int:
    """The command; Ctrl-C stops the servers too."""
    return concluded(_run(args))


async def _run(args: argparse.Namespace) -> int:
    chosen = [name for name in FAULTS if args.only in name]
    if not chosen:
        raise ValueError(f"--only: must be part of one of {', '.join(FAULTS)}, got {args.only!r}")
    found: dict[str, list[Met]] = {name: [] for name in chosen}
    with tempfile.TemporaryDirectory(prefix="slos-bench-") as folder:
        async with service(args.model_repository, args.router_repository, Path(folder)) as s:
            await _play(s, args, found)
    print(f"\n{table(found)}")
    if args.json:
        data = {name: [[m.is_placed, m.gap, m.is_moved, m.error] for m in streams] for name, streams in found.items()}
        args.json.write_text(json.dumps(data) + "\n", encoding="utf-8")
    return int(any(each.error for streams in found.values() for each in streams))


async def _play(served: Service, args: argparse.Namespace, found: Mapping[str, list[Met]]) -> None:
    for number in range(args.rounds):
        for name, of_fault in found.items():
            met = await struck(served, FAULTS[name], args.streams, args.length)
            of_fault += met
            print(f"round {number + 1}, {name}: {len(met)} streams met it", flush=True)
            for each in met:
                if each.error:
                    print(f"LOST: {each.error}", flush=True)
    await served.whole()
