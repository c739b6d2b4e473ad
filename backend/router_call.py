"""One request at a router: what the caller asked, what was delivered so far, and the way back.

Delivered tokens are remembered with their times, so that another instance can go on after the last of them.
What comes back to the caller is what one instance would have sent: the same tensors, receipts and errors.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from slos_serve.client import wire
from slos_serve.client.wire import Array
from slos_serve.scheduler.dispatch import Ask

from .fields import milliseconds, name_of, read_fields
from .refusal import Refusal
from .responder import Outlet

DEFAULT_MAX_TOKENS: Final = 128  # only a guess for ranking: the instance decides
STREAM_HOLD_MS: Final = 250.0  # for a caller who waits for the whole answer
# Fields that the router sets itself on the way to an instance.
_OWN: Final = ("stream", "return_token_ids", "control", "ticket", "coalesce_ms", "elapsed_ms", "may_decline",
               "resume_ids", "resume_times_ms")  # fmt: skip


@dataclass(slots=True, eq=False)
class Call:
    """A request in flight. Times are monotonic seconds; `arrived_at` is when it came to the service first."""

    id: str
    values: Mapping[str, Any]
    outlet: Outlet
    arrived_at: float
    deadline: float
    is_placement: bool = False
    is_cancelled: bool = False
    ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    delivered_before: int = 0  # of `ids`, those that the caller brought along
    hops: int = 0
    losses: list[str] = field(default_factory=list)  # why each instance that had it was given up

    @property
    def is_streaming(self) -> bool:
        return bool(self.values.get("stream", False))

    def push(self, ids: list[int], text: str, at: float) -> None:
        """New tokens; a stream gets them at once. Raises what sending raises."""
        self.ids += ids
        self.times += [at] * len(ids)
        self.text.append(text)
        if self.is_streaming and (text or (ids and self.values.get("return_token_ids"))):
            self._send(ids, final=None)

    def finish(self, ids: list[int], text: str, reason: str, receipt: Mapping[str, Any], at: float) -> None:
        """The last response."""
        self.ids += ids
        self.times += [at] * len(ids)
        self.text.append(text)
        told = ids if self.is_streaming else self.ids[self.delivered_before :]
        self._send(told, final=(reason, receipt))

    def abandon(self, reason: str, at: float) -> None:
        """The last response where no instance wrote one; nothing where there was one."""
        if self.is_placement:
            self.fail(Refusal("CANCELLED", reason))
        elif not self.outlet.is_closed:
            receipt = {"admitted": False, "reason": reason, "attained": False, "tokens": len(self.ids)}
            self.finish([], "", "cancelled", {**receipt, "hops": self.hops, "losses": list(self.losses)}, at)

    def answer(self, output: Mapping[str, Any]) -> None:
        """The only response to a control request."""
        self.outlet.send(control_output(output), final=True)

    def fail(self, refusal: Refusal) -> None:
        if not self.outlet.is_closed:
            self.outlet.fail(refusal)

    def _send(self, ids: list[int], final: tuple[str, Mapping[str, Any]] | None) -> None:
        text = "".join(self.text)
        self.text.clear()
        tensors: dict[str, Array] = {
            "text_output": np.array([text.encode("utf-8", "replace")], dtype=np.object_),
            "token_index": np.array([len(self.ids)], dtype=np.int32),
        }
        if self.values.get("return_token_ids"):
            tensors["output_ids"] = np.array(ids, dtype=np.int32)
        if final is not None:
            tensors["finish_reason"] = np.array([final[0].encode()], dtype=np.object_)
            tensors["receipt"] = np.array([json.dumps(final[1]).encode()], dtype=np.object_)
        self.outlet.send(tensors, final=final is not None)

    def tensors(self, *, may_decline: bool, coalesce_ms: float, now: float) -> dict[str, Array]:
        """The request for one instance: what was asked, what was delivered, and how old it is."""
        own: dict[str, Any] = {
            "stream": True,
            "return_token_ids": True,
            "may_decline": may_decline or None,
            "elapsed_ms": (now - self.arrived_at) * 1000,
        }
        if self.is_placement:
            own |= {name: self.values.get(name) for name in ("stream", "return_token_ids", "coalesce_ms")}
            own["control"] = "offer"
        else:
            own["coalesce_ms"] = coalesce_ms if self.is_streaming else max(coalesce_ms, STREAM_HOLD_MS)
        if self.ids:
            own["resume_ids"] = self.ids
            own["resume_times_ms"] = [(at - self.arrived_at) * 1000 for at in self.times]
        asked = {name: value for name, value in self.values.items() if name not in _OWN}
        return wire.encode({**asked, **own})


def read_call(
    request_id: str,
    tensors: Mapping[str, Array],
    parameters: Mapping[str, Any],
    outlet: Outlet,
    now: float,
    timeout: float,
    is_placement: bool,
    unseen: tuple[int, float] | None = None,
) -> Call:
    """The request as a Call. Raises Refusal for what cannot be read; the instance judges the rest.

    `unseen` are the most tokens and seconds for a caller who could leave without being seen, None for any other.
    """
    values = read_fields(tensors, parameters)
    if unseen is not None:
        values, timeout = bounded(values, timeout, *unseen)
    if values.get("text_input") is None and values.get("input_ids") is None:
        raise Refusal("INVALID_ARGUMENT", "text_input: a prompt must be given, as text_input or input_ids, got None")
    name_of(values, "session_id")
    arrived_at = now - (milliseconds(values, "elapsed_ms", least=0.0) or 0.0) / 1000
    ids = [int(token) for token in values.get("resume_ids", ())]
    times = [arrived_at + float(ms) / 1000 for ms in values.get("resume_times_ms", ())]
    if len(ids) != len(times) or not all(map(math.isfinite, times)):
        raise Refusal("INVALID_ARGUMENT", f"resume_times_ms: must have a time for each of {len(ids)} resume_ids")
    return Call(
        request_id, values, outlet, arrived_at, now + timeout, is_placement,
        ids=ids, times=times, delivered_before=len(ids),
    )  # fmt: skip


def bounded(values: dict[str, Any], timeout: float, tokens: int, seconds: float) -> tuple[dict[str, Any], float]:
    """The fields and the timeout of a request whose caller nobody would see leave, within `tokens` and `seconds`."""
    asked = values.get("max_tokens")
    if isinstance(asked, int) and asked > tokens:
        values = {**values, "max_tokens": tokens}
    return values, timeout if math.isfinite(timeout) else seconds


def control_output(output: Mapping[str, Any]) -> dict[str, Array]:
    """The tensor that answers a control request."""
    return {"control_output": np.array([json.dumps(output).encode()], dtype=np.object_)}


def ask_of(call: Call, facts: Mapping[str, Any], chars_per_token: float, per_token: Callable[[], float]) -> Ask:
    """What the ranking must know of a call; `facts` are those of any instance (its classes, in milliseconds).
    `per_token` tells the seconds of a prompt token, where the class's SLO depends on them."""
    values = call.values
    ids = values.get("input_ids")
    prompt = len(ids) if ids is not None else max(len(values["text_input"]) / chars_per_token, 1.0)
    classes = facts.get("classes", {})
    chosen = classes.get(values.get("slo_class", facts.get("default_class")), {})
    ttft = values.get("slo_ttft_ms") or chosen.get("ttft_ms")
    if ttft is None and chosen.get("ttft_slowdown"):
        ttft = max(chosen["ttft_slowdown"] * prompt * per_token() * 1000, chosen["ttft_floor_ms"])
    thinking = values.get("thinking_tokens") and (values.get("slo_thinking_tpot_ms") or chosen.get("thinking_tpot_ms"))
    tpot = values.get("slo_tpot_ms") or chosen.get("tpot_ms")
    new_tokens = values.get("max_tokens", DEFAULT_MAX_TOKENS)
    if ttft is None or tpot is None:
        return Ask(prompt + len(call.ids), float(new_tokens))
    tpot = min(tpot, thinking or tpot)
    due = call.arrived_at + (ttft + tpot * len(call.ids)) / 1000
    left = max(due - time.monotonic(), 1e-3)
    return Ask(prompt + len(call.ids), float(new_tokens), left, tpot / 1000)
