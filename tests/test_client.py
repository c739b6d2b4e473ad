"""The client and the player against a real Triton server whose model misbehaves on demand."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slos_serve.backend.launcher import Server
from slos_serve.client import Duplicated, Lost, Refused, SlosClient, StreamError, generate, wire
from slos_serve.client.http_stream import HttpClient
from slos_serve.client.stream import Assembly, refused
from slos_serve.loadtest.play import Caller, Ledger, Shot, play, probe, shots
from slos_serve.loadtest.workload import Arrival, tool_calling

SCRIPTED = Path(__file__).parent / "scripted_server"
MODEL = "scripted"


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real server with the scripted model."""
    repository = tmp_path_factory.mktemp("repository")
    (repository / MODEL / "1").mkdir(parents=True)
    shutil.copy(SCRIPTED / "config.pbtxt", repository / MODEL)
    shutil.copy(SCRIPTED / "model.py", repository / MODEL / "1")
    with Server(repository) as server:
        yield server


@asynccontextmanager
async def connected(scripted: Server, transport: str) -> AsyncIterator[SlosClient | HttpClient]:
    client = SlosClient(scripted.grpc, MODEL) if transport == "grpc" else HttpClient(scripted.http, MODEL)
    async with client:
        yield client


both = pytest.mark.parametrize("transport", ["grpc", "http"])


def token(index: int, *ids: int, **more: Any) -> dict[str, Any]:
    """A response with these ids, after which `index` tokens are out."""
    return {"text_output": "".join(f"<{each}>" for each in ids), "output_ids": list(ids), "token_index": index, **more}


def last(index: int, *ids: int, reason: str = "length", **receipt: Any) -> dict[str, Any]:
    return token(index, *ids, finish_reason=reason, receipt=json.dumps(receipt))


def script(*responses: dict[str, Any], **more: Any) -> str:
    return json.dumps({"responses": responses, **more})


def run(scripted: Server, transport: str, prompt: str, **fields: Any) -> Any:
    async def call() -> Any:
        async with connected(scripted, transport) as client:
            return await client.generate(prompt, **fields).drain()

    return asyncio.run(call())


@both
def test_deltas_come_in_order_and_make_the_result(scripted: Server, transport: str) -> None:
    """Text, ids and times of all responses; two tokens of one response share their time."""

    async def call() -> None:
        async with connected(scripted, transport) as client:
            prompt = script(token(1, 7), token(3, 8, 9), last(4, 5, attained=True), delay=0.02)
            stream = client.generate(prompt, max_tokens=4)
            deltas = [delta async for delta in stream]
            result = stream.result
            assert [(delta.text, delta.token_ids, delta.token_index) for delta in deltas] == [
                ("<7>", (7,), 1),
                ("<8><9>", (8, 9), 3),
                ("<5>", (5,), 4),
            ]
            assert (result.text, result.token_ids) == ("<7><8><9><5>", (7, 8, 9, 5))
            assert result.token_times == (deltas[0].at, deltas[1].at, deltas[1].at, deltas[2].at)
            assert list(result.token_times) == sorted(result.token_times)
            assert (result.finish_reason, result.receipt) == ("length", {"attained": True})

    asyncio.run(call())


@both
@pytest.mark.parametrize(
    ("prompt", "error", "says"),
    [
        (script(token(1, 7), last(3, 9)), Lost, r"token_index: expected 2 \(1 before, 1 now\), got 3"),
        (script(token(1, 7)), Lost, "ended after 1 tokens without a finish_reason"),
        (script(), Lost, "ended after 0 tokens"),
        (script({"text_output": "x"}), Lost, "token_index: .* without it"),
        (script(last(1, 7), last(2, 8)), Duplicated, "after the one with finish_reason 'length'"),
        (script(error="OVERLOADED retry_after_ms=120: too much"), Refused, "^OVERLOADED: too much$"),
        (script(token(1, 7), error="INTERNAL: the engine failed"), Refused, "^INTERNAL: the engine failed$"),
    ],
)
def test_a_stream_that_is_not_whole_is_an_error(
    scripted: Server, transport: str, prompt: str, error: type[StreamError], says: str
) -> None:
    """A gap, a missing end, two ends and a refusal each have their own error, over both transports."""
    with pytest.raises(error, match=says):
        run(scripted, transport, prompt)


def test_a_refusal_is_machine_readable() -> None:
    """Code, message and when to retry; an error in Triton's own words has no code."""
    overloaded = refused("OVERLOADED retry_after_ms=120: 512 requests in flight")
    assert (overloaded.code, overloaded.retry_after_ms) == ("OVERLOADED", 120)
    assert overloaded.message == "512 requests in flight"
    assert refused("INVALID_ARGUMENT: top_p: must be in (0, 1], got 2").code == "INVALID_ARGUMENT"
    assert refused("Request for unknown model: 'x' is not found").code == "UNKNOWN"


@both
def test_an_unknown_model_is_refused(scripted: Server, transport: str) -> None:
    """The server's own words come through."""

    async def call() -> None:
        client = SlosClient(scripted.grpc, "nope") if transport == "grpc" else HttpClient(scripted.http, "nope")
        async with client:
            await client.generate("x").drain()

    with pytest.raises(Refused, match="nope"):
        asyncio.run(call())


@both
@pytest.mark.parametrize("fields", [{"bogus": 1}, {"max_tokens": "many"}, {"max_tokens": 1 << 40}, {"top_k": 1.5}])
def test_a_wrong_field_is_refused_before_sending(scripted: Server, transport: str, fields: dict[str, Any]) -> None:
    """A misspelt field or a value that its type cannot hold raises at once and is named."""
    with pytest.raises(ValueError, match=next(iter(fields))):
        run(scripted, transport, script(last(0)), **fields)


def test_token_ids_go_as_input_ids() -> None:
    """A prompt of ids of any integer kind is encoded as input_ids."""
    from slos_serve.client.client import request_fields

    arrays = wire.encode(request_fields(np.array([3, 4]), {}))
    assert arrays["input_ids"].tolist() == [3, 4]
    assert "text_input" not in arrays


def test_nobody_there_is_lost_not_refused() -> None:
    """A port on which nothing listens."""

    async def call(client: SlosClient | HttpClient) -> None:
        async with client:
            await client.generate("x").drain()

    for client in (SlosClient("127.0.0.1:9"), HttpClient("127.0.0.1:9")):
        with pytest.raises(Lost):
            asyncio.run(call(client))


def test_is_ready_tells_of_server_and_model(scripted: Server) -> None:
    """True for a loaded model, false for an unknown one and for no server."""

    async def ready(address: str, model: str) -> bool:
        async with SlosClient(address, model) as client:
            return await client.is_ready()

    assert asyncio.run(ready(scripted.grpc, MODEL))
    assert not asyncio.run(ready(scripted.grpc, "nope"))
    assert not asyncio.run(ready("127.0.0.1:9", MODEL))


@both
def test_leaving_early_cancels_on_the_server(scripted: Server, transport: str) -> None:
    """Closing a stream after its first delta, and a timeout, each end the request at the server."""
    endless = script(*(token(index + 1, 7) for index in range(500)), delay=0.02)

    async def call() -> None:
        async with connected(scripted, transport) as client:
            before = int((await client.generate("cancelled").drain()).text)
            stream = client.generate(endless)
            async for _ in stream:
                break
            await stream.aclose()
            with pytest.raises(Lost):
                await client.generate(endless, timeout=0.2).drain()
            for _ in range(100):
                if int((await client.generate("cancelled").drain()).text) == before + 2:
                    return
                await asyncio.sleep(0.05)
            pytest.fail("the server did not see both cancellations")

    asyncio.run(call())


def test_the_plain_function_needs_no_event_loop(scripted: Server) -> None:
    """One call, one result."""
    assert generate(script(last(1, 7)), address=scripted.grpc, model=MODEL, max_tokens=1).text == "<7>"


def test_a_result_is_not_there_before_the_end() -> None:
    """Asking an unfinished stream for its result says so."""
    with pytest.raises(Lost):
        Assembly().result()


def shot(client: Caller, number: int, prompt: str, at: float = 0.0, **more: Any) -> Shot:
    return Shot(f"r{number}", Arrival(at, "chatbot", 10, 4, **more), prompt, "grpc", client)


def played(scripted: Server, transport: str, prompts: list[str], grace: float = 20.0) -> Ledger:
    async def call() -> Ledger:
        async with connected(scripted, transport) as client:
            ready = [shot(client, number, prompt, at=0.01 * number) for number, prompt in enumerate(prompts)]
            return await play(ready, grace=grace, on_tick=lambda ledger, seconds: None, tick=0.05)

    return asyncio.run(call())


@both
def test_the_player_records_how_each_request_ended(scripted: Server, transport: str) -> None:
    """One record per request sent, each with its outcome."""
    prompts = [
        script(last(1, 7)),
        script(last(1, 7, reason="cancelled")),
        script(error="OVERLOADED retry_after_ms=1: full"),
        script(error="INVALID_ARGUMENT: max_tokens: must be at least 1, got 0"),
        script(token(1, 7)),
        script(last(1, 7), last(2, 8)),
    ]
    ledger = played(scripted, transport, prompts)
    outcomes = {record.id: record.outcome for record in ledger.records}
    expected = ["done", "cancelled", "refused", "failed", "lost", "duplicated"]
    assert outcomes == {f"r{number}": outcome for number, outcome in enumerate(expected)}
    assert len(ledger.records) == len(ledger.sent) == 6
    assert len(ledger.faults()) == 3


@both
def test_a_request_without_an_end_is_hanging(scripted: Server, transport: str) -> None:
    """When the time allowed is over, what is open is recorded and the player returns."""
    ledger = played(scripted, transport, [script(token(1, 7), final=False), script(last(1, 7))], grace=1.0)
    outcomes = {record.id: record.outcome for record in ledger.records}
    assert outcomes == {"r0": "hanging", "r1": "done"}


def test_requests_are_sent_when_due_not_when_the_server_is_free(scripted: Server) -> None:
    """Open loop: a slow answer does not hold the next request back."""
    slow = script(token(1, 7), last(2, 8), delay=0.5)
    ledger = played(scripted, "grpc", [slow] * 10)
    sent = [record.sent_at for record in ledger.records]
    ended = [record.result.token_times[-1] for record in ledger.records if record.result]
    assert max(sent) < min(ended)
    assert all(record.sent_at >= record.due_at for record in ledger.records)


def test_a_round_waits_for_the_round_before_and_its_tool(scripted: Server) -> None:
    """Round 1 is sent a tool delay after round 0 ended, and nothing follows a round that failed."""

    async def call() -> Ledger:
        async with connected(scripted, "grpc") as client:
            first = shot(client, 0, script(token(1, 7), last(2, 8), delay=0.1), session="s")
            # The second prompt is the first one, its answer and new text: no script, so the model fails it.
            second = shot(client, 1, "tool says 4", session="s", round=1, tool_delay=0.2)
            third = shot(client, 2, "never sent", session="s", round=2)
            return await play([third, second, first], grace=1.0, on_tick=lambda *_: None)

    ledger = asyncio.run(call())
    assert ledger.sent == {"r0", "r1"}
    first, second = ledger.records
    assert first.result is not None
    assert second.sent_at >= first.result.token_times[-1] + 0.2
    assert second.outcome != "done"


def test_the_probe_measures_a_closed_loop(scripted: Server) -> None:
    """Two requests at a time of two tokens, each 50 ms: at most 40 tokens/s; a refusal ends the probe."""

    async def call(prompt: str) -> float:
        async with connected(scripted, "grpc") as client:
            return await probe([shot(client, 0, prompt)], concurrency=2, seconds=1.0)

    assert 0 < asyncio.run(call(script(token(1, 7), last(2, 8), delay=0.05))) <= 45
    with pytest.raises(Refused, match="full"):
        asyncio.run(call(script(error="OVERLOADED: full")))


def test_shots_repeat_from_a_seed_and_split_the_transports(scripted: Server) -> None:
    """The same seed gives the same texts and ways; the shares are kept; a round brings only new text."""

    async def call() -> None:
        async with connected(scripted, "grpc") as grpc, connected(scripted, "http") as http:
            callers: list[tuple[str, Caller, float]] = [("grpc", grpc, 0.8), ("http", http, 0.2)]
            arrivals = tool_calling(np.random.default_rng(0), np.arange(300.0))
            one, two = (shots(arrivals, callers, np.random.default_rng(5)) for _ in range(2))
            assert one == two
            assert len({each.id for each in one}) == len(one)
            assert np.mean([each.transport == "http" for each in one]) == pytest.approx(0.2, abs=0.05)
            for each in one:
                new = each.arrival.prompt_tokens - each.arrival.reusable_prefix_tokens
                assert len(each.text) == pytest.approx(3.3 * new, abs=1)

    asyncio.run(call())
