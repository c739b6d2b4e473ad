"""The life of a request at a router: choose an instance, offer, follow a decline, resume where one fails.

    rank -> offer -> tokens ... -> receipt          all went well
            declined -> the next, at most `max_hops`, then best effort where it harms least
            lost     -> another, with the prompt and the tokens delivered; deadlines as they were
            nobody   -> wait at most `wait_s`, then UNAVAILABLE

Every call ends in exactly one final response. Keeps nothing that another router would need: sessions find their
home by name, and what this router remembers of them only saves prefill time.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Set
from dataclasses import replace
from typing import Any, Final

from slos_serve.client.wire import encode
from slos_serve.scheduler.dispatch import Ask, prefix

from .refusal import Refusal, overloaded, parse_refusal
from .router_call import Call, ask_of
from .router_config import RouterConfig
from .router_fleet import Instances, Member
from .router_link import Answered, Broken, Exchange, request_message

log = logging.getLogger(__name__)

POLL_SECONDS: Final = 0.02
ADVISED: Final = 4  # requests of a caller that a suggestion is for: about as many as come before it asks again
LEARNING: Final = 0.05
# The instance is at fault, or going away: another may do better.
_MOVABLE: Final = frozenset({"UNAVAILABLE", "INTERNAL"})


class _Declined(Exception):
    """The instance could not promise the SLO."""


class _Lost(Exception):
    """The instance failed while it had the request."""


class Dispatcher:
    """Serves calls, each as a task of one event loop."""

    def __init__(self, config: RouterConfig, instances: Instances) -> None:
        self._config = config
        self._instances = instances
        self._chars_per_token = 3.0
        self._serving = 0

    async def serve(self, call: Call) -> None:
        """Answer a call, whatever happens."""
        self._serving += 1
        try:
            await self._serve(call)
        except Refusal as refusal:
            call.fail(refusal)
        except asyncio.CancelledError:
            call.abandon("stopped, or the time was over, and no instance said so", time.monotonic())
        except Exception as error:
            log.exception("request %s", call.id)
            call.fail(Refusal("INTERNAL", f"router: {type(error).__name__}: {error}"))
        finally:
            self._serving -= 1

    @property
    def coalesce_ms(self) -> float:
        """How long a stream's early tokens are held: what a response costs, many streams share."""
        return max(self._config.coalesce_ms, 1000.0 * self._serving / self._config.max_responses_s)

    def suggest(self, call: Call) -> None:
        """Answer where the next requests like this one would be offered, for a caller who will soon have some."""
        fleet = self._instances.fleet
        table = fleet.table.copy()
        try:
            call.answer({"advice": list(self._advice(call))})
        except Exception as error:
            log.exception("request %s", call.id)
            call.fail(Refusal("INTERNAL", f"router: {type(error).__name__}: {error}"))
        finally:
            fleet.table[:] = table  # none of them has been sent

    def _advice(self, call: Call) -> Iterator[dict[str, Any]]:
        for _ in range(ADVISED):
            choice = self._choose(call, frozenset(), frozenset(), frozenset())
            if choice is not None:
                member, ask, may_decline = choice
                self._instances.fleet.sent(member.address, ask)
                yield {"address": member.address, "may_decline": may_decline}

    async def stop(self, request_id: str) -> None:
        """Tell every instance to stop a request: another router may have sent it there."""
        message = request_message(self._config.model, request_id, encode({"control": "stop"}))

        async def tell(member: Member) -> None:
            try:
                async for _ in member.link.send(message):
                    pass
            except (Broken, Answered) as error:
                log.info("stop at %s: %s", member.address, error)

        await asyncio.gather(*(tell(member) for member in self._instances.usable))

    async def _serve(self, call: Call) -> None:
        declined: set[str] = set()
        full: dict[str, Refusal] = {}
        lost: set[str] = set()
        waiting_since: float | None = None
        while True:
            choice = self._choose(call, declined, full.keys(), lost)
            if choice is None:
                if full:  # those that are well are full
                    raise min(full.values(), key=_retry_after)
                waiting_since = waiting_since or time.monotonic()
                await self._wait(call, waiting_since)
                continue
            member, ask, may_decline = choice
            waiting_since = None
            try:
                await self._attempt(call, member, ask, may_decline)
                return
            except _Declined:
                declined.add(member.address)
                call.hops += 1
            except Refusal as refusal:
                if refusal.code != "OVERLOADED":
                    raise
                full[member.address] = refusal
            except _Lost as error:
                self._forget(call, member, str(error))
                lost.add(member.address)

    def _forget(self, call: Call, member: Member, cause: str) -> None:
        """Another instance must take over. Raises Refusal when too many have failed under this request."""
        log.warning("request %s: lost at %s after %d tokens: %s", call.id, member.address, len(call.ids), cause)
        call.losses.append(f"{member.address}: {cause}")
        if call.is_cancelled:
            raise asyncio.CancelledError
        if len(call.losses) >= self._config.max_losses:
            raise Refusal("UNAVAILABLE", f"{len(call.losses)} instances failed: {'; '.join(call.losses)}")

    async def _wait(self, call: Call, since: float) -> None:
        """For an instance; raises Refusal when none came in time."""
        now = time.monotonic()
        if now >= call.deadline:
            raise Refusal("CANCELLED", "timeout: it passed while no instance was available")
        if now - since > self._config.wait_s:
            raise Refusal("UNAVAILABLE", f"no instance for {self._config.wait_s:g} s: {self._instances.describe()}")
        await asyncio.sleep(POLL_SECONDS)

    def _choose(
        self, call: Call, declined: Set[str], full: Set[str], lost: Set[str]
    ) -> tuple[Member, Ask, bool] | None:
        """Where the request goes now, and whether it may be declined there; None where there is nobody."""
        ask = self._ask(call)
        best = self._best(ask, declined | full, lost)
        # Somebody reads what was resumed: no time to ask around.
        may_hop = math.isfinite(ask.ttft) and len(declined) < self._config.max_hops and not call.ids
        if best is not None and (may_hop or not declined):
            return best, ask, may_hop and len(self._instances.usable) > 1
        # Nobody promises it: as best effort it goes where the fewest promises are in its way.
        best = self._best(replace(ask, ttft=math.inf, tpot=math.inf), full, lost)
        return None if best is None else (best, ask, False)

    def _best(self, ask: Ask, without: Set[str], lost: Set[str]) -> Member | None:
        """One that has failed under this request gets it again only where nobody else is left."""
        return self._instances.best(ask, without | lost) or self._instances.best(ask, without)

    def _ask(self, call: Call) -> Ask:
        usable = self._instances.usable
        facts = usable[0].facts if usable else {}
        ask = ask_of(call, facts, self._chars_per_token, lambda: self._instances.per_token)
        session = call.values.get("session_id")
        if session is None or not usable:
            return ask
        cached = prefix(self._instances.fleet, session, self._instances.homes.of(session), ask.prompt_tokens)
        return replace(ask, cached=cached)

    async def _attempt(self, call: Call, member: Member, ask: Ask, may_decline: bool) -> None:
        """Serve the call there. Raises _Declined, _Lost, or the Refusal of the instance."""
        now = time.monotonic()
        tensors = call.tensors(may_decline=may_decline, coalesce_ms=self.coalesce_ms, now=now)
        left = call.deadline - now
        timeout_us = max(1, int(left * 1e6)) if math.isfinite(left) else 0
        predicted = self._instances.predicted(member, ask)
        self._instances.fleet.sent(member.address, ask)
        exchange = member.link.send(request_message(self._config.model, call.id, tensors, timeout_us))
        member.exchanges.add(exchange)
        try:
            await self._relay(call, member, exchange, ask, (now, predicted))
        except Broken as error:
            raise _Lost(str(error)) from error
        except Answered as error:
            refusal = parse_refusal(str(error))
            if refusal is None or refusal.code in _MOVABLE or (refusal.code == "ALREADY_EXISTS" and call.losses):
                await asyncio.sleep(POLL_SECONDS)
                raise _Lost(str(error)) from error
            raise refusal from error
        finally:
            member.exchanges.discard(exchange)
            exchange.close()

    async def _relay(
        self, call: Call, member: Member, exchange: Exchange, ask: Ask, started: tuple[float, float]
    ) -> None:
        """Pass on what the instance says. Ends with its last response."""
        is_first = True
        async for response in exchange:
            if "control_output" in response.raw:
                exchange.finish()
                self._placed(call, member, ask, json.loads(response.text("control_output")))
                return
            ids, at = response.ids(), time.monotonic()
            if response.token_index() != len(call.ids) + len(ids):
                raise Broken(f"token_index: expected {len(call.ids) + len(ids)}, got {response.token_index()}")
            if ids and is_first:
                is_first = False
                self._instances.fleet.observed(member.address, started[1], at - started[0])
            reason = response.text("finish_reason")
            if not reason:
                call.push(ids, response.text("text_output"), at)
                continue
            exchange.finish()
            receipt = json.loads(response.text("receipt"))
            if reason == "declined":
                raise _Declined
            self._learn(call, member, receipt)
            call.finish(ids, response.text("text_output"), reason, {**receipt, **self._story(call, member)}, at)
            return
        raise Broken("the stream ended without its last response")

    def _placed(self, call: Call, member: Member, ask: Ask, answer: Mapping[str, Any]) -> None:
        """The instance runs it already; the client claims the stream there."""
        session = call.values.get("session_id")
        if session is not None:
            self._instances.homes.remember(session, member.address, int(ask.prompt_tokens))
        call.answer({"address": member.address, **answer, **self._story(call, member)})

    def _story(self, call: Call, member: Member) -> dict[str, Any]:
        return {"instance": member.address, "hops": call.hops, "losses": list(call.losses)}

    def _learn(self, call: Call, member: Member, receipt: Mapping[str, Any]) -> None:
        text, session = call.values.get("text_input"), call.values.get("session_id")
        if text is not None and receipt.get("prompt_tokens"):
            self._chars_per_token += LEARNING * (len(text) / receipt["prompt_tokens"] - self._chars_per_token)
        if session is not None:
            tokens = receipt.get("prompt_tokens", 0) + len(call.ids)
            self._instances.homes.remember(session, member.address, tokens)


def _retry_after(refusal: Refusal) -> float:
    found = str(refusal).partition("retry_after_ms=")[2].partition(":")[0]
    return float(found) if found.isdigit() else math.inf


def too_many(limit: int) -> Refusal:
    """The router itself is full."""
    return overloaded(0.1, f"requests at this router: at most {limit}, got one more")
