"""The launcher and its supervisor, with the real server and small models written here."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slos_serve.backend import cli, runtime
from slos_serve.backend.launcher import Server, diagnose, free_ports, parse_arguments
from slos_serve.backend.processes import session_members
from slos_serve.backend.runtime import StartError
from slos_serve.backend.supervisor import Judge, Limits, Probe, Restarts, ask

ECHO_CONFIG = """
backend: "python"
input [{ name: "x" data_type: TYPE_INT32 dims: [1] }]
output [{ name: "y" data_type: TYPE_INT32 dims: [1] }]
"""
ECHO = """
import triton_python_backend_utils as pb


class TritonPythonModel:
    def execute(self, requests):
        values = [pb.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        return [pb.InferenceResponse([pb.Tensor("y", value)]) for value in values]
"""

# Stands in for our backend under its name: while a file `stuck` lies in the folder it answers nobody, and while
# `busy` does it answers nobody either, but counts iterations.
STUCK_CONFIG = """
backend: "slos_serve"
input [{ name: "text_input" data_type: TYPE_STRING dims: [1] },
       { name: "max_tokens" data_type: TYPE_INT32 dims: [1] optional: true },
       { name: "slo_class" data_type: TYPE_STRING dims: [1] optional: true }]
output [{ name: "text_output" data_type: TYPE_STRING dims: [1] }]
"""
STUCK = """
import time
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb

FOLDER = Path({folder!r})


class TritonPythonModel:
    def initialize(self, args):
        family = pb.MetricFamily(name="slos_serve_iterations_total", description="steps", kind=pb.MetricFamily.COUNTER)
        self.family, self.steps = family, family.Metric(labels={{}})

    def execute(self, requests):
        while (FOLDER / "stuck").exists() or (FOLDER / "busy").exists():
            if (FOLDER / "busy").exists():
                self.steps.increment(1)
            time.sleep(0.02)
        return [pb.InferenceResponse([pb.Tensor("text_output", np.array([b"y"], dtype=object))]) for _ in requests]
"""


def write_model(repository: Path, name: str, config: str, code: str = "") -> None:
    """One model with one version."""
    version = repository / name / "1"
    version.mkdir(parents=True)
    (repository / name / "config.pbtxt").write_text(config)
    (version / "model.py").write_text(code)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A model repository whose one model returns its input."""
    write_model(tmp_path / "models", "echo", ECHO_CONFIG, ECHO)
    return tmp_path / "models"


@pytest.fixture
def stuck_arguments(tmp_path: Path) -> Iterator[list[str]]:
    """Arguments for a server whose backend can be made to hang, and the repository `stuck` for it."""
    write_model(tmp_path / "stuck_models", "llm", STUCK_CONFIG)
    backends = runtime.assemble(runtime.find_installation(), tmp_path)
    (backends / "slos_serve" / "model.py").write_text(STUCK.format(folder=str(tmp_path)))
    yield [f"--backend-directory={backends}"]
    for flag in ("stuck", "busy"):
        (tmp_path / flag).unlink(missing_ok=True)


def echo(address: str, value: int) -> int:
    """What the echo model says."""
    body = {"inputs": [{"name": "x", "shape": [1], "datatype": "INT32", "data": [value]}]}
    _, answer = ask(address, "POST", "/v2/models/echo/infer", body, timeout=10.0)
    return int(json.loads(answer)["outputs"][0]["data"][0])


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Fails loudly instead of hanging."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.05)


def answers(address: str) -> bool:
    """Whether the echo model answers now."""
    try:
        return echo(address, 5) == 5
    except (OSError, KeyError, ValueError):
        return False


def shared_memory(launcher_pid: int) -> frozenset[Path]:
    """Files of all servers that a process has launched."""
    return frozenset(Path("/dev/shm").glob(f"slos_serve_{launcher_pid}_*"))


def traces(server_pid: int, launcher_pid: int, others: frozenset[Path] = frozenset()) -> list[object]:
    """Living processes of a server's session and shared-memory files of its launcher, but for `others`."""
    members = [member for member in session_members(server_pid) if not member.is_dead]
    return [*members, *(shared_memory(launcher_pid) - others)]


def test_two_servers_run_side_by_side_and_leave_nothing(repository: Path) -> None:
    """Two servers on one machine answer each for itself; after them no process and no shared memory is left."""
    others = shared_memory(os.getpid())
    with Server(repository, models=["echo"]) as one, Server(repository, models=["echo"]) as two:
        assert (echo(one.http, 1), echo(two.http, 2)) == (1, 2)
        assert len({one.http, two.http, one.grpc, two.grpc, one.metrics, two.metrics}) == 6
        assert ask(one.metrics, "GET", "/metrics", timeout=5.0)[0] == 200
        pids = one.pid, two.pid
    assert [traces(pid, os.getpid(), others) for pid in pids] == [[], []]
    assert (one.exit_code, two.exit_code) == (0, 0)


def test_a_server_listens_on_this_machine_only(repository: Path) -> None:
    """Unless told otherwise every socket of the server is bound to 127.0.0.1."""
    with Server(repository, models=["echo"]) as server:
        ports = {int(address.rpartition(":")[2]) for address in (server.http, server.grpc, server.metrics)}
        rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
        listening = [row[1].split(":") for row in rows if len(row) > 3 and row[3] == "0A"]
        hosts = [host for host, port in listening if int(port, 16) in ports]
        assert len(hosts) == 3
        assert all(host.endswith("0100007F") for host in hosts)  # as IPv4, or mapped into IPv6


def test_a_killed_stub_is_noticed_and_the_server_serves_again(repository: Path) -> None:
    """Triton reports health while its stub is dead; the supervisor restarts it on the same ports."""
    others = shared_memory(os.getpid())
    with Server(repository, models=["echo"], supervise=True, limits=Limits(first_delay=0.1)) as server:
        first = server.pid
        os.kill(next(member.pid for member in session_members(first) if "python" in member.name), signal.SIGKILL)
        wait_until(lambda: server.num_starts == 2 and answers(server.http))
        assert traces(first, -1) == []
        second = server.pid
    assert traces(second, os.getpid(), others) == []


def test_a_hung_engine_is_restarted(tmp_path: Path, stuck_arguments: list[str]) -> None:
    """An engine that answers no probe and makes no step is restarted, though its processes live."""
    limits = Limits(probe_interval=0.2, probe_timeout=1.0, first_delay=0.1)
    repository = tmp_path / "stuck_models"
    with Server(repository, models=["llm"], supervise=True, limits=limits, extra_args=stuck_arguments) as server:
        (tmp_path / "stuck").touch()
        wait_until(lambda: server.num_starts == 2)
        (tmp_path / "stuck").unlink()
        wait_until(lambda: b"text_output" in generate(server.http))


def test_a_frozen_stub_is_restarted(tmp_path: Path, stuck_arguments: list[str]) -> None:
    """A stub that is stopped is no zombie, and Triton answers for it with the status of a bad request."""
    limits = Limits(probe_interval=0.2, probe_timeout=5.0, first_delay=0.1)
    repository = tmp_path / "stuck_models"
    with Server(repository, models=["llm"], supervise=True, limits=limits, extra_args=stuck_arguments) as server:
        first = server.pid
        os.kill(next(member.pid for member in session_members(first) if "python" in member.name), signal.SIGSTOP)
        wait_until(lambda: server.num_starts == 2)
        wait_until(lambda: b"text_output" in generate(server.http))
        assert traces(first, -1) == []


def generate(address: str) -> bytes:
    """One request to the model that can hang."""
    try:
        return ask(address, "POST", "/v2/models/llm/generate", {"text_input": "x"}, timeout=5.0)[1]
    except OSError:
        return b""


def test_a_busy_engine_is_left_alone(
    tmp_path: Path, stuck_arguments: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """An engine too busy to answer probes, but that goes on making steps, is not restarted."""
    limits = Limits(probe_interval=0.2, probe_timeout=1.0, failed_probes=1)
    repository = tmp_path / "stuck_models"
    with (
        caplog.at_level(logging.WARNING),
        Server(repository, models=["llm"], supervise=True, limits=limits, extra_args=stuck_arguments) as server,
    ):
        wait_until(lambda: b"text_output" in generate(server.http))
        (tmp_path / "busy").touch()
        wait_until(lambda: caplog.text.count("probe failed") >= 3)
        (tmp_path / "busy").unlink()
        wait_until(lambda: b"text_output" in generate(server.http))
        assert server.num_starts == 1


def test_a_liveness_probe_finds_what_health_hides(tmp_path: Path, stuck_arguments: list[str]) -> None:
    """`slos-serve probe` ends with 0 where an engine answers or is busy, with 1 where it hangs or is not there."""

    def probe(server: Server) -> int:
        return cli.main(["probe", "--http", server.http, "--metrics", server.metrics, "--timeout", "1"])

    with Server(tmp_path / "stuck_models", models=["llm"], extra_args=stuck_arguments) as server:
        assert probe(server) == 0
        (tmp_path / "busy").touch()
        assert probe(server) == 0
        (tmp_path / "busy").unlink()
        wait_until(lambda: b"text_output" in generate(server.http))
        (tmp_path / "stuck").touch()
        assert ask(server.http, "GET", "/v2/health/live", timeout=5.0)[0] == 200
        assert probe(server) == 1
        (tmp_path / "stuck").unlink()
        wait_until(lambda: probe(server) == 0)
    assert probe(server) == 1


def test_the_literal_command_runs_and_stops_without_a_trace(repository: Path) -> None:
    """`tritonserver --model-repository DIR` works as documented by NVIDIA; SIGTERM ends everything with code 0."""
    ports = dict(zip(("http", "grpc", "metrics"), free_ports(3), strict=True))
    command = [str(Path(sys.executable).with_name("tritonserver")), "--model-repository", str(repository)]
    command += [part for name, port in ports.items() for part in (f"--{name}-port", str(port))]
    launcher = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: answers(f"127.0.0.1:{ports['http']}"))
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        launcher.send_signal(signal.SIGTERM)
        _, log = launcher.communicate(timeout=60)
    finally:
        launcher.kill()
        launcher.wait()
    assert launcher.returncode == 0, log
    assert [traces(int(pid), launcher.pid) for pid in children] == [[]]


def test_a_model_that_cannot_load_is_told_with_its_cause(repository: Path) -> None:
    """A server that dies while loading raises the end of its log, and is not restarted for ever."""
    (repository / "echo/1/model.py").write_text("import a_package_that_nobody_has\n")
    with pytest.raises(StartError, match=r"Python package is missing.*a_package_that_nobody_has"):
        Server(repository, supervise=True, limits=Limits(first_delay=0.1)).start()


def test_a_busy_port_is_named(repository: Path) -> None:
    """The message names the port and the option that chooses another."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartError, match=rf"port {port} on 127\.0\.0\.1 .*--grpc-port"):
            Server(repository, grpc_port=port).start()


@pytest.mark.parametrize("port", [-1, 65536])
def test_an_impossible_port_is_refused(repository: Path, port: int) -> None:
    """A port outside the range is told as such."""
    with pytest.raises(StartError, match=f"--http-port: .*got {port}"):
        Server(repository, http_port=port).start()


def test_a_missing_or_empty_repository_is_named(tmp_path: Path) -> None:
    """The message names the folder; an empty one may do where models are loaded later."""
    with pytest.raises(StartError, match=r"nowhere.*not a folder"):
        runtime.check_repository([str(tmp_path / "nowhere")], may_be_empty=True)
    with pytest.raises(StartError, match="holds no model"):
        runtime.check_repository([str(tmp_path)], may_be_empty=False)
    with pytest.raises(StartError, match="--model-repository"):
        runtime.check_repository([], may_be_empty=False)
    runtime.check_repository([str(tmp_path), "s3://bucket/models"], may_be_empty=True)


def test_missing_libraries_are_named_with_their_packages() -> None:
    """Each missing library comes with the step that brings it."""
    ldd = """
        libpython3.11.so.1.0 => not found
        libz.so.1 => not found
        libodd.so.4 => not found
        libc.so.6 => /lib/libc.so.6 (0x1)
        stub: /lib/libc.so.6: version `GLIBC_2.35' not found (required by stub)
    """
    said = list(runtime.missing_libraries(ldd))
    assert [bool(re.search(want, text)) for want, text in zip(("install libpython3.11", "zlib1g"), said, strict=False)]
    assert "libodd.so.4" in said[2]
    assert "GLIBC_2.35" in said[3]
    assert len(said) == 4


def test_this_machine_can_run_the_server(tmp_path: Path) -> None:
    """The checks find nothing wrong where the tests run."""
    installation = runtime.find_installation()
    runtime.check_libraries(installation, runtime.environment(installation, tmp_path))
    runtime.check_shared_memory()


@pytest.mark.parametrize("version", [(3, 9), (3, 13)])
def test_an_unsupported_python_is_told_what_to_use(version: tuple[int, int]) -> None:
    """The message lists the versions that work."""
    with pytest.raises(StartError, match=r"3\.10, 3\.11, 3\.12"):
        runtime.check_python(version)


def test_unusable_shared_memory_is_told(tmp_path: Path) -> None:
    """A machine without /dev/shm cannot run a stub."""
    with pytest.raises(StartError, match="shared memory"):
        runtime.check_shared_memory(tmp_path / "shm")


def test_a_container_brings_its_own_server_and_backends(tmp_path: Path) -> None:
    """Where the container has a server it is used, and its other backends stay available beside ours."""
    for path in ("bin/tritonserver", f"backends/python/{runtime.STUB}", "backends/onnxruntime/lib.so"):
        (tmp_path / "opt" / path).parent.mkdir(parents=True)
        (tmp_path / "opt" / path).touch()
    installation = runtime.find_installation(tmp_path / "opt")
    backends = runtime.assemble(installation, tmp_path / "work")
    assert installation.binary == tmp_path / "opt/bin/tritonserver"
    assert sorted(path.name for path in backends.iterdir()) == ["onnxruntime", "python", "slos_serve"]
    assert "TritonPythonModel" in (backends / "slos_serve/model.py").read_text()


def test_arguments_that_are_not_ours_pass_through() -> None:
    """Unknown options keep their order and their values, in both spellings."""
    args, rest = parse_arguments(["--log-verbose", "1", "--http-port=9", "--trace-config=a=b", "--max-restarts", "2"])
    assert rest == ["--log-verbose", "1", "--trace-config=a=b"]
    assert (args.http_port, args.grpc_port, args.max_restarts) == (9, 8001, 2)
    with pytest.raises(ValueError, match="--http-port"):
        parse_arguments(["--http-port=eight"])


def test_a_log_is_diagnosed() -> None:
    """A known cause is told with its line; an unknown one is left to the reader."""
    assert "port was taken" in diagnose("I: fine\nE: failed to bind: Address already in use\n")
    assert diagnose("E: something else") == ""


def test_the_judge_counts_only_silence_without_a_step() -> None:
    """Failures count while no iteration happens; an answer, a step or a refusal starts the count anew."""
    judge = Judge(failed_probes=2)
    assert judge.cause(Probe("failed", "timed out", 1.0, 7.0)) is None  # it made steps meanwhile
    assert judge.cause(Probe("failed", "overloaded", 8.0, 8.0)) is None  # one since the last look
    assert judge.cause(Probe("failed", "timed out", 8.0, 8.0)) is None
    assert "timed out" in (judge.cause(Probe("failed", "timed out", 8.0, 8.0)) or "")
    for calm in (Probe("answered", "", 8.0, 8.0), Probe("refused", "bad request", 8.0, 8.0)):
        judge = Judge(failed_probes=2)
        silent = Probe("failed", "timed out", 8.0, 8.0)
        assert [judge.cause(probe) for probe in (silent, calm, silent)] == [None, None, None]
    blind = Judge(failed_probes=2)
    assert [blind.cause(Probe("failed", "no route", None, None)) is None for _ in range(2)] == [True, False]


def test_restarts_are_delayed_ever_longer_and_bounded() -> None:
    """The delay doubles to its bound; too many failures in the window end it, and old ones are forgotten."""
    limits = Limits(max_restarts=4, restart_window=100.0, first_delay=1.0, longest_delay=4.0)
    restarts = Restarts(limits)
    assert [restarts.delay(float(now)) for now in range(5)] == [1.0, 2.0, 4.0, 4.0, None]
    assert restarts.delay(102.5) == 2.0


@pytest.mark.parametrize("values", [{"probe_interval": 0.0}, {"probe_timeout": float("nan")}, {"max_restarts": -1}])
def test_impossible_limits_are_refused(values: dict[str, float]) -> None:
    """The message names the limit."""
    with pytest.raises(ValueError, match=next(iter(values))):
        Limits(**values)  # type: ignore[arg-type]
