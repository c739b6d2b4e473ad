"""What callers see of a real server with a real model: streams, receipts, cancellation, sessions, metrics."""

from __future__ import annotations

import asyncio
import http.client
import json
import queue
import random
import re
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc as triton

from slos_serve.backend.launcher import Server
from slos_serve.client import wire
from slos_serve.client.client import SlosClient
from slos_serve.client.http_stream import HttpClient
from slos_serve.client.stream import Refused, Result, StreamError

PATIENCE = 60.0
Clients = SlosClient | HttpClient


def post(server: Server, body: dict[str, Any], endpoint: str = "generate") -> tuple[int, dict[str, Any]]:
    """One request to Triton's own HTTP endpoint."""
    connection = http.client.HTTPConnection(server.http, timeout=PATIENCE)
    connection.request("POST", f"/v2/models/slos_llm/{endpoint}", json.dumps(body))
    response = connection.getresponse()
    text = response.read()
    connection.close()
    return response.status, json.loads(text)


def metric(server: Server, name: str, **labels: str) -> float:
    """The sum of a metric over the series that have these labels."""
    connection = http.client.HTTPConnection(server.metrics, timeout=PATIENCE)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    found = re.findall(rf"^{name}\{{(.*?)\}} (\S+)$", text, re.MULTILINE)
    return sum(float(value) for series, value in found if all(f'{k}="{v}"' in series for k, v in labels.items()))


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def is_idle(server: Server) -> bool:
    return metric(server, "slos_serve_requests") == 0 and metric(server, "slos_serve_kv_blocks", state="used") == 0


@pytest.fixture(autouse=True)
def _idle_afterwards(server: Server) -> Iterator[None]:
    """Whatever a test does, no request and no KV block stays behind."""
    yield
    until(lambda: is_idle(server))


def with_client(server: Server, kind: str, use: Callable[[Clients], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        client = SlosClient(server.grpc) if kind == "grpc" else HttpClient(server.http)
        async with client:
            return await asyncio.wait_for(use(client), PATIENCE)

    return asyncio.run(run())


BOTH = pytest.mark.parametrize("kind", ["grpc", "http"])


@BOTH
def test_a_stream_comes_in_order_and_ends_with_a_receipt(server: Server, kind: str) -> None:
    """Several responses, a token count without a gap, one receipt with stages, times and deadlines."""

    async def use(client: Clients) -> Result:
        stream = client.generate(
            "def f(x):", max_tokens=300, thinking_tokens=10, ignore_eos=True, slo_ttft_ms=30e3, slo_tpot_ms=30e3
        )
        deltas = [delta async for delta in stream]
        assert len(deltas) > 5
        assert "".join(delta.text for delta in deltas) == stream.result.text
        return stream.result

    result = with_client(server, kind, use)
    receipt = result.receipt
    assert len(result.token_ids) == 300 == receipt["tokens"]
    assert result.finish_reason == "length"
    assert [stage["tokens"] for stage in receipt["stages"]] == [10, 290]
    assert (receipt["admitted"], receipt["attained"]) == (True, True)
    assert receipt["stages"][0]["first_token_due_ms"] == 30e3
    assert 0 <= receipt["queue_ms"] <= receipt["ttft_ms"] < 30e3


@BOTH
def test_greedy_text_does_not_depend_on_the_others(server: Server, kind: str) -> None:
    """64 concurrent streams, some sampled, some cancelled: each greedy one says what it says alone."""
    prompts = [f"def function_{i}(x):\n" + "    x += 1\n" * (i % 12) for i in range(16)]

    async def alone(client: Clients) -> list[tuple[int, ...]]:
        return [(await client.generate(prompt, max_tokens=20).drain()).token_ids for prompt in prompts]

    async def cancelled(client: Clients, i: int) -> None:
        stream = client.generate(prompts[i % 16] * 2, max_tokens=300, ignore_eos=True)
        async for _ in stream:
            break
        await stream.aclose()

    async def together(client: Clients) -> list[tuple[int, ...]]:
        noise = [client.generate(prompt, max_tokens=30, temperature=1.0).drain() for prompt in prompts * 2]
        others = [cancelled(client, i) for i in range(16)]
        tasks = [*(client.generate(prompt, max_tokens=20).drain() for prompt in prompts), *noise, *others]
        results = await asyncio.gather(*tasks)
        return [result.token_ids for result in results[:16] if isinstance(result, Result)]

    assert with_client(server, kind, together) == with_client(server, kind, alone)


def test_both_ways_and_one_response_say_the_same(server: Server) -> None:
    """gRPC stream, HTTP stream and the one response of `generate` agree, with a seed also when sampled."""
    fields = {"max_tokens": 25, "temperature": 0.9, "seed": 11, "stop": ["zz"]}
    texts = {
        kind: with_client(server, kind, lambda client: client.generate("import os\n", **fields).drain()).text
        for kind in ("grpc", "http")
    }
    status, whole = post(server, {"text_input": "import os\n", **fields})
    assert status == 200
    assert texts["grpc"] == texts["http"] == whole["text_output"]


def test_callers_of_other_backends_work_unchanged(server: Server) -> None:
    """The bodies that vLLM's and TensorRT-LLM's documentation shows get the same answer."""
    vllm = {
        "text_input": "x = ",
        "parameters": {"stream": False, "temperature": 0, "max_tokens": 8},
        "exclude_input_in_output": True,
    }
    named = {"text_input": "x = ", "sampling_parameters": '{"max_tokens": "8", "temperature": "0"}', "stream": False}
    core = {"text_input": "x = ", "sampling_param_max_tokens": 8, "streaming": False, "beam_width": 1}
    answers = [post(server, body) for body in (vllm, named, core)]
    assert [status for status, _ in answers] == [200] * 3
    assert len({body["text_output"] for _, body in answers}) == 1


def test_the_prompt_is_echoed_only_on_request(server: Server) -> None:
    """exclude_input_from_output false puts the prompt before the answer."""
    _, plain = post(server, {"text_input": "echo ", "max_tokens": 4})
    _, echoed = post(server, {"text_input": "echo ", "max_tokens": 4, "exclude_input_from_output": False})
    assert echoed["text_output"] == "echo " + plain["text_output"]


@BOTH
def test_leaving_frees_the_request(server: Server, kind: str) -> None:
    """Callers that leave before or after the first token are counted as cancelled and hold no memory."""
    before = metric(server, "slos_serve_requests_total", outcome="cancelled")

    async def use(client: Clients) -> None:
        streams = [client.generate("def f(x):" * 5, max_tokens=400, ignore_eos=True) for _ in range(12)]

        async def leave(stream: Any, deltas: int) -> None:
            count = 0
            async for _ in stream:
                count += 1
                if count > deltas:
                    break
            await stream.aclose()

        await asyncio.gather(*(leave(stream, i % 4) for i, stream in enumerate(streams)))

    with_client(server, kind, use)
    until(lambda: metric(server, "slos_serve_requests_total", outcome="cancelled") == before + 12)


def test_a_broken_connection_before_the_first_token_frees_the_request(server: Server) -> None:
    """64 sockets closed right after each sent a streaming request, seconds of work together: the server cancels all."""
    before = metric(server, "slos_serve_requests_total", outcome="cancelled")
    host, _, port = server.http.partition(":")
    fields = {"text_input": "x" * 300, "max_tokens": 400, "ignore_eos": True, "temperature": 5.0, "stream": True}
    body = json.dumps(fields)
    head = f"POST /v2/models/slos_llm/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with ExitStack() as sockets:
        for _ in range(64):
            raw = sockets.enter_context(socket.create_connection((host, int(port))))
            raw.sendall(head.encode() + body.encode())
        # a request that never arrived would prove nothing
        until(lambda: metric(server, "slos_serve_requests") == 64)
    until(lambda: metric(server, "slos_serve_requests_total", outcome="cancelled") == before + 64)


def test_a_deadline_of_the_call_frees_the_request(server: Server) -> None:
    """A gRPC timeout ends each of 64 streams, which take seconds together, with an error and its request with it."""
    before = metric(server, "slos_serve_requests_total", outcome="cancelled")

    async def expired(client: Clients) -> None:
        with pytest.raises(StreamError, match="DEADLINE_EXCEEDED"):
            await client.generate("def f(x):", max_tokens=450, ignore_eos=True, timeout=1.0).drain()

    async def use(client: Clients) -> None:
        await asyncio.gather(*(expired(client) for _ in range(64)))

    with_client(server, "grpc", use)
    until(lambda: metric(server, "slos_serve_requests_total", outcome="cancelled") == before + 64)


def test_a_request_id_in_flight_is_refused(server: Server) -> None:
    """The second of two is refused, the first goes on, and afterwards the id is free."""

    async def use(client: Clients) -> None:
        first = client.generate("x", request_id="twice", max_tokens=200, ignore_eos=True)
        async for _ in first:
            break
        with pytest.raises(Refused) as refused:
            await client.generate("y", request_id="twice").drain()
        assert refused.value.code == "ALREADY_EXISTS"
        assert "'twice'" in refused.value.message
        assert len((await first.drain()).token_ids) == 200
        await client.generate("y", request_id="twice", max_tokens=2).drain()

    with_client(server, "grpc", use)


def test_too_many_are_told_when_to_retry(server: Server) -> None:
    """Beyond the bound of 100 in flight the answer is OVERLOADED; all others are served to the end."""

    async def one(client: Clients, i: int) -> str:
        try:
            await client.generate(f"n = {i}", max_tokens=40, ignore_eos=True).drain()
        except Refused as refused:
            return refused.code if refused.retry_after_ms else "no time to retry"
        return "served"

    async def use(client: Clients) -> list[str]:
        return list(await asyncio.gather(*(one(client, i) for i in range(180))))

    ends = with_client(server, "grpc", use)
    assert ends.count("served") >= 100
    assert ends.count("OVERLOADED") == 180 - ends.count("served") > 0


def test_the_next_round_of_a_session_finds_its_kv(server: Server) -> None:
    """The tool round after a first answer computes only what is new."""
    prompt = "".join(random.Random(3).choice("abcdefgh ") for _ in range(150))

    async def use(client: Clients) -> tuple[Result, Result]:
        fields = {"max_tokens": 60, "ignore_eos": True, "session_id": "s1"}
        first = await client.generate(prompt, **fields).drain()
        second = await client.generate(prompt + first.text + "\n>>> 42\n", **fields).drain()
        return first, second

    first, second = with_client(server, "grpc", use)
    assert first.receipt["cached_tokens"] == 0
    assert second.receipt["cached_tokens"] >= (first.receipt["prompt_tokens"] + 59) // 16 * 16
    assert second.receipt["prompt_tokens"] < first.receipt["prompt_tokens"] + 60 + 20


def test_metrics_add_up(server: Server) -> None:
    """Requests, attainment, tokens and iterations are counted by class; the probe of a supervisor is not."""
    labels = {"slo_class": "summarization"}
    names = ("slos_serve_requests_total", "slos_serve_slo_total", "slos_serve_generated_tokens_total")
    before = [metric(server, name, **labels) for name in names]
    ttft = metric(server, "slos_serve_ttft_seconds_count", **labels)
    iterations = metric(server, "slos_serve_iterations_total")
    for _ in range(3):
        post(server, {"text_input": "y", "max_tokens": 5, "ignore_eos": True, **labels})
    post(server, {"text_input": "y", "max_tokens": 1, "id": "probe-1", **labels})
    until(lambda: metric(server, "slos_serve_ttft_seconds_count", **labels) == ttft + 3)
    assert [metric(server, name, **labels) for name in names] == [
        before[0] + 3,
        before[1] + 3,
        before[2] + 15,
    ]
    assert metric(server, "slos_serve_iterations_total") >= iterations + 15
    assert metric(server, "slos_serve_kv_blocks", state="total") > 0
    assert abs(metric(server, "slos_serve_engine_heartbeat_seconds") - time.time()) < PATIENCE


def test_the_server_declares_the_tensors_of_the_wire(server: Server) -> None:
    """Names, types and shapes of inputs and outputs are those of `wire`, every input optional."""
    connection = http.client.HTTPConnection(server.http, timeout=PATIENCE)
    connection.request("GET", "/v2/models/slos_llm/config")
    config = json.loads(connection.getresponse().read())
    connection.close()
    for declared, fields in ((config["input"], wire.INPUTS), (config["output"], wire.OUTPUTS)):
        got = {entry["name"]: (entry["data_type"], [int(dim) for dim in entry["dims"]]) for entry in declared}
        want = {f.name: (f"TYPE_{f.dtype}".replace("BYTES", "STRING"), list(f.dims)) for f in fields}
        assert got == want
    assert all(entry["optional"] for entry in config["input"])
    assert config["model_transaction_policy"]["decoupled"]


def test_a_timeout_ends_a_request(server: Server) -> None:
    """KServe's timeout, a field on gRPC and a parameter on HTTP: what was generated by then comes, as cancelled."""
    body = {"text_input": "def f(x):", "max_tokens": 400, "ignore_eos": True, "timeout": 50_000}
    status, answer = post(server, body)
    assert status == 200
    assert answer["finish_reason"] == "cancelled"
    assert answer["token_index"] < 400
    answers: queue.Queue[Any] = queue.Queue()
    client = triton.InferenceServerClient(server.grpc)
    client.start_stream(lambda result, error: answers.put(error or result))
    inputs = []
    for name, value in wire.encode({k: v for k, v in body.items() if k != "timeout"}).items():
        inputs.append(triton.InferInput(name, list(value.shape), wire.INPUT_BY_NAME[name].dtype))
        inputs[-1].set_data_from_numpy(value)
    client.async_stream_infer("slos_llm", inputs, timeout=50_000)
    answer = answers.get(timeout=PATIENCE)
    client.stop_stream()
    assert answer.as_numpy("finish_reason")[0] == b"cancelled"
    status, answer = post(server, {**body, "timeout": -5})
    assert status == 400
    assert "timeout" in answer["error"]


def test_the_readme_script_runs(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """The README's client, pointed at this server, prints text and a receipt."""
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    script = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
    assert script is not None
    exec(script[1].replace("127.0.0.1:8001", server.grpc), {})
    assert "'attained': True" in capsys.readouterr().out
