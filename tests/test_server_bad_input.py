"""Whatever a real server is sent over gRPC and HTTP, it answers with the right status and goes on as before."""

from __future__ import annotations

import asyncio
import http.client
import json
import math
import random
from collections.abc import Iterator, Mapping
from typing import Any

import aiohttp
import numpy as np
import pytest
import tritonclient.grpc.aio as triton
from tritonclient.utils import np_to_triton_dtype

from slos_serve.backend.launcher import Server
from slos_serve.client import wire

PATIENCE = 60.0


def post(server: Server, body: bytes | Mapping[str, Any]) -> tuple[int, str]:
    """Status and body of one HTTP request."""
    data = body if isinstance(body, bytes) else json.dumps(dict(body)).encode()
    connection = http.client.HTTPConnection(server.http, timeout=PATIENCE)
    connection.request("POST", "/v2/models/slos_llm/generate", data)
    response = connection.getresponse()
    text = response.read().decode("utf-8", "replace")
    connection.close()
    return response.status, text


async def call(client: triton.InferenceServerClient, tensors: Mapping[str, wire.Array]) -> tuple[bool, str]:
    """Whether one gRPC request is served, and its text or the error's.

    Without the header `triton_grpc_error`, which gives real status codes: with it this Triton crashed at times.
    """
    inputs = []
    for name, array in tensors.items():
        dtype = "BYTES" if array.dtype == np.object_ else np_to_triton_dtype(array.dtype)
        inputs.append(triton.InferInput(name, array.shape, dtype))
        inputs[-1].set_data_from_numpy(array)

    async def requests() -> Any:
        yield {"model_name": "slos_llm", "inputs": inputs}

    text = ""
    async for result, error in client.stream_infer(requests(), stream_timeout=PATIENCE):
        if error is not None:
            return False, str(error.message())
        text += wire.text(result.as_numpy("text_output"))
    return True, text


def call_once(server: Server, tensors: Mapping[str, wire.Array]) -> tuple[bool, str]:
    async def run() -> tuple[bool, str]:
        async with triton.InferenceServerClient(server.grpc) as client:
            return await call(client, tensors)

    return asyncio.run(run())


@pytest.fixture(autouse=True)
def _unharmed(server: Server) -> Iterator[None]:
    """After every test the server says what it said before."""
    question = {"text_input": "def f(x):", "max_tokens": 12}
    before = json.loads(post(server, question)[1])["text_output"]
    yield
    status, text = post(server, question)
    assert status == 200
    assert json.loads(text)["text_output"] == before


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "text_input"),
    ({"text_input": ""}, "text_input"),
    ({"text_input": "a", "input_ids": [1]}, "text_input"),
    ({"text_input": "word " * 3000}, "text_input"),
    ({"text_input": "x" * 10_000_000}, "text_input"),
    ({"input_ids": [-1]}, "input_ids"),
    ({"input_ids": [100_000]}, "input_ids"),
    ({"input_ids": [1] * 600}, "input_ids"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -7}, "max_tokens"),
    ({"temperature": -1.0}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -5}, "top_k"),
    ({"min_p": 2.0}, "min_p"),
    ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ({"presence_penalty": 9.0}, "presence_penalty"),
    ({"frequency_penalty": -9.0}, "frequency_penalty"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"beam_width": 4}, "beam_width"),
    ({"stop": [""]}, "stop"),
    ({"slo_class": "vip"}, "slo_class"),
    ({"slo_ttft_ms": 0.0}, "slo_ttft_ms"),
    ({"slo_ttft_ms": -5.0}, "slo_ttft_ms"),
    ({"slo_tpot_ms": 0.0}, "slo_tpot_ms"),
    ({"thinking_tokens": -1}, "thinking_tokens"),
    ({"sampling_parameters": "{nonsense"}, "sampling_parameters"),
    ({"sampling_parameters": '{"max_tokens": "ten"}'}, "max_tokens"),
    ({"sampling_parameters": '{"best_of": 3}'}, "best_of"),
]


def with_prompt(fields: dict[str, Any]) -> dict[str, Any]:
    return fields if not fields or {"text_input", "input_ids"} & fields.keys() else {"text_input": "a", **fields}


@pytest.mark.parametrize(("fields", "field"), BAD, ids=[f"{i}-{bad[1]}" for i, bad in enumerate(BAD)])
def test_a_bad_field_is_refused_both_ways(server: Server, fields: dict[str, Any], field: str) -> None:
    """400 over HTTP, INVALID_ARGUMENT over gRPC, and the same text that names the field."""
    fields = with_prompt(fields) or {"max_tokens": 5}
    status, text = post(server, fields)
    error = json.loads(text)["error"]
    assert status == 400
    assert error.startswith("INVALID_ARGUMENT: ")
    assert field in error
    assert "got" in error
    assert call_once(server, wire.encode(fields)) == (False, error)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["temperature", "top_p", "repetition_penalty", "slo_ttft_ms", "slo_tpot_ms"])
def test_what_is_no_number_is_refused_both_ways(server: Server, field: str, value: float) -> None:
    """NaN and infinities never get to the model."""
    served, message = call_once(server, wire.encode({"text_input": "a", field: value}))
    assert not served
    assert f"INVALID_ARGUMENT: {field}: " in message
    status, text = post(server, {"text_input": "a", field: value})
    assert status == 400, text


def test_invalid_utf8_is_refused_both_ways(server: Server) -> None:
    """Bytes that are no text are told apart from text."""
    broken = np.array([b"abc\xff\xfe"], dtype=np.object_)
    served, message = call_once(server, {"text_input": broken})
    assert not served
    assert "text_input: must be UTF-8" in message
    status, _ = post(server, b'{"text_input": "abc\xff\xfe"}')
    assert status == 400


WRONG_TENSORS = {
    "dtype": {"text_input": np.array([1.5], np.float32)},
    "shape": {"text_input": np.array([b"a", b"b"], np.object_)},
    "rank": {"text_input": np.array([[b"a"]], np.object_)},
    "integer": {"text_input": np.array([b"a"], np.object_), "max_tokens": np.array([5], np.int64)},
    "unknown": {"text_input": np.array([b"a"], np.object_), "colour": np.array([5], np.int32)},
}


@pytest.mark.parametrize("tensors", WRONG_TENSORS.values(), ids=WRONG_TENSORS)
def test_a_tensor_of_wrong_type_or_shape_is_refused(server: Server, tensors: dict[str, wire.Array]) -> None:
    """Triton itself checks the declared types and shapes and names the tensor."""
    served, message = call_once(server, tensors)
    assert not served
    assert any(name in message for name in tensors)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"text"', b'{"text_input": }', b'{"text_input": null}', b'{"text_input": {"a": 1}}',
     b'{"text_input": ["a", "b"]}', b'{"text_input": 5}', b'{"text_input": "a", "max_tokens": "many"}', b"\xff" * 20],
)  # fmt: skip
def test_malformed_json_is_refused(server: Server, body: bytes) -> None:
    """What Triton's JSON reader cannot place is an error with a text, never a hang."""
    status, text = post(server, body)
    assert status in (400, 500), text
    assert json.loads(text)["error"]


def test_a_huge_max_tokens_reserves_nothing(server: Server) -> None:
    """It ends with the context, and short requests beside it are served."""
    huge = wire.encode({"text_input": "a", "max_tokens": 2**31 - 1, "ignore_eos": True, "stream": True})
    small = wire.encode({"text_input": "b", "max_tokens": 2})

    async def run() -> list[tuple[bool, str]]:
        async with triton.InferenceServerClient(server.grpc) as client:
            return await asyncio.gather(*(call(client, tensors) for tensors in [*[huge] * 12, *[small] * 12]))

    assert all(served for served, _ in asyncio.run(run()))


def random_value(chance: random.Random, field: wire.Field) -> Any:
    """A value of the field's type, often at an edge."""
    odd: dict[str, list[Any]] = {
        "INT32": [0, 1, -1, 2, 7, 300, 2**31 - 1, -(2**31)],
        "UINT64": [0, 1, 2**64 - 1],
        "FP32": [0.0, 1.0, 0.5, -1.0, 1e-30, 1e30, math.nan, math.inf, -math.inf],
        "BOOL": [True, False],
        "BYTES": ["", "a", "{}", "coding", "best_effort", "\x00", "é" * 50, '{"top_k": 3}', '{"stop": ["a", 1]}'],
    }
    size = chance.randrange(4) if field.dims == (-1,) else 1
    values = [chance.choice(odd[field.dtype]) for _ in range(size)]
    return values if field.dims == (-1,) else values[0]


def random_fields(chance: random.Random) -> dict[str, Any]:
    fields = chance.sample(wire.INPUTS, chance.randrange(6))
    drawn = {field.name: random_value(chance, field) for field in fields}
    if chance.random() < 0.7:
        drawn["text_input"] = "".join(chance.choice("ab(é\n") for _ in range(chance.randrange(30)))
    if chance.random() < 0.8:
        drawn["max_tokens"] = chance.randrange(-1, 6)
    return drawn


def test_thousands_of_random_requests_are_all_answered(server: Server) -> None:
    """2000 over gRPC and 2000 over HTTP: served, or refused for a reason; none hangs or fails inside."""
    chance = random.Random(20)
    grpc_work = iter([random_fields(chance) for _ in range(2000)])
    http_work = iter([random_fields(chance) for _ in range(2000)])
    counts = {"served": 0, "refused": 0}

    def note(is_served: bool, is_refused: bool, shown: object) -> None:
        assert is_served or is_refused, shown
        counts["served" if is_served else "refused"] += 1

    async def over_grpc(client: triton.InferenceServerClient) -> None:
        for fields in grpc_work:
            tensors = wire.encode(fields)
            served, message = await call(client, tensors)
            # Triton's own words about a request without any tensor
            note(served, message.startswith("INVALID_ARGUMENT") or "input" in message, (fields, message))

    async def over_http(session: aiohttp.ClientSession) -> None:
        for fields in http_work:
            body = json.dumps(fields)
            async with session.post(f"http://{server.http}/v2/models/slos_llm/generate", data=body) as response:
                text = await response.text(errors="replace")
            note(response.status == 200, response.status in (400, 500), (fields, response.status, text))
            assert response.status != 500 or "INTERNAL" not in text

    async def run() -> None:
        async with triton.InferenceServerClient(server.grpc) as client, aiohttp.ClientSession() as session:
            await asyncio.gather(*(over_grpc(client) for _ in range(12)), *(over_http(session) for _ in range(12)))

    asyncio.run(run())
    assert counts["served"] > 400
    assert counts["refused"] > 400
    assert sum(counts.values()) == 4000
