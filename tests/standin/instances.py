"""Instances without Triton: a gRPC server in the test's own event loop that tells a load and answers as it is told.

Real servers are used wherever what they do is what is tested; these are for what a real one cannot be made to do
at a given moment: decline, stay silent, or break between two words.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from slos_serve.client import wire
from slos_serve.scheduler.dispatch import Load

IDLE = Load(step=0.005, per_token=0.0001, free_blocks=1000, num_blocks=1000)
Answer = Callable[[Mapping[str, Any]], AsyncIterator[dict[str, Any]]]


class Instance(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Answers with `answer`, an async generator of output fields from the input fields; remembers what was asked."""

    def __init__(self, answer: Answer, **load: float) -> None:
        self.answer = answer
        self.load = replace(IDLE, **load)
        self.draining = False
        self.sessions: dict[str, int] = {}
        self.asked: list[Mapping[str, Any]] = []
        self.hung_up = asyncio.Event()
        self.address = ""
        self.open = 0  # streams, whether or not a request has come

    async def ModelStreamInfer(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        self.open += 1
        try:
            async for response in self._responses(requests):
                yield response
        finally:
            self.open -= 1

    async def _responses(self, requests: Any) -> AsyncIterator[Any]:
        async for request in requests:
            values = fields_of(request)
            if values.get("control") == "watch":
                answers = self._states()
            else:
                self.asked.append(values)
                answers = self.answer(values)
            try:
                async for outputs in answers:
                    yield response_of(outputs)
            except asyncio.CancelledError:
                if values.get("control") != "watch":
                    self.hung_up.set()
                raise

    async def _states(self) -> AsyncIterator[dict[str, Any]]:
        for _ in range(100):
            state = {"load": self.load.to_json(), "engine_age": 0.0, "instance": self.address, "fingerprint": "same"}
            yield {"control_output": json.dumps({**state, "draining": self.draining, "sessions": self.sessions})}
            await asyncio.sleep(0.02)


def fields_of(request: Any) -> dict[str, Any]:
    """The input tensors by name, as plain values."""
    values: dict[str, Any] = {"id": request.id}
    for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
        field = wire.INPUT_BY_NAME[tensor.name]
        if field.dtype == "BYTES":
            values[field.name] = raw[4:].decode()
        else:
            items = np.frombuffer(raw, wire.numpy_dtype(field)).tolist()
            values[field.name] = items if field.dims == (-1,) else items[0]
    return values


def response_of(outputs: Mapping[str, Any]) -> Any:
    """A streamed response with these output tensors, or with the error of an entry `error`."""
    if "error" in outputs:
        return service_pb2.ModelStreamInferResponse(error_message=outputs["error"])
    answer = service_pb2.ModelInferResponse()
    for name, value in outputs.items():
        array = np.array([value.encode()], np.object_) if isinstance(value, str) else np.array(value, np.int32)
        answer.outputs.add(name=name)
        answer.raw_output_contents.append(wire.serialize(array.reshape(-1)))
    return service_pb2.ModelStreamInferResponse(infer_response=answer)


@asynccontextmanager
async def served(instances: Sequence[Instance]) -> AsyncIterator[tuple[str, ...]]:
    """All of them on ports of their own: the addresses."""
    async with AsyncExitStack() as stack:
        for instance in instances:
            server = grpc.aio.server()
            service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(instance, server)
            instance.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
            await server.start()
            stack.push_async_callback(server.stop, None)
        yield tuple(instance.address for instance in instances)
