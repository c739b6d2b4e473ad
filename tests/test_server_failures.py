"""A second real server: beside the first, with its engine process killed under load, and with wrong settings."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from slos_serve.backend.launcher import Server
from slos_serve.backend.processes import session_members
from slos_serve.backend.runtime import StartError
from slos_serve.backend.supervisor import Limits
from slos_serve.client.client import SlosClient
from slos_serve.client.stream import Result, StreamError

PATIENCE = 180.0
QUESTION = "def f(x):"


@pytest.fixture(scope="module")
def second(tiny_repository: Path) -> Iterator[Server]:
    """Another server on this machine, which its supervisor restarts."""
    limits = Limits(probe_interval=1.0, probe_timeout=PATIENCE)
    with Server(tiny_repository, models=["slos_llm"], supervise=True, limits=limits) as running:
        yield running


async def ask(server: Server, prompt: str = QUESTION, max_tokens: int = 20) -> Result:
    async with SlosClient(server.grpc) as client:
        return await client.generate(prompt, max_tokens=max_tokens, ignore_eos=True).drain()


async def ask_until_answered(server: Server) -> Result:
    while True:
        try:
            return await asyncio.wait_for(ask(server), 5.0)
        except (StreamError, asyncio.TimeoutError):
            await asyncio.sleep(0.5)


def test_two_servers_side_by_side_do_not_mix(server: Server, second: Server) -> None:
    """Both answer at the same time, the same words, each on its own ports."""

    async def run() -> list[Result]:
        return await asyncio.gather(*(ask(each, QUESTION, 40) for each in (server, second) for _ in range(10)))

    assert len({result.token_ids for result in asyncio.run(run())}) == 1
    assert len({server.http, server.grpc, server.metrics, second.http, second.grpc, second.metrics}) == 6


def test_a_killed_engine_is_noticed_and_replaced(server: Server, second: Server) -> None:
    """Open streams end with an error instead of hanging, the supervisor restarts, the neighbour is not touched."""
    stubs = [member.pid for member in session_members(second.pid) if member.name == "triton_python_b"]
    assert len(stubs) == 1

    async def victim(client: SlosClient, begun: asyncio.Event) -> str:
        stream = client.generate(QUESTION, max_tokens=450, temperature=5.0, ignore_eos=True)
        try:
            async for _ in stream:
                begun.set()
        except StreamError as error:
            return type(error).__name__
        return "finished"

    async def run() -> tuple[list[str], Result, Result]:
        async with SlosClient(second.grpc) as client:
            begun = asyncio.Event()
            victims = [asyncio.ensure_future(victim(client, begun)) for _ in range(16)]
            await begun.wait()
            os.kill(stubs[0], signal.SIGKILL)
            ends = await asyncio.wait_for(asyncio.gather(*victims), PATIENCE)
        neighbour = await ask(server)
        return ends, neighbour, await asyncio.wait_for(ask_until_answered(second), PATIENCE)

    ends, neighbour, restarted = asyncio.run(run())
    assert set(ends) <= {"Lost", "Refused"}
    assert restarted.token_ids == neighbour.token_ids
    assert second.num_starts == 2


def test_an_engine_whose_server_takes_no_responses_leaves(second: Server) -> None:
    """As where the server's gRPC streams have locked up: no health check sees that, so the engine's process ends and
    the supervisor restarts the server."""
    before = second.num_starts
    frozen = second.pid
    assert frozen is not None

    async def run() -> Result:
        async with SlosClient(second.grpc) as client:
            stream = client.generate(QUESTION, max_tokens=450, temperature=5.0, ignore_eos=True)
            await anext(aiter(stream))
            os.kill(frozen, signal.SIGSTOP)
            with pytest.raises(StreamError):
                await asyncio.wait_for(stream.drain(), PATIENCE)
        return await asyncio.wait_for(ask_until_answered(second), PATIENCE)

    assert asyncio.run(run()).token_ids
    assert second.num_starts == before + 1
    assert "leaving, because the server has not taken a response" in second.log.read_text()


def test_wrong_settings_stop_the_start_with_a_message(tiny_repository: Path, tmp_path: Path) -> None:
    """The log of the failed start names the file, the key and what was got."""
    shutil.copytree(tiny_repository, tmp_path / "repository")
    settings = tmp_path / "repository" / "slos_llm" / "1" / "engine.json"
    settings.write_text(json.dumps({"max_batch_tokens": -3}))
    with (
        pytest.raises(StartError, match=r"engine\.json: max_batch_tokens: must be an integer of at least 1, got -3"),
        Server(tmp_path / "repository", models=["slos_llm"]),
    ):
        pass


def test_an_engine_that_cannot_load_leaves_the_server_alive(tiny_repository: Path, tmp_path: Path) -> None:
    """Without TensorRT-LLM its model stays not ready and the log says why; the models beside it are served."""
    for name in ("slos_llm", "no_tensorrt"):
        shutil.copytree(tiny_repository / "slos_llm", tmp_path / "models" / name)
    settings = tmp_path / "models" / "no_tensorrt" / "1" / "engine.json"
    settings.write_text(json.dumps({"engine": "tensorrt_llm", "dtype": "bfloat16"}))
    options = ["--exit-on-error=false", "--strict-readiness=false"]
    with Server(tmp_path / "models", models=["slos_llm"], supervise=True, extra_args=options) as server:
        with urllib.request.urlopen(f"http://{server.http}/v2/health/live", timeout=5) as live:
            assert live.status == 200
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"http://{server.http}/v2/models/no_tensorrt/ready", timeout=5)
        assert "tensorrt_llm cannot be imported" in server.log.read_text()
        body = json.dumps({"text_input": "a", "max_tokens": 3}).encode()
        answer = urllib.request.urlopen(f"http://{server.http}/v2/models/slos_llm/generate", body, timeout=60)
        assert json.load(answer)["receipt"]
        assert server.num_starts == 1
