"""Starts tritonserver with what our backend needs: `tritonserver` and `slos-serve serve` for people, Server for code.

Promises that whatever the caller gives goes to the server as it is, and that only what was left out is added:
addresses on this machine only, the backend directory, enough HTTP threads. Never loads a model itself.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import IO, Final

from . import runtime
from .overlay import overlay, parse_settings
from .processes import Launch
from .replicas import PORT_STEP, Replicas, write_router_repository
from .runtime import StartError
from .supervisor import Limits, Supervisor, is_ready

_LOG = logging.getLogger("slos_serve.launcher")
_PORTS: Final = {"http": 8000, "grpc": 8001, "metrics": 8002}
_FREE_PORTS: Final = range(20000, 32000)  # below the range from which the kernel takes ports for connections
_EXIT_SECONDS: Final = 30.0
_OUR_LIMITS: Final = ("probe_interval", "probe_timeout", "start_timeout", "max_restarts")


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 on which nothing listens now. Raises StartError when there are not so many."""
    found: list[int] = []
    candidates = random.SystemRandom().sample(_FREE_PORTS, len(_FREE_PORTS))
    for port in candidates:
        if len(found) == count:
            return found
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            found.append(port)
    raise StartError(f"fewer than {count} free ports from {_FREE_PORTS.start} to {_FREE_PORTS.stop}")


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our view of tritonserver's command line, and everything else on it as it came.

    Raises ValueError on an option of ours, or one that we must read, with a value that is none.
    """
    parser = argparse.ArgumentParser(prog="tritonserver", add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--model-repository", "--model-store", action="append", default=[])
    parser.add_argument("--model-control-mode", default="none")
    parser.add_argument("--backend-directory")
    parser.add_argument("--backend-config", action="append", default=[])
    parser.add_argument("--http-thread-count", type=int, default=32)
    parser.add_argument("--exit-timeout-secs", type=float, default=_EXIT_SECONDS)
    for name, port in _PORTS.items():
        parser.add_argument(f"--{name}-port", type=int, default=port)
        parser.add_argument(f"--{name}-address", default="127.0.0.1")
        parser.add_argument(f"--allow-{name}", default="true")
    add_supervisor_arguments(parser)
    try:
        return parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error


def add_supervisor_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that are ours and not tritonserver's."""
    defaults = {field.name: field.default for field in fields(Limits)}
    group = parser.add_argument_group("supervisor")
    group.add_argument("--no-supervisor", action="store_true", help="do not probe and restart the server")
    for name in _OUR_LIMITS:
        kind = type(defaults[name])
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, default=defaults[name], metavar="N")
    group = parser.add_argument_group("settings of this run")
    text = "a setting of engine.json for this run; the file stays as it is (may be given again)"
    group.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help=text)
    group.add_argument(
        "--record", type=Path, metavar="FILE", help="append every scheduler call, for `slos-serve replay`"
    )


def _is_on(text: str) -> bool:
    return text.lower() not in ("false", "0", "no", "off")


def _reachable(address: str, port: int) -> str:
    """Where we reach a server that listens on this address; every address means this machine's own too."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(address, address)
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def _choose_ports(args: argparse.Namespace) -> None:
    """Replaces each port 0 by a free one."""
    wanted = [name for name in _PORTS if getattr(args, f"{name}_port") == 0]
    for name, port in zip(wanted, free_ports(len(wanted)), strict=True):
        setattr(args, f"{name}_port", port)


def _check(args: argparse.Namespace, installation: runtime.Installation, env: dict[str, str]) -> None:
    runtime.check_repository(args.model_repository, may_be_empty=args.model_control_mode != "none")
    runtime.check_libraries(installation, env)
    runtime.check_shared_memory()
    for name in _PORTS:
        if _is_on(getattr(args, f"allow_{name}")):
            runtime.check_port(getattr(args, f"{name}_address"), getattr(args, f"{name}_port"), f"--{name}-port")


def prepare(argv: Sequence[str], folder: Path) -> tuple[Launch, argparse.Namespace]:
    """Checks the machine and builds the server's command line; what it needs besides goes into `folder`.

    Raises StartError saying what to do when the server could not run, ValueError when an argument is wrong.
    """
    args, rest = parse_arguments(argv)
    _choose_ports(args)
    installation = runtime.find_installation()
    env = runtime.environment(installation, folder)
    _check(args, installation, env)
    repositories = _with_settings(args, folder)
    prefix = "" if any("shm-region-prefix-name" in text for text in args.backend_config) else _shm_prefix()
    command = [str(installation.binary), *rest]
    command += [f"--model-repository={path}" for path in repositories]
    command += [f"--model-control-mode={args.model_control_mode}"]
    command += [f"--backend-directory={args.backend_directory or runtime.assemble(installation, folder)}"]
    command += [f"--backend-config={text}" for text in args.backend_config]
    command += [f"--backend-config=python,shm-region-prefix-name={prefix}"] if prefix else []
    command += [f"--http-thread-count={args.http_thread_count}", f"--exit-timeout-secs={args.exit_timeout_secs:.0f}"]
    for name in _PORTS:
        command += [f"--allow-{name}={getattr(args, f'allow_{name}')}"]
        command += [f"--{name}-{part}={getattr(args, f'{name}_{part}')}" for part in ("address", "port")]
    launch = Launch(
        argv=tuple(command),
        env=env,
        http=_reachable(args.http_address, args.http_port) if _is_on(args.allow_http) else "",
        grpc=_reachable(args.grpc_address, args.grpc_port) if _is_on(args.allow_grpc) else "",
        metrics=_reachable(args.metrics_address, args.metrics_port) if _is_on(args.allow_metrics) else "",
        shm_prefix=prefix,
        exit_seconds=args.exit_timeout_secs,
    )
    return launch, args


def _with_settings(args: argparse.Namespace, folder: Path) -> list[str]:
    """The model repositories, with the settings of this run where there are any."""
    settings = parse_settings(args.set)
    if args.record:
        settings["record"] = str(args.record.absolute())
    if not settings:
        return list(args.model_repository)
    return [
        str(overlay(Path(path), folder / f"repository-{index}", settings))
        for index, path in enumerate(args.model_repository)
    ]


def _shm_prefix() -> str:
    """Each server its own: two with the same name would take each other's shared memory."""
    return f"slos_serve_{os.getpid()}_{secrets.token_hex(4)}_"


def _limits(args: argparse.Namespace) -> Limits | None:
    return None if args.no_supervisor else Limits(**{name: getattr(args, name) for name in _OUR_LIMITS})


@contextmanager
def _relayed_signals(supervisor: Supervisor | Replicas) -> Iterator[None]:
    """The first SIGINT or SIGTERM lets requests in flight finish, the second does not."""
    seen: list[int] = []

    def relay(number: int, _frame: FrameType | None) -> None:
        supervisor.stop(at_once=bool(seen))
        seen.append(number)

    before = {number: signal.signal(number, relay) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def tritonserver(argv: Sequence[str] | None = None) -> int:
    """The `tritonserver` command: runs the server under the supervisor and returns its exit code, 2 if it cannot."""
    given = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="slos-serve: %(message)s")
    folder = Path(tempfile.mkdtemp(prefix="slos-serve-"))
    try:
        if {"-h", "--help"} & set(given):
            return _show_help(given, folder)
        launch, args = prepare(given, folder)
        supervisor = Supervisor(launch, _limits(args))
        with _relayed_signals(supervisor):
            code = supervisor.run()
        return code if code >= 0 else 128 - code
    except (StartError, ValueError, OSError) as error:
        print(f"tritonserver: {error}", file=sys.stderr)
        return 2
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _show_help(argv: Sequence[str], folder: Path) -> int:
    """The server's own help, and after it our own options."""
    installation = runtime.find_installation()
    subprocess.call([installation.binary, *argv], env=runtime.environment(installation, folder))
    parser = argparse.ArgumentParser(prog="tritonserver", add_help=False, usage=argparse.SUPPRESS)
    add_supervisor_arguments(parser)
    print(parser.format_help())
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `slos-serve serve`."""
    parser.add_argument("--model-repository", default="model_repository", metavar="DIR", help="default: %(default)s")
    for name, port in _PORTS.items():
        text = f"default {port}; 0 takes a free one"
        parser.add_argument(f"--{name}-port", type=int, default=port, metavar="N", help=text)
    parser.add_argument("--instances", type=int, default=1, metavar="N", help="servers of the model repository")
    text = f"a router in front of them at the ports above; instance k is then at {PORT_STEP} * k above those"
    parser.add_argument("--router", action="store_true", help=text)
    add_supervisor_arguments(parser)
    parser.add_argument("extra", nargs="*", metavar="-- ARG", help="further arguments for tritonserver")


def run(args: argparse.Namespace) -> int:
    """`slos-serve serve`: the friendly form of `tritonserver --model-repository DIR`, for one or several servers."""
    if args.instances < 1:
        raise ValueError(f"--instances: must be at least 1, got {args.instances}")
    if args.instances == 1 and not args.router:
        return tritonserver(_serve_argv(args, args.model_repository, 0) + _changes(args))
    if args.record:
        raise ValueError("--record: several instances would write into one file; record one")
    logging.basicConfig(level=logging.INFO, format="slos-serve: %(message)s")
    folder = Path(tempfile.mkdtemp(prefix="slos-serve-"))
    try:
        launches = prepare_replicas(args, folder)
        replicas = Replicas(
            launches, None if args.no_supervisor else Limits(**{n: getattr(args, n) for n in _OUR_LIMITS})
        )
        with _relayed_signals(replicas):
            code = replicas.run()
        return code if code >= 0 else 128 - code
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def prepare_replicas(args: argparse.Namespace, folder: Path) -> list[Launch]:
    """The instances, and behind them in the list the router, when one is wanted. Raises StartError or ValueError."""
    launches = []
    for index in range(1, args.instances + 1):
        (own := folder / f"instance-{index}").mkdir()
        steps = index if args.router else index - 1
        launches.append(prepare(_serve_argv(args, args.model_repository, PORT_STEP * steps) + _changes(args), own)[0])
        _LOG.info("instance %d: http=%s grpc=%s", index, launches[-1].http, launches[-1].grpc)
    if args.router:
        (own := folder / "router").mkdir()
        settings = {"instances": [launch.grpc for launch in launches]}
        repository = write_router_repository(own / "repository", settings)
        launches.append(prepare(_serve_argv(args, str(repository), 0), own)[0])
        _LOG.info("router: http=%s grpc=%s", launches[-1].http, launches[-1].grpc)
    return launches


def _changes(args: argparse.Namespace) -> list[str]:
    """What is changed in the settings of the instances, but not in a router's."""
    return [f"--set={each}" for each in args.set] + ([f"--record={args.record}"] if args.record else [])


def _serve_argv(args: argparse.Namespace, repository: str, above: int) -> list[str]:
    """tritonserver's arguments for one server, its ports so far above those asked for; 0 stays any free one."""
    argv = [f"--model-repository={repository}"]
    argv += [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in _OUR_LIMITS]
    for name in _PORTS:
        port = getattr(args, f"{name}_port")
        argv += [f"--{name}-port={port and port + above}"]
    argv += ["--no-supervisor"] if args.no_supervisor else []
    return [*argv, *args.extra]


_DIAGNOSES: Final = (
    ("Address already in use", "a port was taken by another program while the server was loading"),
    ("error while loading shared libraries", "a shared library is missing"),
    ("No module named", "a Python package is missing: run `pip install 'slos-serve[server]'` in this environment"),
    ("No space left on device", "/dev/shm or the disk is full"),
    ("unable to find backend", "the model names a backend that is not installed"),
)


def diagnose(log: str) -> str:
    """The likely cause in a failed server's log, with its own line; empty when none is known."""
    for mark, meaning in _DIAGNOSES:
        for line in log.splitlines():
            if mark in line:
                return f"{meaning} ({line.strip()})"
    return ""


class Server:
    """A tritonserver for a test or a demonstration, started on entry and gone without a trace on exit.

    `http`, `grpc` and `metrics` are HOST:PORT. With `supervise` it is, from entry on, restarted when it stops
    answering, as the command does it; `limits` sets how patiently. Without a `log` file the log is kept until the end
    only.
    """

    def __init__(
        self,
        model_repository: Path,
        *,
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
        models: Sequence[str] = (),
        log: Path | None = None,
        supervise: bool = False,
        limits: Limits | None = None,
        extra_args: Sequence[str] = (),
        ready_timeout: float = 180.0,
    ) -> None:
        self._repository = model_repository
        self._ports = {"http": http_port, "grpc": grpc_port, "metrics": metrics_port}
        self._models = tuple(models)
        self._log_given = log
        self._limits = (limits or Limits()) if supervise else None
        self._extra = tuple(extra_args)
        self._ready_timeout = ready_timeout
        self._folder: Path | None = None
        self._supervisor: Supervisor | None = None
        self._thread: threading.Thread | None = None
        self._output: IO[bytes] | None = None
        self.http = self.grpc = self.metrics = ""
        self.log = log or Path()
        self.exit_code: int | None = None

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The process id of the present tritonserver, which a restart changes. Raises StartError before the start."""
        pid = self._supervisor.pid if self._supervisor else None
        if pid is None:
            raise StartError("the server is not started")
        return pid

    @property
    def num_starts(self) -> int:
        """How often tritonserver was started: 1, and one more for each restart."""
        return self._supervisor.num_starts if self._supervisor else 0

    def start(self) -> Server:
        """Starts it and waits until it and `models` are ready. Raises StartError with the end of its log if not.

        Free ports may be taken by another program before the server listens: then others are tried.
        """
        for attempt in range(3):
            try:
                self._start_once()
                return self
            except StartError as error:
                self.stop()
                if attempt == 2 or 0 not in self._ports.values() or _DIAGNOSES[0][1] not in str(error):
                    raise
            except BaseException:
                self.stop()
                raise
        raise AssertionError("unreachable")

    def _start_once(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="slos-serve-"))
        self.log = self._log_given or self._folder / "server.log"
        argv = [f"--model-repository={self._repository}", "--exit-timeout-secs=10"]
        argv += [f"--{name}-port={port}" for name, port in self._ports.items()]
        launch, _ = prepare([*argv, *self._extra], self._folder)
        self.http, self.grpc, self.metrics = launch.http, launch.grpc, launch.metrics
        self._output = self.log.open("ab")
        self._supervisor = Supervisor(launch, self._limits, self._output)
        self._thread = threading.Thread(target=self._run, args=(self._supervisor,), name="supervisor", daemon=True)
        self.exit_code = None
        self._thread.start()
        self._await_ready(self._thread, self._supervisor)

    def _run(self, supervisor: Supervisor) -> None:
        self.exit_code = supervisor.run()

    def _await_ready(self, thread: threading.Thread, supervisor: Supervisor) -> None:
        until = time.monotonic() + self._ready_timeout
        while thread.is_alive():
            if is_ready(self.http, self._models) and (supervisor.was_ready or not self._limits):
                return
            if time.monotonic() > until:
                raise StartError(self._story(f"not ready after {self._ready_timeout:.0f} s"))
            time.sleep(0.1)
        raise StartError(self._story(f"tritonserver exited with {self.exit_code} before it was ready"))

    def _story(self, what: str) -> str:
        cause = diagnose(self.log.read_text(errors="replace"))
        return f"{what}{': ' + cause if cause else ''}; the end of its log:\n{self.tail()}"

    def tail(self, lines: int = 40) -> str:
        """The last lines of the server's log."""
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return ""

    def stop(self) -> None:
        """Ends the server: requests in flight may finish for ten seconds, then it is killed. Idempotent."""
        if self._supervisor and self._thread:
            self._supervisor.stop()
            self._thread.join()
        if self._output:
            self._output.close()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = None


if __name__ == "__main__":
    sys.exit(tritonserver())
