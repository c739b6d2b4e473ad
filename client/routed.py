"""The client of a service behind routers: it asks where to go, and streams straight from there.

A router places the request at an instance, which runs it at once, and answers with the instance's address and a
ticket; the tokens then come without a detour. Where that fails the request is placed again, with the tokens
that came so far, and goes on after the last of them; where an instance cannot be reached from here, the router
forwards. Any of the routers will do. Every request ends in exactly one way, as with `SlosClient`.

No request waits for a router that could be asked before: with each one a router is asked where the next of its
class would go, and the next goes straight there, unless the advice is old. An instance that cannot promise it
declines, and it is placed by a router as above. Rounds of a session are always placed by a router.

    async with RoutedClient(["10.0.0.1:8001", "10.0.0.2:8001"]) as client:
        result = await client.generate("def f(", max_tokens=50, slo_class="coding").drain()
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from .client import DEFAULT_MODEL, Running, SlosClient, Stream, input_tensors, read_delta, request_fields
from .stream import Assembly, Delta, Lost, Refused, StreamError

ROUTER_MODEL: Final = "slos_router"
SILENT_SECONDS: Final = 0.3  # then the routers are asked whether the instance is well
WATCH_SECONDS: Final = 0.1
UNREACHABLE_SECONDS: Final = 30.0  # how long an instance that could not be reached gets forwarded requests
PAUSE_SECONDS: Final = 0.2
ANSWER_SECONDS: Final = 1.0  # how long a router is waited for that nobody's stream depends on
HINT_SECONDS: Final = 1.0  # how long advice is followed: loads that old cost no capacity (`slos-serve study-dispatch`)
# The server is at fault, or going away: another may do better. UNKNOWN is what Triton itself writes.
_MOVABLE: Final = frozenset({"UNAVAILABLE", "INTERNAL", "UNKNOWN"})


@dataclass(slots=True, eq=False)
class _Request:
    """One request and how it fares. `address` is the instance that it streams from; "" while forwarded."""

    id: str
    fields: Mapping[str, Any]
    tensors: list[Any]  # the fields as they are sent, encoded once
    started_at: float
    deadline: float | None
    assembly: Assembly
    address: str = ""
    losses: list[str] = field(default_factory=list)
    story: dict[str, Any] = field(default_factory=dict)
    running: Running = field(default_factory=Running)
    declines: int = 0  # of instances that were advised

    @property
    def kind(self) -> str | None:
        """Requests of one kind may follow the same advice; None for one that must be placed by itself."""
        return None if "session_id" in self.fields else str(self.fields.get("slo_class", ""))

    @property
    def is_new(self) -> bool:
        """No server has had it yet."""
        return not self.losses and not self.declines

    @property
    def attempt_id(self) -> str:
        """Another one for each try: what is left of the one before may still be running."""
        return f"{self.id}~{len(self.losses)}" if self.losses else self.id

    @property
    def left(self) -> float | None:
        """Seconds that the caller still waits."""
        return None if self.deadline is None else max(self.deadline - time.monotonic(), 0.001)

    def inputs(self, **control: Any) -> list[Any]:
        """What was asked, and what came of it so far."""
        age = (time.monotonic() - self.started_at) * 1000
        values = {**control, "elapsed_ms": age}
        if self.assembly.token_ids:
            values["resume_ids"] = list(self.assembly.token_ids)
            values["resume_times_ms"] = [(at - self.started_at) * 1000 for at in self.assembly.token_times]
        own = input_tensors(values)
        replaced = {tensor.name() for tensor in own}
        return [*(tensor for tensor in self.tensors if tensor.name() not in replaced), *own]


@dataclass(frozen=True, slots=True)
class _Hint:
    """Where one more request of a kind should go, until `until`."""

    address: str
    may_decline: bool
    until: float


class RoutedClient:
    """Connections to some routers and to the instances behind them, for use in one event loop."""

    def __init__(
        self,
        routers: Sequence[str],
        *,
        placement: bool = True,
        model: str = DEFAULT_MODEL,
        router_model: str = ROUTER_MODEL,
        patience: float = 10.0,
        max_losses: int = 6,
    ) -> None:
        """`routers` are HOST:PORT each. Without `placement` all goes through a router. A request is given up when
        no router answers for `patience` seconds, or after `max_losses` servers failed under it."""
        if not routers:
            raise ValueError("routers: at least one address must be given")
        self._routers = [SlosClient(address, router_model) for address in routers]
        self._placement = placement
        self._model = model
        self._patience = patience
        self._max_losses = max_losses
        self._instances: dict[str, SlosClient] = {}
        self._unreachable: dict[str, float] = {}
        self._turn = itertools.cycle(range(len(routers)))
        self._router = 0
        self._requests: set[_Request] = set()
        self._hints: dict[str, deque[_Hint]] = {}
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._watchdog: asyncio.Task[None] | None = None

    async def __aenter__(self) -> RoutedClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections; running streams end as lost."""
        if self._watchdog is not None:
            self._watchdog.cancel()
            self._watchdog = None
        for task in self._asking.values():
            task.cancel()
        for client in (*self._routers, *self._instances.values()):
            await client.aclose()
        self._instances.clear()

    def generate(
        self, prompt: str | Sequence[int], *, request_id: str = "", timeout: float | None = None, **fields: Any
    ) -> Stream:
        """As `SlosClient.generate`."""
        now = time.monotonic()
        assembly = Assembly()
        values = request_fields(prompt, fields)
        request = _Request(
            request_id or f"slos-{secrets.token_hex(8)}",
            values,
            input_tensors(values),
            now,
            None if timeout is None else now + timeout,
            assembly,
        )
        return Stream(self._run(request), assembly)

    async def _run(self, request: _Request) -> AsyncGenerator[Delta, None]:
        """Until there is a result, or a refusal that no other server would take back."""
        request.started_at = time.monotonic()
        heard_of_router = time.monotonic()
        is_first = True
        if self._watchdog is None:
            self._watchdog = asyncio.get_running_loop().create_task(self._watch())
        self._requests.add(request)
        try:
            while True:
                request.running = Running()
                try:
                    async for delta in self._attempt(request):
                        heard_of_router = time.monotonic()
                        yield delta
                        if is_first:
                            self._ask_for_hint(request)
                            is_first = False
                    self._tell_story(request)
                    return
                except StreamError as error:
                    if isinstance(error, Refused) and error.code not in _MOVABLE:
                        raise
                    if request.address:
                        heard_of_router = time.monotonic()
                    self._check(request, error, heard_of_router)
                    await asyncio.sleep(0 if request.address else PAUSE_SECONDS)
        finally:
            self._requests.discard(request)

    def _check(self, request: _Request, error: StreamError, heard_of_router: float) -> None:
        """Raises the error when trying again is pointless."""
        request.losses.append(f"{request.address or 'router'}: {error}")
        now = time.monotonic()
        if request.deadline is not None and now >= request.deadline:
            raise error
        if request.address:
            if not request.running.interrupted and not request.assembly.token_ids:
                self._unreachable[request.address] = now + UNREACHABLE_SECONDS
            if sum(not loss.startswith("router:") for loss in request.losses) >= self._max_losses:
                raise error
            return
        self._router = next(self._turn)
        if now - heard_of_router > self._patience or len(request.losses) > 10 * self._max_losses:
            raise error

    async def _attempt(self, request: _Request) -> AsyncGenerator[Delta, None]:
        """One try: placed, or forwarded. Raises Refused or Lost; `request.address` tells who was at fault."""
        request.address = ""
        if self._placement:
            hint = self._hint(request)
            if hint is not None:
                async for delta in self._try(request, hint):
                    yield delta
                if request.assembly.finish_reason:
                    return
        router = self._routers[self._router]
        if self._placement:
            place = await self._place(router, request)
            address = str(place["address"])
            if self._unreachable.get(address, 0.0) < time.monotonic():
                request.address = address
                request.story = {"instance": place.get("instance", address)}
                request.story["hops"] = place.get("hops", 0) + request.declines
                claim = input_tensors({"ticket": str(place["ticket"])})
                responses = self._instance(address).responses(claim, request.attempt_id, request.left, request.running)
            else:
                responses = self._forwarded(router, request, "-forwarded")
        else:
            responses = self._forwarded(router, request)
        async for message, at in responses:
            yield read_delta(request.assembly, message, at)
        request.assembly.result()

    def _hint(self, request: _Request) -> _Hint | None:
        """Advice for this request, if there is any that is fresh. It is used once."""
        if request.kind is None or not request.is_new:
            return None
        now, hints = time.monotonic(), self._hints.get(request.kind)
        hint = hints.popleft() if hints else None
        return hint if hint and now < hint.until and self._unreachable.get(hint.address, 0.0) < now else None

    def _ask_for_hint(self, request: _Request) -> None:
        """For the next one like this. Asked when this one streams: until then nothing should be in its way."""
        kind = request.kind
        if kind is not None and self._placement and kind not in self._asking:
            task = asyncio.get_running_loop().create_task(self._suggestion(kind, request.fields))
            self._asking[kind] = task
            task.add_done_callback(lambda _: self._asking.pop(kind))

    async def _suggestion(self, kind: str, fields: Mapping[str, Any]) -> None:
        inputs = input_tensors({**fields, "control": "suggest"})
        with contextlib.suppress(StreamError):  # whoever finds no advice asks for a place
            async for message, at in self._routers[self._router].responses(inputs, "", ANSWER_SECONDS, Running()):
                advice = control_output(message).get("advice", ())
                until = at + HINT_SECONDS
                self._hints[kind] = deque(_Hint(str(e["address"]), bool(e["may_decline"]), until) for e in advice)

    async def _try(self, request: _Request, hint: _Hint) -> AsyncGenerator[Delta, None]:
        """At the instance that was advised; ends without a result where it declines. Raises Refused or Lost."""
        request.address, request.story = hint.address, {"instance": hint.address, "hops": 0}
        inputs = request.inputs(may_decline=hint.may_decline)
        instance = self._instance(hint.address)
        try:
            async for message, at in instance.responses(inputs, request.attempt_id, request.left, request.running):
                delta = read_delta(request.assembly, message, at)
                if request.assembly.finish_reason != "declined":
                    yield delta
            if request.assembly.result().finish_reason != "declined":
                return
        except Refused as refusal:
            if refusal.code != "OVERLOADED":
                raise
        request.assembly.finish_reason = request.assembly.receipt = ""
        request.declines += 1
        request.address, request.running = "", Running()

    def _forwarded(
        self, router: SlosClient, request: _Request, suffix: str = ""
    ) -> AsyncGenerator[tuple[Any, float], None]:
        return router.responses(request.inputs(), request.attempt_id + suffix, request.left, request.running)

    async def _place(self, router: SlosClient, request: _Request) -> Mapping[str, Any]:
        """Where to go. Raises Refused or Lost."""
        found: Mapping[str, Any] | None = None
        inputs = request.inputs(control="place")
        async for message, _ in router.responses(inputs, request.attempt_id, request.left, Running()):
            found = control_output(message)
        if found is None or "address" not in found or "ticket" not in found:
            raise Lost(f"control_output: expected an address and a ticket, got {found}")
        return found

    def _instance(self, address: str) -> SlosClient:
        if address not in self._instances:
            self._instances[address] = SlosClient(address, self._model)
        return self._instances[address]

    def _tell_story(self, request: _Request) -> None:
        """What this side knows goes into the receipt."""
        receipt = json.loads(request.assembly.receipt) if request.assembly.receipt else {}
        story = {**request.story, "losses": [*request.losses, *receipt.get("losses", ())]}
        request.assembly.receipt = json.dumps({**receipt, **story})

    async def _watch(self) -> None:
        """Ask a router about every instance that has been silent; one that it gave up is given up here, too."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            now = time.monotonic()
            silent = [each for each in self._requests if each.address and now - each.running.heard_at > SILENT_SECONDS]
            if silent:
                usable = await self.usable(SILENT_SECONDS)  # a router that takes longer must not cost a gap
                for request in silent:
                    if usable is not None and request.address not in usable:
                        request.running.interrupt(f"silent for {SILENT_SECONDS:g} s, and its router gave it up")

    async def usable(self, patience: float = ANSWER_SECONDS) -> set[str] | None:
        """Addresses of the instances that a router thinks well of; None when there is none, or it does not answer
        within `patience` seconds."""
        router = self._routers[self._router]
        inputs = input_tensors({"control": "watch"})
        try:
            found: set[str] = set()
            async for message, _ in router.responses(inputs, "", patience, Running()):
                found.update(control_output(message).get("usable", ()))
            return found or None
        except StreamError:
            self._router = next(self._turn)
        return None


def control_output(message: Any) -> Mapping[str, Any]:
    """The JSON of a response to a control request."""
    for output, raw in zip(message.outputs, message.raw_output_contents, strict=True):
        if output.name == "control_output":
            found: Mapping[str, Any] = json.loads(raw[4:])
            return found
    return {}
