"""One tritonserver process with everything it started, from its start to the last trace of it.

Promises that after `end` no process and no shared-memory file of it is left. Never judges whether it is well.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from .runtime import SHARED_MEMORY

_STUB: Final = "triton_python_b"  # /proc keeps 15 characters of a name


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start one server: command line, environment, and what to know about it once it runs.

    `http`, `grpc` and `metrics` are HOST:PORT for us to ask, or empty where the server does not offer them.
    `shm_prefix` starts the names of its shared-memory files; empty where they are not ours to remove.
    `exit_seconds` is how long requests in flight may go on after SIGTERM.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str]
    http: str
    grpc: str
    metrics: str
    shm_prefix: str
    exit_seconds: float


@dataclass(frozen=True, slots=True)
class Process:
    """One line of the process table."""

    pid: int
    name: str
    state: str
    session: int

    @property
    def is_dead(self) -> bool:
        """Ended, perhaps not yet reaped by its parent."""
        return self.state in "ZX"


def read_process(pid: int) -> Process | None:
    """The process as the kernel tells it, or None when there is none. State `Z` is dead and not reaped."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (OSError, UnicodeDecodeError):
        return None
    name, _, rest = text.partition("(")[2].rpartition(")")  # the name may hold brackets itself
    fields = rest.split()
    return Process(pid, name, fields[0], int(fields[3]))


def session_members(session: int) -> list[Process]:
    """Every process of a session, by process id; the server's stubs stay in it even when the server is gone."""
    pids = sorted(int(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit())
    return [process for pid in pids if (process := read_process(pid)) and process.session == session]


class ServerProcess:
    """A started tritonserver, leader of a session of its own."""

    def __init__(self, launch: Launch, output: IO[Any] | None = None) -> None:
        """Starts it; standard output and error go to `output`, or where ours go. Raises OSError if that fails."""
        self.launch = launch
        self._popen = subprocess.Popen(
            launch.argv,
            env=dict(launch.env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            start_new_session=True,
        )
        self._stubs: tuple[int, ...] = ()

    @property
    def pid(self) -> int:
        """The process id, and the id of its session."""
        return self._popen.pid

    def exit_code(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self._popen.poll()

    def find_stubs(self) -> tuple[int, ...]:
        """The process ids of the stubs there are now; `lost_stub` watches these from then on."""
        self._stubs = tuple(member.pid for member in session_members(self.pid) if member.name == _STUB)
        return self._stubs

    def lost_stub(self) -> int | None:
        """A stub that died. The server does not reap one that crashed, but does reap one that it ended itself."""
        for pid in self._stubs:
            process = read_process(pid)
            if process and process.session == self.pid and process.is_dead:
                return pid
        return None

    def ask_to_exit(self) -> None:
        """SIGTERM to the server alone: it lets requests in flight finish and ends its stubs."""
        if self.exit_code() is None:
            self._popen.terminate()

    def end(self, seconds: float = 0.0) -> int:
        """Waits so long for it to exit, then kills the whole session and removes its shared memory."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(seconds)
        self._kill_session()
        code = self._popen.wait()
        self._remove_shared_memory()
        return code

    def _kill_session(self) -> None:
        """A stub ignores SIGTERM, and one may be starting while we look: kill until none is left."""
        until = time.monotonic() + 10.0
        while living := [member for member in session_members(self.pid) if not member.is_dead]:
            for member in living:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(member.pid, signal.SIGKILL)
            if time.monotonic() > until:  # only uninterruptible sleep survives SIGKILL so long
                break
            time.sleep(0.02)

    def _remove_shared_memory(self) -> None:
        if self.launch.shm_prefix:
            for path in SHARED_MEMORY.glob(f"{self.launch.shm_prefix}*"):
                path.unlink(missing_ok=True)
