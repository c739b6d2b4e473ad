"""The same request through Triton's HTTP `generate_stream` endpoint, for callers without gRPC.

Reads server-sent events as they come and applies the same checks: Triton can drop events in a burst,
and the token count shows it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import aiohttp

from . import wire
from .client import DEFAULT_MODEL, Stream, request_fields
from .stream import Assembly, Delta, Lost, refused


class HttpClient:
    """A pool of connections to one Triton server. `address` is HOST:PORT of its HTTP side."""

    def __init__(self, address: str = "127.0.0.1:8000", model: str = DEFAULT_MODEL) -> None:
        self._url = f"http://{address}/v2/models/{model}/generate_stream"
        self._opened: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> HttpClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections; running streams end as lost."""
        if self._opened is not None:
            await self._opened.close()
            self._opened = None

    @property
    def _session(self) -> aiohttp.ClientSession:
        """Opened when first used, for it belongs to the event loop it was made in."""
        if self._opened is None:
            self._opened = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        return self._opened

    def generate(
        self, prompt: str | Sequence[int], *, request_id: str = "", timeout: float | None = None, **fields: Any
    ) -> Stream:
        """As `SlosClient.generate`."""
        assembly = Assembly()
        body = {name: value for name, value in request_fields(prompt, fields).items() if value is not None}
        wire.encode(body)  # refuses what gRPC would refuse: Triton takes unknown JSON keys as parameters
        if request_id:
            body["id"] = request_id
        return Stream(self._run(body, timeout, assembly), assembly)

    async def _run(
        self, body: dict[str, Any], timeout: float | None, assembly: Assembly
    ) -> AsyncGenerator[Delta, None]:
        limits = aiohttp.ClientTimeout(total=timeout)
        try:
            async with self._session.post(self._url, json=body, timeout=limits) as response:
                if response.status != 200:
                    raise refused(_error_text(await response.text()))
                # A line can be as long as a receipt or a whole answer, longer than readline allows.
                rest = b""
                async for piece in response.content.iter_any():
                    at = time.monotonic()
                    *lines, rest = (rest + piece).split(b"\n")
                    for line in lines:
                        if line.startswith(b"data:"):
                            yield _delta(assembly, json.loads(line[5:]), at)
        except (aiohttp.ClientError, asyncio.TimeoutError, ValueError) as error:
            raise Lost(f"{type(error).__name__}: {error}") from error
        assembly.result()


def _error_text(body: str) -> str:
    try:
        return str(json.loads(body.removeprefix("data:"))["error"])
    except (ValueError, KeyError, TypeError):
        return body


def _delta(assembly: Assembly, event: dict[str, Any], at: float) -> Delta:
    if "error" in event:
        raise refused(str(event["error"]))
    if "token_index" not in event:
        raise Lost("token_index: an event without it; is this a slos_serve model?")
    ids = event.get("output_ids", [])  # one id comes as a number
    return assembly.add(
        event.get("text_output", ""),
        ids if isinstance(ids, list) else [ids],
        event["token_index"],
        event.get("finish_reason", ""),
        event.get("receipt", ""),
        at,
    )
