"""The client: text or token ids in, a stream of deltas out, one gRPC stream per request.

Every request ends in exactly one way: a `Result`, or one of the errors of `stream`. Leaving the loop
early or cancelling the task cancels the request on the server; Triton does not tell an ensemble's steps, so a
request to the routers' ensemble is stopped there by its id.

    async with SlosClient("127.0.0.1:8001") as client:
        async for delta in client.generate("def f(", max_tokens=50, slo_class="coding"):
            print(delta.text, end="")
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Any, Final

import grpc
import numpy as np
import tritonclient.grpc.aio as triton
from tritonclient.utils import InferenceServerException

from . import wire
from .stream import Assembly, Delta, Lost, Refused, Result, StreamError, refused

DEFAULT_MODEL: Final = "slos_llm"
ENSEMBLE_MODEL: Final = "slos_ensemble"
STOP_SECONDS: Final = 2.0


class Stream:
    """One running request: iterate it for the deltas, then read `result`."""

    def __init__(self, deltas: AsyncGenerator[Delta, None], assembly: Assembly) -> None:
        self._deltas = deltas
        self._assembly = assembly

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self._deltas

    @property
    def result(self) -> Result:
        """The whole answer, after the last delta. Raises Lost before that."""
        return self._assembly.result()

    async def aclose(self) -> None:
        """Cancel the request on the server, unless it has ended."""
        await self._deltas.aclose()

    async def drain(self) -> Result:
        """Read to the end and return the whole answer."""
        async for _ in self._deltas:
            pass
        return self.result


class SlosClient:
    """A connection to one Triton server, for use in one event loop. `address` is HOST:PORT of its gRPC side."""

    def __init__(self, address: str = "127.0.0.1:8001", model: str = DEFAULT_MODEL) -> None:
        self._address = address
        self._model = model
        self._opened: triton.InferenceServerClient | None = None
        self._stops: set[asyncio.Task[None]] = set()

    @property
    def _triton(self) -> triton.InferenceServerClient:
        """Opened when first used, for a gRPC channel belongs to the event loop it was made in."""
        if self._opened is None:
            self._opened = triton.InferenceServerClient(self._address)
        return self._opened

    async def __aenter__(self) -> SlosClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connection; running streams end as lost."""
        await asyncio.gather(*self._stops)
        if self._opened is not None:
            await self._opened.close()
            self._opened = None

    async def is_ready(self) -> bool:
        """Whether the server is there and says that the model is ready."""
        try:
            return bool(await self._triton.is_model_ready(self._model))
        except InferenceServerException:
            return False

    def generate(
        self, prompt: str | Sequence[int], *, request_id: str = "", timeout: float | None = None, **fields: Any
    ) -> Stream:
        """Start a request when the result is first iterated.

        `prompt` is text or token ids; `fields` are the inputs of `wire.INPUTS` by name, such as
        max_tokens, temperature, seed, stop, slo_class, slo_ttft_ms, slo_tpot_ms, thinking_tokens or
        session_id. After `timeout` seconds the request is cancelled and ends as Lost. Raises ValueError
        at once for an unknown field or a value that does not fit its type.
        """
        assembly = Assembly()
        inputs = input_tensors(request_fields(prompt, fields))
        return Stream(self._run(inputs, request_id, timeout, assembly), assembly)

    async def _run(
        self, inputs: list[triton.InferInput], request_id: str, timeout: float | None, assembly: Assembly
    ) -> AsyncGenerator[Delta, None]:
        must_stop = self._model == ENSEMBLE_MODEL
        request_id = request_id or (f"slos-{secrets.token_hex(8)}" if must_stop else "")
        try:
            async for message, at in self.responses(inputs, request_id, timeout, Running()):
                yield read_delta(assembly, message, at)
            must_stop = False
        except Refused:
            must_stop = False
            raise
        finally:
            if must_stop:
                task = asyncio.get_running_loop().create_task(self._stop(request_id))
                self._stops.add(task)
                task.add_done_callback(self._stops.discard)
        assembly.result()  # an end without a last response is an error

    async def _stop(self, request_id: str) -> None:
        """End a request that goes on without its caller."""
        stop = self.responses(input_tensors({"control": "stop"}), request_id, STOP_SECONDS, Running())
        with contextlib.suppress(StreamError):  # it has ended, or the server has
            async for _ in stop:
                pass

    async def responses(
        self, inputs: list[triton.InferInput], request_id: str, timeout: float | None, running: Running
    ) -> AsyncGenerator[tuple[Any, float], None]:
        """Send one request and read its responses, each with its time. Raises Refused or Lost.

        `running` tells when the server was heard last, and interrupts from outside.
        """

        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield {
                "model_name": self._model,
                "inputs": inputs,
                "request_id": request_id,
                "enable_empty_final_response": True,
            }

        call = self._triton.stream_infer(requests(), stream_timeout=timeout)
        running.begin(call)
        try:
            async for response, error in call:
                at = running.heard_at = time.monotonic()
                if running.interrupted:
                    raise Lost(running.interrupted)  # a late word of a server that was given up
                if error is not None:
                    raise refused(error.message())
                message = response.get_response()
                if message.outputs:
                    yield message, at
        except grpc.RpcError as error:
            raise Lost(running.interrupted or f"{error.code().name}: {error.details()}") from error
        except asyncio.CancelledError:
            if not running.interrupted:
                raise
            raise Lost(running.interrupted) from None
        finally:
            call.cancel()
        if running.interrupted:
            raise Lost(running.interrupted)


class Running:
    """One request on its way to one server."""

    def __init__(self) -> None:
        self.heard_at = time.monotonic()
        self.interrupted = ""
        self._call: Any = None

    def begin(self, call: Any) -> None:
        self._call = call
        self.heard_at = time.monotonic()

    def interrupt(self, reason: str) -> None:
        """Give this server up: whoever reads gets Lost, and nothing more of what it says."""
        if not self.interrupted:
            self.interrupted = reason
            if self._call is not None:
                self._call.cancel()


def request_fields(prompt: str | Sequence[int], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of one streaming request by name. Token ids are asked for: they show a lost response."""
    given = {"text_input": prompt} if isinstance(prompt, str) else {"input_ids": [int(token) for token in prompt]}
    return {**given, "stream": True, "return_token_ids": True, **fields}


def input_tensors(fields: Mapping[str, Any]) -> list[triton.InferInput]:
    tensors = []
    for name, array in wire.encode(fields).items():
        tensor = triton.InferInput(name, array.shape, wire.INPUT_BY_NAME[name].dtype)
        tensor.set_data_from_numpy(array)
        tensors.append(tensor)
    return tensors


def read_delta(assembly: Assembly, response: Any, at: float) -> Delta:
    """Read the tensors as they lie in the message: this runs for every token, and `as_numpy` doubles its cost."""
    raw = {output.name: data for output, data in zip(response.outputs, response.raw_output_contents, strict=True)}
    if "token_index" not in raw:
        raise Lost("token_index: a response without it; is this a slos_serve model?")
    return assembly.add(
        _text(raw.get("text_output", b"")),
        np.frombuffer(raw.get("output_ids", b""), np.int32).tolist(),
        int.from_bytes(raw["token_index"], "little"),
        _text(raw.get("finish_reason", b"")),
        _text(raw.get("receipt", b"")),
        at,
    )


def _text(raw: bytes) -> str:
    """A BYTES tensor of one element: four bytes of length, then the text."""
    return raw[4:].decode("utf-8", "replace")


def generate(
    prompt: str | Sequence[int], *, address: str = "127.0.0.1:8001", model: str = DEFAULT_MODEL, **fields: Any
) -> Result:
    """One request from plain code: connect, wait for the whole answer, disconnect."""

    async def run() -> Result:
        async with SlosClient(address, model) as client:
            return await client.generate(prompt, **fields).drain()

    return asyncio.run(run())
