"""A gRPC connection to one instance: send one request, read its responses. The one module that speaks gRPC.

A request has a stream of its own, so that cancelling it cancels that request alone. Opening one takes as long as
sending a request does, so a few are opened ahead. Errors come as `Broken` (the instance, or the way to it, failed)
or as `Answered` (the instance refused, in its own words).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from slos_serve.client.wire import INPUT_BY_NAME, Array, serialize

# A connection that was lost is tried again soon; without these gRPC waits up to two minutes.
_OPTIONS: Final = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
)
SPARE: Final = 4  # streams opened ahead: as many requests as may well come before there are new ones
END_SECONDS: Final = 2.0


class Broken(Exception):
    """No more responses: the instance is gone, went silent or never answered."""


class Answered(Exception):
    """The instance answered with an error text."""


class Response:
    """One response: its output tensors by name, as raw bytes."""

    __slots__ = ("raw",)

    def __init__(self, message: Any) -> None:
        names = [output.name for output in message.outputs]
        self.raw: dict[str, bytes] = dict(zip(names, message.raw_output_contents, strict=True))

    def text(self, name: str) -> str:
        """A BYTES tensor of one element: four bytes of length, then the text; "" where it is absent."""
        return self.raw.get(name, b"")[4:].decode("utf-8", "replace")

    def ids(self) -> list[int]:
        ids: list[int] = np.frombuffer(self.raw.get("output_ids", b""), np.int32).tolist()
        return ids

    def token_index(self) -> int:
        return int.from_bytes(self.raw.get("token_index", b""), "little")


def request_message(
    model: str, request_id: str, tensors: Mapping[str, Array], timeout_us: int = 0
) -> service_pb2.ModelInferRequest:
    """The request as it goes over the wire."""
    message = service_pb2.ModelInferRequest(model_name=model, id=request_id)
    for name, array in tensors.items():
        message.inputs.add(name=name, datatype=INPUT_BY_NAME[name].dtype, shape=array.shape)
        message.raw_input_contents.append(serialize(array))
    if timeout_us:
        message.parameters["timeout"].int64_param = timeout_us
    return message


class Link:
    """The connection to one instance, for use in one event loop."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._spare: deque[Any] = deque()

    def send(self, message: service_pb2.ModelInferRequest) -> Exchange:
        """Start a request; nothing is known of it before its first response."""
        while self._spare:
            call = self._spare.popleft()
            if not call.done():
                return Exchange(call, message)
        return Exchange(self._stub.ModelStreamInfer(), message)

    def prepare(self) -> None:
        """Open streams for the next requests."""
        self._spare = deque(call for call in self._spare if not call.done())
        while len(self._spare) < SPARE:
            self._spare.append(self._stub.ModelStreamInfer())

    def release(self) -> None:
        """Close the streams that no request has used: a server with an open one does not end."""
        while self._spare:
            self._spare.popleft().cancel()

    async def close(self) -> None:
        self.release()
        await self._channel.close()


class Exchange:
    """One request on its way: iterate it for the responses; `interrupt` ends it from outside."""

    def __init__(self, call: Any, message: service_pb2.ModelInferRequest) -> None:
        self._call = call
        self._message = message
        self._interrupted: str | None = None
        self._ending: asyncio.Task[None] | None = None
        self.heard_at = time.monotonic()

    def interrupt(self, reason: str) -> None:
        """Whoever iterates gets Broken; the instance sees a cancellation, where it still sees anything."""
        if self._interrupted is None:
            self._interrupted = reason
            self._call.cancel()

    def close(self) -> None:
        """Cancel it, unless it has ended or is about to."""
        if self._ending is None:
            self._call.cancel()

    def finish(self) -> None:
        """Its last response was read: let it end by itself. Where a cancellation overtakes that end, Triton keeps the
        request, and a model with a request is never unloaded."""
        if self._ending is None:
            self._ending = asyncio.get_running_loop().create_task(self._end())

    async def _end(self) -> None:
        with contextlib.suppress(grpc.RpcError, asyncio.TimeoutError):
            await asyncio.wait_for(self._read_out(), END_SECONDS)
        self._call.cancel()

    async def _read_out(self) -> None:
        await self._call.done_writing()
        while await self._call.read() is not grpc.aio.EOF:
            pass

    async def __aiter__(self) -> AsyncIterator[Response]:
        """Ends after the instance closed the stream. Raises Broken or Answered."""
        try:
            await self._call.write(self._message)
            while (answer := await self._call.read()) is not grpc.aio.EOF:
                if self._interrupted is not None:
                    break  # a late word of an instance that was given up
                self.heard_at = time.monotonic()
                if answer.error_message:
                    self.finish()
                    raise Answered(answer.error_message)
                yield Response(answer.infer_response)
                await self._call.done_writing()  # not before the first response: nothing should be in its way
            if self._interrupted is not None:
                raise Broken(self._interrupted)
            if (code := await self._call.code()) is not grpc.StatusCode.OK:
                raise Broken(f"{code.name}: {await self._call.details()}")
        except grpc.RpcError as error:
            raise Broken(self._interrupted or f"{error.code().name}: {error.details()}") from error
        except asyncio.CancelledError:
            if self._interrupted is None or not self._call.cancelled():
                raise
            raise Broken(self._interrupted) from None
        except asyncio.InvalidStateError as error:  # written to after it broke
            raise Broken(self._interrupted or str(error)) from error
        finally:
            self.close()
